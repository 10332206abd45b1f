"""Runs that are stopped, killed, resumed, repeated, and spread over processes."""

import argparse
import copy
import importlib.metadata
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, finish, run, start, succeed, torchrun, wait_for
from torch import nn

import engine.start
import train_meta
import train_pretrain
import utils
from engine import cache, distributed, stopping
from engine.arguments import parse_run, resume_command
from engine.distributed import Ranks, Shard
from engine.evaluation import Evaluator
from engine.run import RunFolder
from engine.training import train_epoch
from utils import InputError, append_line

TINY = ["-gpu", "cpu", "-image_size", "16", "-query", "2", "-way", "2", "-dataset", "folder", "-episode_batch", "1"]
TINY += ["-backbone", "conv4"]  # whose state is written in no time
PRETRAIN = ["train_pretrain.py", *TINY, "-max_epoch", "2", "-num_episode", "2", "-bs", "14", "-lr", "0.01"]
META = [
    *("train_meta.py", *TINY, "-pretrain_dir", "none", "-max_epoch", "2", "-val_frequency", "2", "-bs", "2"),
    *("-val_episode", "2", "-test_episode", "3", "-deepemd", "sampling", "-num_patch", "2", "-random_val_task"),
    *("-shot", "2", "-sfc_update_step", "2"),
]
EVAL = ["eval.py", *TINY, "-model_dir", "none", "-test_episode", "5"]
HERE = ["-num_workers", "0"]


