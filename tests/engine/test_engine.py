"""The loops, on a model small enough to reason about."""

import argparse
import itertools
import math

import pytest
import torch
from torch import nn

from engine import arguments
from engine.arguments import folder_number, next_command
from engine.distributed import Ranks, Shard
from engine.evaluation import DivergenceError, Evaluation
from engine.loading import LoaderError, make_loader, stream
from engine.run import RunFolder
from engine.training import MAX_SKIPPED_IN_A_ROW, StepGuard, fit, make_optimizer, train_epoch
from utils import make_parser, whole_numbers

CPU = torch.device("cpu")


class Samples(torch.utils.data.Dataset):
    """Sample i is the vector of i; its view is random or not, as one is told. Counts what it is asked for."""

    def __init__(self, is_random=False):
        self.view = argparse.Namespace(is_random=is_random, patches=1)
        self.asked = []

    def __len__(self):
        return 1000

    def __getitem__(self, item):
        self.asked.append(item)
        index = item[0] if isinstance(item, tuple) else item
        return torch.full((2,), float(index)), index % 2


class Batches(list):
    """Batches of indices that are told the epoch, as fit() does."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch


def loader_of(batches):
    return make_loader(Samples(), Shard(Batches(batches), Ranks(), by_image=False), num_workers=0, device=CPU)


# --- loading ---


class DiesInItsWorker(torch.utils.data.Dataset):
    def __getitem__(self, index):
        import os

        os._exit(9)


def test_a_lost_worker_is_one_line():
    loader = make_loader(DiesInItsWorker(), [[0]], num_workers=1, device=CPU)
    with pytest.raises(LoaderError, match="--shm-size.*-num_workers") as error:
        list(stream(loader))
    assert "\n" not in str(error.value)


# --- training ---


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run", {})


RATES = {"lr": 0.1, "step_size": 2, "gamma": 0.5}


def guard_of(network):
    return StepGuard(network, make_optimizer(network, **RATES)[0])


def classify(network):
    return lambda images, labels, at: (network(images), labels)


@pytest.mark.parametrize(("batches", "accumulate"), [([[0, 1], [2, 3]], 2), ([[0, 1], [2, 3]], 3)])
def test_accumulation_is_the_mean_gradient(run, batches, accumulate):
    start = nn.Linear(2, 2)
    weights = []
    for these, count in ((batches, accumulate), ([[0, 1, 2, 3]], 1)):
        network = nn.Linear(2, 2)
        network.load_state_dict(start.state_dict())
        loader = loader_of(these)
        train_epoch(network, classify(network), loader, guard_of(network), run, device=CPU, accumulate=count)
        assert network.weight.grad is None  # nothing is left to the next epoch
        weights.append(network.weight.detach())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize(
    ("accuracies", "kept"), [([40.0, 60.0, 60.0], 3), ([60.0, 40.0, 50.0], 1), ([40.0, 60.0, 50.0], 2)]
)
def test_fit_keeps_the_best_and_the_later_of_equals(run, accuracies, kept):
    network = nn.Linear(2, 2)
    seen, results = [], iter(accuracies)

    def forward(images, labels, at):
        seen.append((at, loader.batch_sampler.batches.epoch))
        return network(images), labels

    def validate(epoch):
        return Evaluation(1.0, next(results), 1.0, [])

    loader = loader_of([[0, 1]])
    fit(network, forward, loader, validate, run, weights_of=network, device=CPU, max_epoch=3, save_all=True, **RATES)
    best, same = (
        torch.load(run.path / name, weights_only=True)["params"] for name in ("max_acc.pth", f"epoch-{kept}.pth")
    )
    assert torch.equal(best["weight"], same["weight"])
    highest = itertools.accumulate(accuracies, max)
    assert [epoch["best"] for epoch in run.curves["epochs"]] == [
        a == b for a, b in zip(accuracies, highest, strict=True)
    ]
    assert [epoch["lr"] for epoch in run.curves["epochs"]] == [0.1, 0.1, 0.05]
    assert seen == [((epoch, 1), epoch) for epoch in (1, 2, 3)]
    assert len((run.path / "results.txt").read_text().splitlines()) == 3
    assert list((run.path / "tf").iterdir())


def test_gradients_that_are_not_finite_skip_the_step_then_stop(capsys):
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(1)
    guard = StepGuard(network, torch.optim.SGD(network.parameters(), lr=1.0))

    def step(gradient, number):
        network.weight.grad = torch.full((1, 1), gradient)
        guard.step(f"batch {number}")

    for number in range(MAX_SKIPPED_IN_A_ROW - 1):
        step(math.nan, number)
    assert network.weight.item() == 1
    assert guard.progress.skipped == MAX_SKIPPED_IN_A_ROW - 1
    step(1.0, 20)
    assert network.weight.item() == 0
    for number in range(30, 29 + MAX_SKIPPED_IN_A_ROW):
        step(math.inf, number)
    with pytest.raises(DivergenceError, match=f"{MAX_SKIPPED_IN_A_ROW} steps in a row were skipped since batch 30"):
        step(math.inf, 50)
    assert "batch 0: step skipped (1 so far): the gradient is not finite" in capsys.readouterr().out


def test_a_batch_that_overflows_leaves_no_trace(run):
    """Neither in the weights nor in the running statistics, which would stay NaN for good."""
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    guard = guard_of(network)
    loader = loader_of([[0, 1], [2, 3], [4, 5]])

    def forward(images, labels, at):
        if at[1] == 2:
            before.update({key: value.clone() for key, value in network.state_dict().items()})
            images = images * 1e38 * 1e38
        return network(images), labels

    before: dict[str, torch.Tensor] = {}
    steps = []
    guard.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    real = guard.step

    def step(where, failure=None):
        taken = real(where, failure)
        if "batch 2" in where:
            assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
        return taken

    guard.step = step
    train_epoch(network, forward, loader, guard, run, device=CPU)
    loss = guard.progress.losses[-1]
    assert (guard.progress.skipped, len(steps)) == (1, 2)
    assert math.isfinite(loss)
    assert all(value.isfinite().all() for value in network.state_dict().values())
    assert network[0].num_batches_tracked == 2


def test_a_failing_batch_costs_its_step(run):
    network = nn.Linear(2, 2)

    def forward(images, labels, at):
        if at[1] == 2:
            raise ArithmeticError("no solution")
        return network(images), labels

    loader = loader_of([[0, 1], [2, 3], [4, 5], [6, 7]])
    guard = guard_of(network)
    weights = []
    guard.optimizer.register_step_post_hook(lambda *_: weights.append(network.weight.detach().clone()))
    train_epoch(network, forward, loader, guard, run, device=CPU, accumulate=2, skip_on=(ArithmeticError,))
    assert guard.progress.skipped == 1
    assert len(guard.progress.losses) == 2  # of the step that was taken
    assert len(weights) == 1  # the step of the second pair only
    with pytest.raises(ArithmeticError):
        train_epoch(network, forward, loader, guard_of(network), run, device=CPU)


def test_gradients_of_a_failed_step_are_cleared(run):
    start = nn.Linear(2, 2)
    results = []
    for batches, bad in (([[0, 1], [2, 3], [4, 5], [6, 7]], 2), ([[4, 5], [6, 7]], None)):
        network = nn.Linear(2, 2)
        network.load_state_dict(start.state_dict())

        def forward(images, labels, at, network=network, bad=bad):
            if at[1] == bad:
                raise ArithmeticError("no solution")
            return network(images), labels

        loader = loader_of(batches)
        train_epoch(
            network, forward, loader, guard_of(network), run, device=CPU, accumulate=2, skip_on=(ArithmeticError,)
        )
        results.append(network.weight.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize(("scale", "skipped"), [(2.0**127, 3), (2.0**8, 0)])
def test_float16_scales_the_loss_and_backs_off(run, scale, skipped):
    network = nn.Linear(2, 2)
    start = {key: value.clone() for key, value in network.state_dict().items()}
    plain = nn.Linear(2, 2)
    plain.load_state_dict(start)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    for one, guard in (
        (network, StepGuard(network, make_optimizer(network, **RATES)[0], scaler)),
        (plain, guard_of(plain)),
    ):
        loader = loader_of([[200, 301]] * 3)
        train_epoch(one, classify(one), loader, guard, run, device=CPU)
        if one is network:
            assert guard.progress.skipped == skipped
            assert scaler.get_scale() == scale / 2**skipped
    torch.testing.assert_close(network.weight.detach(), start["weight"] if skipped else plain.weight.detach())


def test_losses_of_skipped_steps_are_not_logged(run):
    network = nn.Linear(2, 2)
    network.weight.register_hook(lambda gradient: gradient * math.nan)  # a finite loss, and no finite gradient
    guard = guard_of(network)
    train_epoch(network, classify(network), loader_of([[0, 1]]), guard, run, device=CPU)
    assert (guard.progress.skipped, guard.progress.losses, run.points) == (1, [], {})


def test_threads_and_processes_are_shared_by_the_ranks(monkeypatch):
    monkeypatch.setattr(arguments, "available_cores", lambda: 24)
    args = argparse.Namespace(num_workers=None, solver_threads=None)
    for local_size, workers, threads in ((1, 8, 24), (4, 6, 6), (48, 1, 1)):
        ranks = Ranks(0, local_size, local_size)
        assert arguments.loader_processes(args, ranks) == workers
        assert arguments.solver_threads(args, ranks) == threads
    args = argparse.Namespace(num_workers=0, solver_threads=3)
    assert (arguments.loader_processes(args, ranks), arguments.solver_threads(args, ranks)) == (0, 3)


def test_divergence_in_validation_names_the_steps(run):
    network = nn.Linear(2, 2)

    def forward(images, labels, at):
        return network(images) * (math.nan if at[1] > 1 else 1), labels

    def validate(epoch):
        raise DivergenceError("the encoder's features are not finite")

    loader = loader_of([[0, 1], [2, 3], [4, 5]])
    with pytest.raises(DivergenceError, match="after epoch 1: .* skipped since epoch 1, batch 2. Lower -lr, now 0.1"):
        fit(network, forward, loader, validate, run, weights_of=network, device=CPU, max_epoch=1, **RATES)


# --- flags ---


def test_next_command():
    stage, following = make_parser("this"), make_parser("next")
    for parser in (stage, following):
        parser.add_argument("-way", type=int, default=5)
        parser.add_argument("-patch_list", type=whole_numbers, default="2,3")
        parser.add_argument("-compile", action="store_true")
        parser.add_argument("-lr", type=float, default=0.1 if parser is stage else 0.2)
    stage.add_argument("-sfc_lr", type=float, default=0.1)
    following.add_argument("-sfc_lr", type=float, default=100.0)
    stage.add_argument("-num_episode", type=int, default=1)
    following.add_argument("-model_dir")
    args = stage.parse_args(["-patch_list", "5,3,2", "-compile", "-lr", "7", "-num_episode", "3"])
    found = next_command("eval.py", following, args, model_dir="a b/max_acc.pth")
    assert found == "python eval.py -patch_list 5,3,2 -compile -sfc_lr 0.1 -model_dir 'a b/max_acc.pth'"


def test_numbers_in_folder_names_are_not_rounded():
    assert [folder_number(lr, 4) for lr in (0.1, 0.00003, 0.00005, 0.12345)] == ["0.1000", "3e-05", "5e-05", "0.12345"]
