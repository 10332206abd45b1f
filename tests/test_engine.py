"""The loops, on a model small enough to reason about."""

import argparse

import pytest
import torch
from torch import nn

from engine import PATIENCE, StepGuard, evaluate, fit, make_loader, make_optimizer, train_epoch
from utils import InputError, RunFolder

CPU = torch.device("cpu")


class Samples(torch.utils.data.Dataset):
    """Sample i is the vector of i."""

    def __getitem__(self, index):
        return torch.full((2,), float(index)), index % 2


class FixedLogits(nn.Module):
    """Right for as many queries as the first support image says."""

    def __init__(self):
        super().__init__()
        self.draws = []

    def forward(self, images, *, way, shot, solver, generator):
        self.draws.append(torch.rand((), generator=generator).item())
        right = int(images[0, 0])
        classes = torch.arange(way).repeat(len(images) // way - shot)
        return nn.functional.one_hot(
            torch.where(torch.arange(len(classes)) < right, classes, (classes + 1) % way), way
        ).float()


def test_evaluate_counts_and_seeds_each_episode():
    model = FixedLogits()
    loader = make_loader(Samples(), [[k, 9, 9, 9, 9, 9] for k in (4, 2, 0)], num_workers=0, device=CPU)
    labels = torch.tensor([0, 1, 0, 1])
    result = evaluate(model, loader, labels, way=2, shot=1, device=CPU, seed=3)
    assert result.accuracies == [100, 50, 0]
    assert result.accuracy == 50
    assert str(result).startswith("50.00 +- 46.20")
    first = model.draws
    model.draws = []
    shorter = make_loader(Samples(), [[k, 9, 9, 9, 9, 9] for k in (0, 4)], num_workers=0, device=CPU)
    evaluate(model, shorter, labels, way=2, shot=1, device=CPU, seed=3)
    assert model.draws == first[:2]
    assert len(set(first)) == 3


@pytest.fixture
def settings(tmp_path):
    args = argparse.Namespace(max_epoch=3, lr=0.1, step_size=2, gamma=0.5, save_all=True, set="val")
    return args, RunFolder(tmp_path / "run", args)


def test_accumulation_is_the_mean_gradient(settings):
    args, run = settings
    start = nn.Linear(2, 2)
    weights = []
    for batches, accumulate in (([[0, 1], [2, 3]], 2), ([[0, 1, 2, 3]], 1)):
        network = nn.Linear(2, 2)
        network.load_state_dict(start.state_dict())
        loader = make_loader(Samples(), batches, num_workers=0, device=CPU)
        optimizer, _ = make_optimizer(network, args)
        train_epoch(
            lambda images, labels, network=network: (network(images), labels), loader, optimizer, StepGuard(), run,
            epoch=1, device=CPU, accumulate=accumulate,
        )  # fmt: skip
        weights.append(network.weight.detach())
    torch.testing.assert_close(*weights)


def test_fit_keeps_the_best_and_the_later_of_equals(settings):
    args, run = settings
    network = nn.Linear(2, 2)
    accuracies = iter([40.0, 60.0, 60.0])

    def validate():
        from engine import Evaluation

        return Evaluation(1.0, next(accuracies), 1.0, [])

    loader = make_loader(Samples(), [[0, 1]], num_workers=0, device=CPU)
    fit(network, lambda images, labels: (network(images), labels), loader, validate, run, network, args, device=CPU)
    best, last = (torch.load(run.path / name, weights_only=True)["params"] for name in ("max_acc.pth", "epoch-3.pth"))
    assert torch.equal(best["weight"], last["weight"])
    assert [epoch["best"] for epoch in run.curves["epochs"]] == [True, True, True]
    assert [epoch["lr"] for epoch in run.curves["epochs"]] == [0.1, 0.1, 0.05]
    assert len((run.path / "results.txt").read_text().splitlines()) == 3
    assert list((run.path / "tf").iterdir())


def test_gradients_that_are_not_finite_skip_the_step_then_stop():
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard = StepGuard()
    for _ in range(PATIENCE - 1):
        weight.grad = torch.full((1,), float("nan"))
        guard.step(optimizer)
    assert weight.item() == 1
    assert guard.skipped == PATIENCE - 1
    weight.grad = torch.ones(1)
    guard.step(optimizer)
    assert weight.item() == 0
    for _ in range(PATIENCE - 1):
        weight.grad = torch.full((1,), float("inf"))
        guard.step(optimizer)
    weight.grad = torch.full((1,), float("inf"))
    with pytest.raises(InputError, match="steps in a row"):
        guard.step(optimizer)


def test_a_failing_batch_costs_its_step(settings):
    args, run = settings
    network = nn.Linear(2, 2)
    start = network.weight.detach().clone()
    calls = []

    def forward(images, labels):
        calls.append(len(images))
        if len(calls) == 2:
            raise ArithmeticError("no solution")
        return network(images), labels

    loader = make_loader(Samples(), [[0, 1], [2, 3], [4, 5], [6, 7]], num_workers=0, device=CPU)
    optimizer, _ = make_optimizer(network, args)
    guard = StepGuard()
    weights = []
    optimizer.register_step_post_hook(lambda *_: weights.append(network.weight.detach().clone()))
    loss, _ = train_epoch(
        forward, loader, optimizer, guard, run, epoch=1, device=CPU, accumulate=2, skip_on=(ArithmeticError,)
    )
    assert guard.skipped == 1
    assert len(weights) == 1  # the step of the second pair only
    assert not torch.equal(weights[0], start)
    assert loss == loss
    calls.clear()
    with pytest.raises(ArithmeticError):
        train_epoch(forward, loader, optimizer, guard, run, epoch=1, device=CPU)
