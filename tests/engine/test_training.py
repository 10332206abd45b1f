"""Training on a model small enough to reason about: steps, epochs, what is skipped, saved and restored."""

import argparse
import itertools
import math
import os

import pytest
import torch
from torch import nn

from engine import arguments
from engine.arguments import encoder_suffix, folder_number, next_command
from engine.command_line import make_parser
from engine.distributed import Ranks, Shard
from engine.evaluation import DivergenceError, Evaluation
from engine.loading import LoaderError, make_loader, stream
from engine.run import RunFolder
from engine.training import MAX_SKIPPED_IN_A_ROW, FitSettings, StepGuard, fit, make_optimizer, train_epoch
from utils import InputError, process, whole_numbers

CPU = torch.device("cpu")


class Samples(torch.utils.data.Dataset):
    """Sample i is the vector of i."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return torch.full((2,), float(index)), index % 2


class Batches(list):
    """Batches of indices that are told the epoch, as fit() does."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch


def loader_of(batches, ranks=None, *, by_image=False):
    return make_loader(
        Samples(), Shard(Batches(batches), ranks or Ranks(), by_image=by_image), num_workers=0, device=CPU
    )


# --- loading ---


class DiesInItsWorker(torch.utils.data.Dataset):
    def __getitem__(self, index):
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


def settings(**changed):
    return FitSettings(**{"max_epoch": 1, "lr": 0.1, "step_size": 2, "gamma": 0.5, **changed})


def guard_of(network, ranks=None):
    return StepGuard(network, make_optimizer(network, settings())[0], ranks=ranks or Ranks())


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
        train_epoch(network, classify(network), loader, guard_of(network), run, settings(accumulate=count))
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
    fit(network, forward, loader, validate, run, settings(max_epoch=3, save_all=True), weights_of=network)
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
    train_epoch(network, forward, loader, guard, run, settings())
    loss = guard.progress.losses[-1]
    assert (guard.progress.skipped, len(steps)) == (1, 2)
    assert math.isfinite(loss)
    assert all(value.isfinite().all() for value in network.state_dict().values())
    assert network[0].num_batches_tracked == 2


@pytest.mark.parametrize("reports_late", [False, True])
def test_a_failing_batch_costs_its_step(run, capsys, reports_late):
    """Also where the solver answers NaN at first, as on a GPU, and gives the reason when it is asked."""
    network = nn.Linear(2, 2)

    def fail():
        raise ArithmeticError("no solution")

    def forward(images, labels, at):
        if at[1] == 2 and not reports_late:
            fail()
        return network(images) * (math.nan if at[1] == 2 else 1), labels

    network.settle = fail

    loader = loader_of([[0, 1], [2, 3], [4, 5], [6, 7]])
    guard = guard_of(network)
    weights = []
    guard.optimizer.register_step_post_hook(lambda *_: weights.append(network.weight.detach().clone()))
    train_epoch(network, forward, loader, guard, run, settings(accumulate=2, skip_on=(ArithmeticError,)))
    assert guard.progress.skipped == 1
    assert len(guard.progress.losses) == 2  # of the step that was taken
    assert len(weights) == 1  # the step of the second pair only
    assert "step skipped (1 so far): no solution" in capsys.readouterr().out
    with pytest.raises(ArithmeticError):
        train_epoch(network, forward, loader, guard_of(network), run, settings())