class Ended:
    """What a run left behind, but for times."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        content = torch.load(folder / "last.pth", weights_only=True)
        self.network = content["state"]["network"]
        self.momentum = [entry["momentum_buffer"] for entry in content["state"]["optimizer"]["state"].values()]
        self.best = torch.load(folder / "max_acc.pth", weights_only=True)["params"]
        self.lines = [re.sub(r"\d+ s", "", line) for line in (folder / "results.txt").read_text().splitlines()]
        self.curves = json.loads((folder / "trlog.json").read_text())
        events = EventAccumulator(str(folder / "tf"), size_guidance={"scalars": 0}, purge_orphaned_data=False)
        events.Reload()
        names = events.Tags()["scalars"]
        self.events = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}
        assert not list(folder.glob("*.part"))

    def check(self, other: "Ended") -> None:
        """Equal to the bit, and no line twice or missing."""
        for mine, theirs in ((self.network, other.network), (self.best, other.best)):
            assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
        assert all(torch.equal(a, b) for a, b in zip(self.momentum, other.momentum, strict=True))
        assert self.lines == other.lines
        assert {**self.curves, "args": 0} == {**other.curves, "args": 0}
        assert self.events == other.events


def folder_of(words: list[str], cwd: Path) -> Path:
    if words[0] == "eval.py":
        return cwd / "checkpoint/eval"
    meta = "checkpoint/folder/sampling/2shot-2way-conv4"
    return cwd / (meta if words[0] == "train_meta.py" else "checkpoint/pre_train/folder/14-0.0100-30-0.20-conv4")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folder) -> dict[str, Ended]:
    """Runs that nobody stopped."""
    cwd = tmp_path_factory.mktemp("whole")
    for words in (PRETRAIN, META):
        succeed(*words, *HERE, "-data_dir", folder, cwd=cwd)
    return {words[0]: Ended(folder_of(words, cwd)) for words in (PRETRAIN, META)}


def stop_at(monkeypatch, count: int) -> None:
    """SIGTERM arrives before the step, or the group of episodes, of that number."""
    seen = []

    def signal_number(self):
        seen.append(1)
        return signal.SIGTERM if len(seen) == count else 0

    monkeypatch.setattr(stopping.StopRequest, "signal_number", property(signal_number))


# Steps: PRETRAIN 3 + 2 validation, twice; META 2 + 2, twice, + 3 of the test.
@pytest.mark.parametrize(
    ("words", "stops"),
    [(PRETRAIN, [2, 1]), (PRETRAIN, [5, 2]), (PRETRAIN, [10]), (META, [1]), (META, [3, 3]), (META, [8]), (META, [11])],
)
def test_a_stopped_run_ends_where_a_whole_one_ends(whole, folder, tmp_path, monkeypatch, words, stops):
    """To the bit, wherever it was stopped, by the command that it printed."""
    command = [*words, *HERE, "-data_dir", folder]
    for count in stops:
        with monkeypatch.context() as patch:
            stop_at(patch, count)
            done = run(*command, cwd=tmp_path)
        assert done.status == 128 + signal.SIGTERM
        assert done.err.splitlines()[-1] == "stopped by SIGTERM; the state is saved"
        command = shlex.split(re.search(r"^continue: python (.*)$", done.out, re.M)[1])
        assert "-resume" in command
    done = run(*command, cwd=tmp_path)
    assert done.status == 0, done.err
    assert ", resumed" in done.out
    whole[words[0]].check(Ended(folder_of(words, tmp_path)))
    again = run(*command, cwd=tmp_path)
    assert (again.status, "is finished: nothing to do" in again.err) == (0, True)
    whole[words[0]].check(Ended(folder_of(words, tmp_path)))


def test_a_stopped_evaluation_goes_on(folder, tmp_path, monkeypatch):
    def results(cwd):
        found = json.loads((cwd / "checkpoint/eval/results.json").read_text())
        return [*found["accuracies"], found["loss"], found["accuracy"], found["interval"]]

    command = [*EVAL, *HERE, "-data_dir", folder]
    (tmp_path / "whole").mkdir()
    succeed(*command, cwd=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        done = run(*command, cwd=tmp_path)
    assert done.status == 128 + signal.SIGTERM
    assert not (tmp_path / "checkpoint/eval/results.json").exists()
    command = shlex.split(re.search(r"^continue: python (.*)$", done.out, re.M)[1])
    (partial,) = (tmp_path / "checkpoint/eval").glob("partial-*.json")
    assert len(json.loads(partial.read_text())["scores"]) == 3
    succeed(*command, "-temperature", 3, cwd=tmp_path)  # another evaluation, which starts at its beginning
    assert partial.exists()
    asked = []
    real = Evaluator._score
    monkeypatch.setattr(Evaluator, "_score", lambda self, *values: asked.append(1) or real(self, *values))
    succeed(*command, "-episode_batch", 2, cwd=tmp_path)
    assert len(asked) == 1  # the two episodes that were left
    assert results(tmp_path) == pytest.approx(results(tmp_path / "whole"))
    assert not partial.exists()
    assert (tmp_path / "checkpoint/eval/results.txt").read_text().count("\n") == 2


# --- -resume ---


def test_resume_starts_a_run_where_there_is_none(whole, folder, tmp_path):
    succeed(*PRETRAIN, *HERE, "-data_dir", folder, "-resume", cwd=tmp_path)
    whole["train_pretrain.py"].check(Ended(folder_of(PRETRAIN, tmp_path)))
    done = run(*PRETRAIN, *HERE, "-data_dir", folder, "-resume", "nowhere", cwd=tmp_path)
    assert (done.status, "error: -resume nowhere: nothing to resume, there is no last.pth" in done.err) == (1, True)


def test_flags_of_a_resumed_run(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert run(*PRETRAIN, *HERE, "-data_dir", folder, "-seed", 0, "-save_every", 1, cwd=tmp_path).status == 143
    path = folder_of(PRETRAIN, tmp_path)
    again = [*PRETRAIN, *HERE, "-data_dir", folder, "-seed", 0, "-resume"]
    for flags, message in (
        (["-query", 3], "-query 3 (was 2)"),
        (["-max_epoch", 1, "-temperature", 3], "-temperature 3.0 (was 12.5)"),
        (["-max_epoch", 1], "-max_epoch 1 (was 2)"),
    ):
        done = run(*again, *flags, cwd=tmp_path)
        assert (done.status, message in done.err) == (1, True), done.err
        assert len(done.err.splitlines()) == 1
    # With the folder, its own flags hold; what does not decide the result may differ, and epochs may be added.
    out = succeed("train_pretrain.py", "-resume", path, *HERE, "-data_dir", folder, "-max_epoch", 3, cwd=tmp_path)
    assert "epoch 3/3" in out
    assert json.loads((path / "run.json").read_text())["flags"]["max_epoch"] == 3
    assert [line.split("/")[0] for line in (path / "results.txt").read_text().splitlines()] == [
        f"epoch {number}" for number in (1, 2, 3)
    ]


def test_a_folder_is_named_and_stopped_again(whole, folder, tmp_path, monkeypatch):
    """The command that a run resumed by its folder prints, and more epochs for a run that is finished."""
    out = succeed(*META, *HERE, "-data_dir", folder, "-max_epoch", 1, cwd=tmp_path)
    path = folder_of(META, tmp_path)
    assert "next: python eval.py" in out
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        done = run("train_meta.py", "-resume", path, "-max_epoch", 2, cwd=tmp_path)
    assert done.status == 143, done.err
    command = shlex.split(re.search(r"^continue: python (.*)$", done.out, re.M)[1])
    assert not {"None", "False"} & set(command)
    succeed(*command, cwd=tmp_path)
    mine, expected = Ended(path), whole["train_meta.py"]
    # The final test of the shorter run is in its log; all else is as if two epochs had been asked for at once.
    mine.lines = [line for line in mine.lines if not line.startswith(("epoch 1/1", "test"))]
    expected_lines = [line for line in expected.lines if not line.startswith(("epoch 1/2", "test"))]
    assert mine.lines == expected_lines
    assert all(torch.equal(value, expected.network[key]) for key, value in mine.network.items())
    assert all(torch.equal(a, b) for a, b in zip(mine.momentum, expected.momentum, strict=True))
    done = run("train_pretrain.py", "-resume", path, cwd=tmp_path)
    assert (done.status, "holds a run of train_meta.py, not of train_pretrain.py" in done.err) == (1, True)


def test_other_data_is_refused(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run(*PRETRAIN, *HERE, "-data_dir", folder, cwd=tmp_path).status == 143
    shutil.copytree(folder, tmp_path / "data")
    again = [*PRETRAIN, *HERE, "-data_dir", "data", "-resume"]
    moved = run(*again, "-max_epoch", 3, cwd=tmp_path)
    assert moved.status == 0, moved.err  # the same data in another place
    (tmp_path / "data/train/class0/0000.png").rename(tmp_path / "data/train/class0/9999.png")
    done = run(*again, "-max_epoch", 4, cwd=tmp_path)
    assert (done.status, "its train images have other names or sizes" in done.err) == (1, True)


# --- files of a run ---


def saved_run(path: Path, **flags: object) -> RunFolder:
    """A run of which one epoch is saved, and of which more was logged before it was killed."""
    run = RunFolder(path, flags)
    for epoch in (1, 2):
        run.scalars(epoch, loss=1.0 / epoch)
        run.image("match", np.full((4, 4, 3), epoch, np.uint8), epoch)
        run.record(epoch=epoch)
        run.log(f"epoch {epoch}")
        if epoch == 1:
            run.save_state({"progress": {"epoch": 2}})
    run.writer.close()
    run._lock.close()
    return run


def logged(path: Path) -> tuple[list[tuple[int, float]], list[int], str, list[dict]]:
    """Scalars and pictures in TensorBoard, lines and curves."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tf"), size_guidance={"scalars": 0, "images": 0}, purge_orphaned_data=False)
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("data/loss")]
    pictures = [event.step for event in events.Images("images/match")] if events.Tags()["images"] else []
    return (
        scalars,
        pictures,
        (path / "results.txt").read_text(),
        json.loads((path / "trlog.json").read_text())["epochs"],
    )


