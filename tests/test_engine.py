"""The loops, on a model small enough to reason about."""

import argparse

import pytest
import torch
from torch import nn

from engine import PATIENCE, StepGuard, evaluate, fit, make_loader, make_optimizer, train_epoch
from utils import InputError, RunFolder

CPU = torch.device("cpu")


class Samples(torch.utils.data.Dataset):
    """Sample i is the vector of i; its view is random or not, as one is told. Counts what it is asked for."""

    def __init__(self, is_random=False):
        self.view = argparse.Namespace(is_random=is_random)
        self.asked = []

    def __getitem__(self, item):
        self.asked.append(item)
        index = item[0] if isinstance(item, tuple) else item
        return torch.full((2,), float(index)), index % 2


class FixedLogits(nn.Module):
    """Right for as many queries as the first support image says."""

    def __init__(self):
        super().__init__()
        self.draws, self.encoded = [], []

    def folded(self):
        return self

    def encode(self, images):
        self.encoded.append(len(images))
        return images.unsqueeze(2)  # (B, C, 1)

    def match(self, support, query, *, way, shot, solver, generator):
        self.draws += [torch.rand((), generator=one).item() for one in generator]
        right = support[:, 0, 0, 0].unsqueeze(1)  # (E, 1)
        number = torch.arange(query.shape[1])
        return nn.functional.one_hot((number % way + (number >= right)) % way, way).float()


LABELS = torch.tensor([0, 1, 0, 1])
SHAPE = {"way": 2, "shot": 1, "device": CPU, "seed": 3}


def episode(*indices):
    return [(index, 100 + index) for index in indices]


def test_evaluate_counts_and_seeds_each_episode():
    model = FixedLogits()
    result = evaluate(model, Samples(), [episode(k, 9, 9, 9, 9, 9) for k in (4, 2, 0)], LABELS, **SHAPE)
    assert result.accuracies == [100, 50, 0]
    assert result.accuracy == 50
    assert str(result).startswith("50.00 +- 46.20")
    first, model.draws = model.draws, []
    evaluate(model, Samples(), [episode(k, 9, 9, 9, 9, 9) for k in (0, 4)], LABELS, **SHAPE)
    assert model.draws == first[:2]
    assert len(set(first)) == 3


@pytest.mark.parametrize("episode_batch", [1, 2, 8])
@pytest.mark.parametrize("is_random", [False, True])
@pytest.mark.parametrize("feature_cache", ["auto", "off"])
def test_each_image_is_encoded_once(episode_batch, is_random, feature_cache):
    episodes = [episode(k % 5, 5, 6, 7, 8, 9) for k in range(7)]
    data, model = Samples(is_random), FixedLogits()
    settings = {"episode_batch": episode_batch, "feature_cache": feature_cache, **SHAPE}
    result = evaluate(model, data, episodes, LABELS, **settings)
    assert result.accuracies == [25.0 * k for k in (0, 1, 2, 3, 4, 0, 1)]
    # One more for the shape. The seeds are those of the images here, so random views repeat as well.
    assert len(data.asked) == sum(model.encoded) == 1 + (10 if feature_cache == "auto" else 42)
    assert all(isinstance(item, tuple) == is_random for item in data.asked)


def test_more_images_than_fit_are_gone_through_in_rounds(monkeypatch):
    monkeypatch.setattr("engine.CACHE_BYTES", 20 * 4 * 2)  # room for 20 images
    episodes = [episode(*range(k, k + 6)) for k in range(0, 60, 2)] * 2
    data, model = Samples(), FixedLogits()
    result = evaluate(model, data, episodes, LABELS, episode_batch=2, **SHAPE)
    assert result.accuracies == [25.0 * min(k, 4) for k in range(0, 60, 2)] * 2
    assert len(data.asked) < len(episodes) * 6 / 2


@pytest.fixture
def settings(tmp_path):
    args = argparse.Namespace(max_epoch=3, lr=0.1, step_size=2, gamma=0.5, save_all=True, set="val", amp="off")
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
            lambda images, labels, network=network: (network(images), labels),
            loader,
            optimizer,
            StepGuard(),
            run,
            epoch=1,
            device=CPU,
            accumulate=accumulate,
        )
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


@pytest.mark.parametrize(("scale", "skipped"), [(2.0**127, 3), (2.0**8, 0)])
def test_float16_scales_the_loss_and_backs_off(settings, scale, skipped):
    args, run = settings
    network = nn.Linear(2, 2)
    start = {key: value.clone() for key, value in network.state_dict().items()}
    plain = nn.Linear(2, 2)
    plain.load_state_dict(start)
    for one, guard in (
        (network, StepGuard(torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000))),
        (plain, StepGuard()),
    ):
        optimizer, _ = make_optimizer(one, args)
        loader = make_loader(Samples(), [[200, 301]] * 3, num_workers=0, device=CPU)
        train_epoch(
            lambda images, labels, one=one: (one(images), labels), loader, optimizer, guard, run, epoch=1, device=CPU
        )
        if one is network:
            assert guard.skipped == skipped
            assert guard.scaler.get_scale() == scale / 2**skipped
    torch.testing.assert_close(network.weight.detach(), start["weight"] if skipped else plain.weight.detach())