class FailsInBackward(torch.autograd.Function):
    """A solver whose answer is fine and whose gradient cannot be computed."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("no gradient")


@pytest.mark.parametrize(("accumulate", "bad"), [(1, 2), (2, 3), (2, 4), (3, 3)])
def test_a_failing_gradient_costs_its_step(run, capsys, accumulate, bad):
    """Wherever in its step the batch is: the last one of four, of six, the only one."""
    network = nn.Linear(2, 2)

    def forward(images, labels, place):
        logits = network(images)
        return FailsInBackward.apply(logits) if place[1] == bad else logits, labels

    guard = guard_of(network)
    taken = []
    guard.optimizer.register_step_post_hook(lambda *_: taken.append(network.weight.isfinite().all().item()))
    loader = loader_of([[k, k + 1] for k in range(6)])
    flags = settings(accumulate=accumulate, skip_on=(ArithmeticError,))
    train_epoch(network, forward, loader, guard, run, flags)
    assert (guard.progress.skipped, taken) == (1, [True] * (6 // accumulate - 1))
    assert len(guard.progress.losses) == 6 - accumulate
    assert "step skipped (1 so far): no gradient" in capsys.readouterr().out
    assert network.weight.grad is None


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
            network, forward, loader, guard_of(network), run, settings(accumulate=2, skip_on=(ArithmeticError,))
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
        (network, StepGuard(network, make_optimizer(network, settings())[0], scaler)),
        (plain, guard_of(plain)),
    ):
        loader = loader_of([[200, 301]] * 3)
        train_epoch(one, classify(one), loader, guard, run, settings())
        if one is network:
            assert guard.progress.skipped == skipped
            assert scaler.get_scale() == scale / 2**skipped
    torch.testing.assert_close(network.weight.detach(), start["weight"] if skipped else plain.weight.detach())


def test_losses_of_skipped_steps_are_not_logged(run):
    network = nn.Linear(2, 2)
    network.weight.register_hook(lambda gradient: gradient * math.nan)  # a finite loss, and no finite gradient
    guard = guard_of(network)
    scalars = []
    run.scalars = lambda step, **values: scalars.append(step)
    train_epoch(network, classify(network), loader_of([[0, 1]]), guard, run, settings())
    assert (guard.progress.skipped, guard.progress.losses) == (1, [])
    assert scalars == []


def test_loader_processes_are_shared_by_the_ranks(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(24), raising=False)
    for local_size, workers in ((1, 8), (4, 6), (48, 1)):
        monkeypatch.setattr(process, "local_size", local_size)
        assert arguments.loader_processes(argparse.Namespace(num_workers=None)) == workers
    assert arguments.loader_processes(argparse.Namespace(num_workers=0)) == 0


def test_divergence_in_validation_names_the_steps(run):
    network = nn.Linear(2, 2)

    def forward(images, labels, at):
        return network(images) * (math.nan if at[1] > 1 else 1), labels

    def validate(epoch):
        raise DivergenceError("the encoder's features are not finite")

    loader = loader_of([[0, 1], [2, 3], [4, 5]])
    with pytest.raises(DivergenceError, match="after epoch 1: .* skipped since epoch 1, batch 2. Lower -lr, now 0.1"):
        fit(network, forward, loader, validate, run, settings(), weights_of=network)


# --- state ---


def fit_once(folder, network, batches, validate=lambda epoch: Evaluation(1.0, 50.0, 1.0, []), **flags):
    """One run, new or resumed, of a network on batches."""
    run = RunFolder(folder, {}, resume=True)
    fit(network, classify(network), loader_of(batches), validate, run, settings(**flags), weights_of=network)
    run.writer.close()
    run._lock.close()
    return run


def test_the_state_is_saved_every_so_many_steps(run, monkeypatch):
    network, saved = nn.Linear(2, 2), []
    monkeypatch.setattr(
        RunFolder,
        "save_state",
        lambda self, state: saved.append((state["progress"]["epoch"], state["progress"]["batch"])),
    )
    flags = settings(accumulate=2, save_every=2, max_epoch=2)
    loader = loader_of([[k, k + 1] for k in range(9)])

    def validate(epoch):
        return Evaluation(1.0, 50.0, 1.0, [])

    fit(network, classify(network), loader, validate, run, flags, weights_of=network)
    # After steps 2 and 4 of the five, at the end of the training part, and after validation.
    assert saved == [(1, 4), (1, 8), (1, 9), (2, 0), (2, 4), (2, 8), (2, 9), (3, 0)]
    saved.clear()
    fit(network, classify(network), loader, validate, run, settings(max_epoch=1), weights_of=network)
    assert saved == [(1, 9), (2, 0)]


def test_a_resumed_run_has_the_learning_rate_and_loss_scale_that_it_had(tmp_path):
    network = nn.Linear(2, 2)
    hook = network.weight.register_hook(lambda gradient: gradient * math.nan)  # the loss scale is halved
    flags = {"half_precision": True, "step_size": 1}
    fit_once(tmp_path, network, [[0, 1]], **flags)
    hook.remove()
    network = nn.Linear(2, 2)
    run = fit_once(tmp_path, network, [[0, 1]], **flags, max_epoch=3)
    assert [epoch["lr"] for epoch in run.curves["epochs"]] == [0.1, 0.05, 0.025]
    assert run.state["scaler"]["scale"] == torch.amp.GradScaler("cpu", enabled=True).get_scale() / 2
    assert run.state["progress"]["skipped"] == 1


def test_a_state_that_does_not_fit_is_named(tmp_path):
    fit_once(tmp_path, nn.Linear(2, 2), [[0, 1]])
    with pytest.raises(InputError, match=r"last\.pth does not fit this run") as error:
        fit_once(tmp_path, nn.Linear(2, 3), [[0, 1]], max_epoch=2)
    assert "\n" not in str(error.value)
    good = torch.load(tmp_path / "last.pth", weights_only=True)
    for part, value in (("optimizer", {}), ("network", [1]), ("progress", {"epoch": 1, "losses": 3})):
        torch.save({**good, "state": {**good["state"], part: value}}, tmp_path / "last.pth")
        with pytest.raises(InputError, match=r"last\.pth"):
            fit_once(tmp_path, nn.Linear(2, 2), [[0, 1]], max_epoch=2)


# --- flags ---


def test_the_next_command_has_the_flags_that_are_not_at_their_default():
    parser = make_parser("this")
    parser.add_argument("-way", type=int, default=5)
    parser.add_argument("-patch_list", type=whole_numbers, default="2,3")
    parser.add_argument("-feature_pyramid", type=whole_numbers)
    parser.add_argument("-compile", action="store_true")
    parser.add_argument("-lr", type=float, default=0.1)
    parser.add_argument("-sfc_lr", type=float, default=0.1)  # 100 in the next stage, which keeps its own
    parser.add_argument("-solver", default="opencv")
    parser.add_argument("-extra_dir", default="")
    parser.add_argument("-num_episode", type=int, default=1)
    words = ["-patch_list", "5,3,2", "-feature_pyramid", "2", "-compile", "-lr", "7", "-num_episode", "3"]
    args = parser.parse_args([*words, "-solver", "ipm", "-extra_dir=-mine"])
    changed = {"model_dir": "a b/max_acc.pth", "solver": "opencv"}
    found = next_command("eval.py", parser, args, leave_out=["num_episode"], **changed)
    assert found == (
        "python eval.py -patch_list 5,3,2 -feature_pyramid 2 -compile -extra_dir=-mine -model_dir 'a b/max_acc.pth'"
    )


@pytest.mark.parametrize(
    ("encoder", "suffix"),
    [("resnet12", ""), ("timm:resnet18", "-timm-resnet18"), ("timm:hf-hub:a/b.c", "-timm-hf-hub-a-b.c-4b5b7a")],
)
def test_run_folders_name_an_encoder_that_is_not_the_published_one(encoder, suffix):
    assert encoder_suffix(argparse.Namespace(backbone=encoder)) == suffix


def test_a_default_that_depends_on_other_flags_is_kept_by_the_next_command():
    """4 is the default beside -backbone b and 0 beside a, so that it is 0 that has to be named."""

    def complete(args):
        args.map_size = {"a": 0, "b": 4}[args.backbone] if args.map_size is None else args.map_size

    parser = make_parser("this")
    parser.add_argument("-backbone", default="a")
    parser.add_argument("-map_size", type=int)
    parser.completions.append(complete)
    for words, expected in {
        "-backbone b -map_size 0": "-backbone b -map_size 0",
        "-backbone b": "-backbone b",
        "-backbone b -map_size 4": "-backbone b",
        "-map_size 4": "-map_size 4",
        "": "",
    }.items():
        command = next_command("next.py", parser, parser.parse_args(words.split()), model_dir="x")
        assert command == " ".join(f"python next.py {expected} -model_dir x".split())


def test_numbers_in_folder_names_are_not_rounded():
    assert [folder_number(lr, 4) for lr in (0.1, 0.00003, 0.00005, 0.12345)] == ["0.1000", "3e-05", "5e-05", "0.12345"]