def test_logs_are_rolled_back_to_the_saved_state(tmp_path):
    saved_run(tmp_path)
    assert logged(tmp_path) == ([(1, 1.0), (2, 0.5)], [1, 2], "epoch 1\nepoch 2\n", [{"epoch": 1}, {"epoch": 2}])
    (tmp_path / "tf/events.out.tfevents.9.newer").write_bytes(b"written after the state was saved")
    for _ in range(2):  # resumed, killed, and resumed again
        run = RunFolder(tmp_path, {}, resume=True)
        run._lock.close()
    run.scalars(2, loss=0.25)
    run.image("match", np.zeros((4, 4, 3), np.uint8), 2)
    run.writer.close()
    assert logged(tmp_path) == ([(1, 1.0), (2, 0.25)], [1, 2], "epoch 1\n", [{"epoch": 1}])
    assert not (tmp_path / "tf/events.out.tfevents.9.newer").exists()


def test_the_state_does_not_grow_with_the_log(tmp_path):
    run = RunFolder(tmp_path, {})
    sizes = []
    for count in (1, 2000):
        for step in range(count):
            run.scalars(step, loss=0.0)
            append_line(tmp_path / "results.txt", "a line")
        run.save_state({"progress": {"epoch": 1}})
        sizes.append((tmp_path / "last.pth").stat().st_size)
    assert sizes[1] - sizes[0] < 200


def test_logs_that_were_removed_do_not_matter(tmp_path):
    saved_run(tmp_path)
    shutil.rmtree(tmp_path / "tf")
    (tmp_path / "results.txt").unlink()
    (tmp_path / "trlog.json").write_text("{")
    (tmp_path / "images/match/epoch-1 (1).png").write_bytes(b"")
    (tmp_path / "images/epoch-x.png").write_bytes(b"")
    run = RunFolder(tmp_path, {}, resume=True)
    assert run.state == {"progress": {"epoch": 2}}
    assert json.loads((tmp_path / "trlog.json").read_text())["epochs"] == [{"epoch": 1}]
    assert sorted(path.name for path in (tmp_path / "images").rglob("*.png")) == [
        "epoch-1 (1).png",
        "epoch-1.png",
        "epoch-x.png",
    ]


def test_runs_of_the_earlier_format_are_resumed(tmp_path):
    saved_run(tmp_path)
    content = torch.load(tmp_path / "last.pth", weights_only=True)
    log = {"lines": ["epoch 1"], "points": {"data/loss": torch.tensor([[1, 0.5, 7.0]], dtype=torch.float64)}}
    torch.save({"format": 1, "state": content["state"], "curves": content["curves"], **log}, tmp_path / "last.pth")
    run = RunFolder(tmp_path, {}, resume=True)
    run.save_state(run.state)
    run.writer.close()
    assert logged(tmp_path) == ([(1, 0.5)], [], "epoch 1\n", [{"epoch": 1}])
    assert torch.load(tmp_path / "last.pth", weights_only=True)["format"] == 2


GOOD_STATE = {"format": 2, "state": {"progress": {"epoch": 1}}, "curves": {"epochs": []}, "log_sizes": {}}


@pytest.mark.parametrize(
    "content",
    [
        b"cut off",
        b"",
        [1, 2],
        {"format": 0},
        {**GOOD_STATE, "format": 3},
        {**GOOD_STATE, "state": None},
        {**GOOD_STATE, "state": {"progress": 3}},
        {**GOOD_STATE, "curves": []},
        {**GOOD_STATE, "log_sizes": [1]},
        {**GOOD_STATE, "log_sizes": {"results.txt": "long"}},
        {**GOOD_STATE, "format": 1, "lines": 5},
    ],
)
def test_a_state_that_cannot_be_used_is_named(tmp_path, content):
    saved_run(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / "last.pth").write_bytes(content)
    else:
        torch.save(content, tmp_path / "last.pth")
    with pytest.raises(InputError, match=r"last\.pth is not .*state of a run") as error:
        RunFolder(tmp_path, {}, resume=True)
    assert "\n" not in str(error.value)


FLAGS = {"max_epoch": 2, "seed": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the flags of a run from"),
        (b"", "is damaged, or not the flags of a run"),
        (b"\xff\xfe", "is damaged, or not the flags of a run"),
        ([], "is damaged, or not the flags of a run"),
        ({"script": "train_pretrain.py"}, "is damaged, or not the flags of a run"),
        ({"script": 7, "flags": FLAGS}, "is damaged, or not the flags of a run"),
        ({"script": "train_pretrain.py", "flags": [1]}, "is damaged, or not the flags of a run"),
        ({"script": "train_pretrain.py", "flags": {**FLAGS, "seed": "one"}}, "is damaged, or not the flags of a run"),
        ({"script": "train_pretrain.py", "flags": FLAGS, "data": 7}, "is damaged, or not the flags of a run"),
        ({"script": "train_pretrain.py", "flags": {**FLAGS, "way": "x"}}, "has flags that cannot be used|-way"),
        ({"script": "train_pretrain.py", "flags": {**FLAGS, "query": None}}, "has flags that cannot be used|-query"),
        ({"script": "train_pretrain.py", "flags": {**FLAGS, "head": ["a"]}}, "has flags that cannot be used|-head"),
        ({"script": "train_pretrain.py", "flags": {**FLAGS, "save_all": 2}}, "has flags that cannot be used"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(tmp_path, content, message):
    (tmp_path / "last.pth").write_bytes(b"")
    if content is not None:
        (tmp_path / "run.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    done = run("train_pretrain.py", "-resume", tmp_path, cwd=tmp_path)
    assert done.status == 1
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) == 1
    assert all(part in done.err for part in ("run.json", *message.split("|")))


@pytest.mark.parametrize(
    ("name", "value"), [("lr", 0.2), ("gamma", 0.9), ("bs", 3), ("seed", 5), ("temperature", 2), ("max_epoch", 1)]
)
def test_flags_that_decide_the_result_may_not_differ(tmp_path, name, value):
    parser = train_pretrain.build_parser()
    record = {"script": "train_pretrain.py", "flags": vars(parser.parse_args([]))}
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "last.pth").write_bytes(b"")
    with pytest.raises(InputError, match=f"has other flags: -{name} {value}"):
        parse_run(
            "train_pretrain.py", parser, [f"-{name}", str(value), "-resume", str(tmp_path)], lambda args: tmp_path
        )


def test_recorded_flags_are_those_of_the_resumed_run(tmp_path):
    parser = train_pretrain.build_parser()
    flags = ["-way", "3", "-patch_list", "1,4", "-feature_pyramid", "2", "-compile", "-gpu", "0", "-seed", "7"]
    args = parser.parse_args([*flags, "-extra_dir=-x", "-resume"])
    record = {"script": "train_pretrain.py", "flags": {**vars(args), "of_another_version": 5}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "last.pth").write_bytes(b"")
    argv = ["-resume", str(tmp_path), "-gpu", "cpu", "-max_epoch", "500"]
    found, folder, resumes = parse_run("train_pretrain.py", parser, argv, train_pretrain.run_folder)
    assert (folder, resumes) == (tmp_path, True)
    assert vars(found) == {**vars(args), "gpu": "cpu", "max_epoch": 500, "resume": str(tmp_path)}
    assert vars(parser.parse_args([])) == vars(train_pretrain.build_parser().parse_args([]))


# --- what is written ---


def test_results_for_machines(folder, tmp_path):
    done = run(*EVAL, *HERE, "-data_dir", folder, "-json", "-", "-extra_dir", "mine", cwd=tmp_path)
    found = json.loads(done.out)  # and nothing else
    keys = {"accuracy", "interval", "accuracies", "loss", "flags", "versions", "seconds", "weights", "data"}
    assert set(found) == keys | {"encoder", "class_accuracy", "confusion"}
    assert found["weights"] is None
    assert found["flags"]["test_episode"] == len(found["accuracies"]) == 5
    assert found["accuracy"] == pytest.approx(sum(found["accuracies"]) / 5)
    assert json.loads((tmp_path / "checkpoint/eval/mine/results.json").read_text()) == found
    succeed(*EVAL, *HERE, "-data_dir", folder, "-json", "a/b.json", cwd=tmp_path)
    assert json.loads((tmp_path / "a/b.json").read_text())["accuracies"] == found["accuracies"]


def test_what_was_run_on_what(folder, tmp_path):
    succeed(*META, *HERE, "-data_dir", folder, "-extra_dir", "first", cwd=tmp_path)
    path = folder_of(META, tmp_path) / "first"
    described, found = (json.loads((path / name).read_text()) for name in ("run.json", "results.json"))
    assert described["flags"]["val_frequency"] == 2
    assert described["versions"]["torch"] == importlib.metadata.version("torch")
    assert described["device"] == "cpu"
    assert described["data"]["train"]["images"] == 42
    assert described["data"]["train"]["sha256"] != described["data"]["val"]["sha256"]
    assert described["weights"] is None
    assert len(found["weights"]["sha256"]) == 64
    assert len(found["accuracies"]) == 3


def test_a_log_has_lines(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.loading.SECONDS_BETWEEN_LINES", 0.0)
    slow = "-backbone", "resnet12"  # a bar is drawn ten times a second at most
    done = run(*PRETRAIN, *HERE, *slow, "-data_dir", folder, cwd=tmp_path)
    assert "\r" not in done.err + done.out
    assert re.search(r"^epoch 1: 2/3 \[.*loss \d+\.\d+, acc \d+\.\d+ %\]$", done.err, re.M)
    monkeypatch.setattr("engine.loading.SECONDS_BETWEEN_LINES", 60.0)
    done = run(*PRETRAIN, *HERE, "-data_dir", folder, cwd=tmp_path)
    assert done.err == "device: cpu\n"


# --- in processes of their own ---


def test_kill_9_loses_nothing_that_was_saved(whole, folder, tmp_path):
    """With workers, in the first epoch and after it."""
    words = [*META, "-num_workers", "1", "-data_dir", folder, "-save_every", "1", "-resume"]
    path = folder_of(META, tmp_path)
    for moment in ("last.pth", "results.txt"):
        process = start(words, tmp_path)
        wait_for((path / moment).exists, process)
        process.kill()
        assert finish(process).status == -signal.SIGKILL
    succeed(*words, cwd=tmp_path)
    whole["train_meta.py"].check(Ended(path))


def test_a_signal_ends_a_run_in_order(folder, tmp_path):
    words = [*META, "-num_workers", "1", "-data_dir", folder, "-max_epoch", "5000"]
    process = start(words, tmp_path)
    wait_for((folder_of(META, tmp_path) / "results.txt").exists, process)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.status == 128 + signal.SIGINT, done.err
    assert "Traceback" not in done.err
    assert re.search(r"^continue: python train_meta.py .*-resume", done.out, re.M)


def test_two_runs_in_one_folder(folder, tmp_path):
    words = [*META, *HERE, "-data_dir", folder, "-max_epoch", "5000"]
    path = folder_of(META, tmp_path)
    first = start(words, tmp_path)
    wait_for((path / "results.txt").exists, first)
    second = finish(start(words, tmp_path))
    assert second.status == 1
    assert re.search(rf"in use by process {first.pid} on .* \(started .*-extra_dir", second.err)
    assert not (path / "previous-1").exists()
    first.kill()
    finish(first)
    RunFolder(path, {})  # the lock of a process that is gone is no lock
    assert (path / "previous-1/max_acc.pth").exists()


@pytest.fixture
def no_exit(monkeypatch) -> list[int]:
    """The statuses that the process would have ended with at once."""
    ended: list[int] = []
    monkeypatch.setattr(stopping.os, "_exit", ended.append)
    return ended


def test_a_second_signal_stops_at_once(no_exit):
    with stopping.stop_request() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (request.signal_number, no_exit) == (signal.SIGTERM, [])
        os.kill(os.getpid(), signal.SIGUSR1)
    assert no_exit == [128 + signal.SIGUSR1]
    assert request.signal_number == signal.SIGTERM


@pytest.mark.parametrize(("seconds", "ended"), [(0.0, []), (stopping.SECONDS_TO_FORWARD + 1, [128 + signal.SIGTERM])])
def test_a_signal_that_the_launcher_forwards_is_no_second_one(no_exit, environ, monkeypatch, seconds, ended):
    environ.update(TORCHRUN)
    now = time.monotonic()
    with stopping.stop_request() as request:
        request.handle(signal.SIGTERM, None)
        monkeypatch.setattr(stopping.time, "monotonic", lambda: now + seconds)
        request.handle(signal.SIGTERM, None)
    assert no_exit == ended


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_stops_a_run_unless_it_is_ignored(no_exit, number):
    before = signal.getsignal(number)
    try:
        for handler, noted in ((signal.SIG_DFL, number), (signal.SIG_IGN, 0)):
            signal.signal(number, handler)
            with stopping.stop_request() as request:
                os.kill(os.getpid(), number)
                assert request.signal_number == noted
            assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)


# --- ranks ---


def test_shards():
    class Batches:
        def __len__(self):
            return 5

        def __getitem__(self, k):
            return [10 * k + i for i in range(1 if k == 4 else 4)]

        def set_epoch(self, epoch):
            pass

    def shard(rank, size, by_image, first=0):
        found = Shard(Batches(), Ranks(rank, size), by_image=by_image)
        found.set_epoch(1, first)
        return len(found), list(found)

    assert shard(0, 1, True) == (5, [[0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33], [40]])
    assert shard(1, 2, True, 2) == (4, [[21, 23], [31, 33]])  # the last batch has no image for the second rank
    assert shard(1, 2, False) == (5, [[10, 11, 12, 13], [30, 31, 32, 33]])
    assert shard(0, 2, False, 2) == (5, [[20, 21, 22, 23], [40]])


TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
SRUN = {f"SLURM_{name}": value for name, value in {
    "STEP_NUM_TASKS": "7", "PROCID": "5", "LOCALID": "1", "STEP_TASKS_PER_NODE": "2(x2),3", "STEP_NUM_NODES": "3",
    "JOB_ID": "77",
}.items()}  # fmt: skip


@pytest.fixture
def environ(monkeypatch) -> dict[str, str]:
    """An empty environment, as distributed.py sees it."""
    found: dict[str, str] = {}
    monkeypatch.setattr(distributed, "os", argparse.Namespace(environ=found))
    return found


def test_launchers_tell_each_process_its_place(environ, monkeypatch):
    environ.update(TORCHRUN)
    assert distributed.read_launch() == (2, 4, 0, 2, False)
    environ.update(SRUN)  # srun torchrun: torchrun has the last word
    assert distributed.read_launch() == (2, 4, 0, 2, False)
    environ.clear()
    environ.update(SRUN)
    assert distributed.read_launch() == (5, 7, 1, 3, True)

    monkeypatch.setattr(distributed.distributed, "init_process_group", lambda *_, **settings: joined.append(settings))
    joined: list[dict] = []
    monkeypatch.setattr(distributed.atexit, "register", lambda _: None)
    environ["MASTER_ADDR"] = "node1"
    ranks = distributed.join(distributed.read_launch(), torch.device("cpu"))
    assert (ranks.rank, ranks.size, ranks.local_size) == (5, 7, 3)
    assert (joined[0]["rank"], joined[0]["world_size"]) == (5, 7)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("node1", "20077")
    environ.clear()
    environ.update(SRUN, SLURM_STEP_NUM_NODES="1", SLURM_JOB_ID="zz")
    distributed.join(distributed.read_launch(), torch.device("cpu"))
    assert environ["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1"},
        {"RANK": "abc", "LOCAL_RANK": "7"},
        {"WORLD_SIZE": "", "RANK": ""},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0"},  # as some operators start a single process
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"},  # a batch script that srun did not start
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_variables_left_over_from_elsewhere_are_ignored(environ, variables):
    environ.update(variables)
    assert distributed.read_launch() is None


def test_torchrun_with_one_process_is_a_launcher(environ):
    """It forwards signals, whose copies are no second request to stop."""
    environ.update(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    assert distributed.read_launch() == distributed.Launch(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("base", "changed", "found"),
    [
        (TORCHRUN, {"LOCAL_RANK": None}, "no LOCAL_RANK"),
        (TORCHRUN, {"RANK": None, "LOCAL_RANK": None, "LOCAL_WORLD_SIZE": None}, "no RANK, WORLD_SIZE=4"),
        (TORCHRUN, {"RANK": ""}, "RANK="),
        (TORCHRUN, {"RANK": "4"}, "RANK=4"),
        (TORCHRUN, {"RANK": "-1"}, "RANK=-1"),
        (TORCHRUN, {"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc"),
        (TORCHRUN, {"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        (TORCHRUN, {"WORLD_SIZE": "2.5"}, "WORLD_SIZE=2.5"),
        (TORCHRUN, {"LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8"),
        (SRUN, {"SLURM_PROCID": None}, "no SLURM_PROCID"),
        (SRUN, {"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS=many"),
        (SRUN, {"SLURM_STEP_TASKS_PER_NODE": None}, "no SLURM_STEP_TASKS_PER_NODE"),
        (SRUN, {"SLURM_LOCALID": "3"}, "SLURM_STEP_TASKS_PER_NODE=2(x2),3"),
    ],
)
def test_contradictory_launcher_variables_are_reported(environ, base, changed, found):
    environ.update({name: value for name, value in (base | changed).items() if value is not None})
    with pytest.raises(InputError, match=re.escape(found)) as error:
        distributed.read_launch()
    assert "unset" in str(error.value)


def test_processes_that_cannot_find_the_first_are_told_what_is_missing(environ):
    environ.update(TORCHRUN)
    for port in ("", "abc", "99999"):
        environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
        with pytest.raises(InputError, match="MASTER_PORT"):
            distributed.join(distributed.read_launch(), torch.device("cpu"))
    environ.clear()
    environ.update(SRUN)
    with pytest.raises(InputError, match="srun on several nodes: export MASTER_ADDR="):
        distributed.join(distributed.read_launch(), torch.device("cpu"))


def test_a_launcher_in_the_environment_silences_nobody(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    done = run(*EVAL, *HERE, "-data_dir", folder, cwd=tmp_path)
    assert done.err.startswith("device: cpu\nweights: none\n")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run(*EVAL, *HERE, "-data_dir", folder, cwd=tmp_path)
    assert (done.status, len(done.err.splitlines())) == (1, 1)
    assert "RANK=1, WORLD_SIZE=2, no LOCAL_RANK" in done.err
    args = argparse.Namespace(gpu="cpu", seed=1, deterministic=False)
    assert engine.start.start(args, one_process=True)[0].size == 1


@pytest.mark.parametrize(("by_slurm", "gpu", "good"), [(True, None, True), (True, "0", False), (False, None, False)])
def test_a_single_visible_gpu_serves_a_process_that_srun_bound_to_it(environ, monkeypatch, by_slurm, gpu, good):
    environ.update(SRUN)
    if not by_slurm:
        environ.update(TORCHRUN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(engine.start, "choose_device", lambda gpu: (torch.device("cuda", int(gpu)), [int(gpu)]))
    launch = distributed.read_launch()
    if good:
        assert engine.start._device_of_rank(gpu, launch) == torch.device("cuda", 0)
        return
    with pytest.raises(InputError, match=f"{launch.local_size} processes on this machine need as many GPUs"):
        engine.start._device_of_rank(gpu, launch)


def test_evaluation_by_several_processes_is_that_of_one(folder, tmp_path):
    flags = [*HERE, "-data_dir", folder, "-json", "-"]
    alone = json.loads(run(*EVAL, *flags, cwd=tmp_path).out)
    done = finish(start([*EVAL, *flags], tmp_path, *torchrun(3)))
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert found["accuracies"] == alone["accuracies"]
    assert found["accuracy"] == alone["accuracy"]
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_training_by_two_processes(folder, tmp_path, monkeypatch):
    """One step of two tasks: the gradient, which is the momentum, is that of one process."""
    words = [*META[:-4], "-shot", "1", *HERE, "-data_dir", folder, "-max_epoch", "1", "-val_frequency", "1"]
    words = [*words, "-val_episode", "2", "-test_episode", "3", "-deepemd", "fcn"]
    states = []
    for name in ("one", "two"):
        named = [*words, "-extra_dir", name]
        done = run(*named, cwd=tmp_path) if name == "one" else finish(start(named, tmp_path, *torchrun(2)))
        assert done.status == 0, done.err
        assert done.out.count("epoch 1/1") == 1  # the first rank alone prints
        state = torch.load(tmp_path / "checkpoint/folder/fcn/1shot-2way-conv4" / name / "last.pth", weights_only=True)
        states.append(state["state"])
    momenta = [[entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()] for state in states]
    for one, two in zip(*momenta, strict=True):
        assert (one - two).norm() <= 1e-5 * one.norm()
    folders = [tmp_path / "checkpoint/folder/fcn/1shot-2way-conv4" / name for name in ("one", "two")]
    losses = [json.loads((path / "trlog.json").read_text())["epochs"][0]["train_loss"] for path in folders]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    monkeypatch.setattr(train_meta, "start", lambda args: (Ranks(0, 2, 2), torch.device("cpu"), []))
    done = run(*words, "-bs", "3", cwd=tmp_path)
    assert (done.status, "-bs 3 is not a multiple of the 2 processes" in done.err) == (1, True)


def test_the_launcher_is_stopped_and_the_run_goes_on_alone(folder, tmp_path):
    words = [*PRETRAIN, *HERE, "-data_dir", folder, "-max_epoch", "5000"]
    path = folder_of(PRETRAIN, tmp_path)
    process = start(words, tmp_path, *torchrun(2))
    wait_for((path / "results.txt").exists, process)
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert done.status != 0
    assert "continue: python train_pretrain.py" in done.out
    epochs = torch.load(path / "last.pth", weights_only=True)["state"]["progress"]["epoch"]
    assert epochs >= len((path / "results.txt").read_text().splitlines())
    again = start([*words, "-resume"], tmp_path)  # by one process
    lines = len((path / "results.txt").read_text().splitlines())
    wait_for(lambda: len((path / "results.txt").read_text().splitlines()) > lines, again)
    again.send_signal(signal.SIGTERM)
    assert ", resumed" in finish(again).out
    numbers = [int(line.split("/")[0].split()[1]) for line in (path / "results.txt").read_text().splitlines()]
    assert numbers == list(range(1, len(numbers) + 1))  # none twice, none missing


def ranks_meet(rank: int, out: str) -> None:
    """What each of two ranks does for the tests below; what it finds is written to a file."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    from test_training import FailsInBackward, classify, guard_of, loader_of, settings

    ranks, _, _ = engine.start.start(argparse.Namespace(gpu="cpu", seed=1, deterministic=False))
    run = RunFolder(Path(out), {}, writes=False)
    found: dict[str, object] = {"cores": utils.available_cores()}

    torch.manual_seed(rank)
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    network[1].running_mean.fill_(rank + 1.0)
    own = [value.tolist() for value in network.state_dict().values()]
    ranks.copy_from_first(network)
    found["own"], found["copied"] = own, [value.tolist() for value in network.state_dict().values()]

    # Three images: two for the first rank, one for the second. Alone, this rank has all three.
    start = nn.Linear(2, 2)
    ranks.copy_from_first(start)
    for name, who in (("shared", ranks), ("alone", Ranks())):
        network = copy.deepcopy(start)
        guard = guard_of(network, who)
        train_epoch(network, classify(network), loader_of([[0, 1, 5]], who, by_image=True), guard, run, settings())
        found[name] = [*network.weight.flatten().tolist(), *guard.progress.losses, *guard.progress.accuracies]

    network = nn.BatchNorm1d(2)
    loader = loader_of([[0, 2], [10, 12]], ranks)
    train_epoch(network, classify(network), loader, guard_of(network, ranks), run, settings(accumulate=2))
    found["running mean"] = network.running_mean.tolist()

    found["failures"] = []
    for in_backward, accumulate in itertools.product((False, True), (2, 4)):
        network = copy.deepcopy(start)
        guard = guard_of(network, ranks)

        def forward(images, labels, place, network=network, in_backward=in_backward):
            if place[1] == 2 and not in_backward:
                raise ArithmeticError("no solution")
            logits = network(images)
            return FailsInBackward.apply(logits) if place[1] == 2 else logits, labels

        stop, signals = stopping.StopRequest(), []
        stop.signal_number = signal.SIGTERM if rank == 1 else 0
        flags = settings(accumulate=accumulate, skip_on=(ArithmeticError,))
        loader = loader_of([[k, k + 1] for k in range(8)], ranks)
        train_epoch(network, forward, loader, guard, run, flags, stop=stop, after_step=signals.append)
        progress = guard.progress
        found["failures"].append([progress.skipped, len(progress.losses), signals, network.weight.tolist()])
    Path(out, f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    """What two ranks that work together find."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import sys; sys.path[:0] = sys.argv[3:]; import test_runs; test_runs.ranks_meet(int(sys.argv[1]), sys.argv[2])"
    )
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    places = [str(ROOT / name) for name in (".", "tests", "tests/engine")]
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(out), *places], env=environment)
        for rank in range(2)
    ]
    try:
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def test_the_first_rank_gives_the_others_its_weights(two_ranks):
    first, second = two_ranks
    assert first["own"] != second["own"]
    assert first["copied"] == second["copied"] == first["own"]


def test_parts_of_a_batch_weigh_as_many_images_as_they_have(two_ranks):
    for found in two_ranks:
        assert found["shared"] == pytest.approx(found["alone"], rel=1e-6)


def test_running_statistics_are_the_mean_over_the_ranks(two_ranks):
    for found in two_ranks:  # a tenth of the means 1 and 11 of the two batches
        assert found["running mean"] == pytest.approx([0.6, 0.6])


def test_what_one_rank_meets_all_act_on(two_ranks):
    """A task of the second rank has no solution, or no gradient, and it alone is asked to stop."""
    first, second = two_ranks
    assert first["failures"] == second["failures"]
    for (skipped, losses, signals, _), accumulate in zip(first["failures"], (2, 4, 2, 4), strict=True):
        assert (skipped, losses) == (1, 8 - accumulate)
        assert signals == [signal.SIGTERM] * (8 // accumulate)


def test_ranks_share_the_cores_of_their_machine(two_ranks):
    assert two_ranks[0]["cores"] == two_ranks[1]["cores"] == max(1, utils.available_cores() // 2)


def test_ranks_share_the_memory_of_their_machine(monkeypatch):
    monkeypatch.setattr(cache, "free_memory", lambda device: 8000)
    data = argparse.Namespace(view=argparse.Namespace(is_random=False, patches=1))
    rooms = [
        Evaluator(
            data, way=2, shot=1, device=torch.device("cpu"), seed=1, keep_pixels=True, ranks=Ranks(0, size, size)
        ).pixels.room
        for size in (1, 4)
    ]
    assert rooms[0] == 4 * rooms[1] > 0


def test_a_rank_that_dies_takes_the_run_down(folder, tmp_path):
    words = [*PRETRAIN, *HERE, "-data_dir", folder, "-max_epoch", "5000"]
    process = start(words, tmp_path, *torchrun(2))
    wait_for((folder_of(PRETRAIN, tmp_path) / "results.txt").exists, process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    began = time.monotonic()
    os.kill(int(children[-1]), signal.SIGKILL)
    done = finish(process)
    assert done.status != 0
    assert time.monotonic() - began < 60
    assert "Signal 9 (SIGKILL)" in done.err


def test_the_command_that_resumes_repeats_what_was_given():
    """Also at its default, which a checkpoint's own flags would replace; and the seed that was drawn."""
    args = argparse.Namespace(seed=7)
    given = ["-image_size", "84", "-seed", "0"]
    command = resume_command("eval.py", given, args)
    assert command == "python eval.py -image_size 84 -seed 0 -seed 7 -resume"
    assert resume_command("eval.py", shlex.split(command)[2:], args) == command
