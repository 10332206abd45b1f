"""Devices, seeds, figures, the run folder, how a script ends."""

import errno
import json
import os
import stat
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import utils
from engine.arguments import folder_name
from engine.command_line import make_parser
from engine.run import RunFolder
from engine.start import choose_device, choose_seed, set_seed
from Models.emd import SolverError
from utils import (
    InputError,
    append_line,
    available_cores,
    check_writable,
    mean_confidence_interval,
    named_generator,
    number_at_least,
    number_between,
    printable,
    read_json,
    run_script,
    status,
    warn,
    whole_numbers,
    write_atomically,
    write_output,
)


def test_interval():
    values = [20.0, 40.0, 60.0, 80.0]
    mean, half_width = mean_confidence_interval(values)
    assert mean == 50
    assert half_width == pytest.approx(1.96 * np.std(values) / 2)
    with pytest.raises(ValueError, match="at least one"):
        mean_confidence_interval([])


def test_devices(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("cpu") == (torch.device("cpu"), [])
    assert capsys.readouterr().err == "device: cpu\n"
    assert choose_device(None) == (torch.device("cpu"), [])
    assert capsys.readouterr().err == "device: cpu (no CUDA device found)\n"
    for gpu, message in (
        ("0", "there is no GPU 0.*here: none"),
        ("0;1", "is neither GPU numbers"),
        ("-1", "is neither GPU"),
    ):
        with pytest.raises(InputError, match=message):
            choose_device(gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Imagined")
    # One GPU unless more are named: an episode cut in two has batch statistics of half as many images.
    assert choose_device(None) == (torch.device("cuda", 0), [0])
    assert capsys.readouterr().err == "device: cuda 0, Imagined (2 found; -gpu 0,1 spreads over two)\n"
    assert choose_device("1") == (torch.device("cuda", 1), [1])
    assert choose_device("0,1,0") == (torch.device("cuda", 0), [0, 1])
    with pytest.raises(InputError, match="there is no GPU 2; CUDA devices here: 0 to 1"):
        choose_device("0,2")


def test_cores_are_those_of_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert available_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert available_cores() == 6


def test_seeds(capsys):
    set_seed(4)
    first = torch.rand(1)
    set_seed(4)
    assert torch.equal(torch.rand(1), first)
    assert choose_seed(4) == 4
    assert capsys.readouterr().err == ""
    drawn = choose_seed(0)
    assert capsys.readouterr().err == f"seed: {drawn}\n"
    assert drawn not in (0, choose_seed(0))
    draws = [
        torch.rand(1, generator=named_generator(*name)).item() for name in ((1, "a"), (1, "b"), (2, "a"), (1, "a"))
    ]
    assert draws[0] == draws[3]
    assert len(set(draws)) == 3
    set_seed(2**63 - 1)


def test_the_seed_does_not_choose_the_kernels():
    cudnn = torch.backends.cudnn
    for seed in (1, 2):
        for deterministic in (True, False):
            set_seed(seed, deterministic=deterministic)
            assert (cudnn.deterministic, cudnn.benchmark) == (deterministic, not deterministic)
            assert torch.are_deterministic_algorithms_enabled() == deterministic


# --- flags ---


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (number_at_least(0, int), "-1", "'-1' is not a whole number from 0 to 1000000000"),
        (number_at_least(1, int), "1.5", "whole number"),
        (number_at_least(1e-12, float), "inf", "is not a number from 1e-12 to 1000000.0"),
        (number_between(0, 9, int), "10", "is not a whole number from 0 to 9"),
        (number_between(0, 9, int), "9" * 5000, "is not a whole number from 0 to 9"),
        (whole_numbers, "2,,3", "as in 2,3"),
        (whole_numbers, "9" * 5000, "as in 2,3"),
        (folder_name, "../x", "name of a folder"),
        (folder_name, "/x", "name of a folder"),
    ],
)
def test_bad_values_of_flags(kind, text, message):
    import argparse

    with pytest.raises(argparse.ArgumentTypeError, match=message):
        kind(text)


def test_good_values_of_flags():
    assert number_between(0, 9, int)("9") == 9
    assert number_at_least(0, float)("1e-6") == 1e-6
    assert whole_numbers("5,3,2") == (5, 3, 2)
    assert folder_name("a/b") == "a/b"


# --- the end of a script ---

FROM_A_WORKER = """Caught InputError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "x"
utils.InputError: no image at a
b.png"""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("expected this"), "error: expected this\n"),
        (SolverError("problem 3 of 4"), "error: problem 3 of 4\n"),
        (PermissionError(13, "Permission denied", "data/a"), "error: [Errno 13] Permission denied: 'data/a'\n"),
        (InputError("no image at a\nb.png"), "error: no image at a b.png\n"),
        (InputError(FROM_A_WORKER), "error: no image at a b.png\n"),
        (InputError("a name from a stranger: \x1b[31m\u202e"), "error: a name from a stranger: ?[31m?\n"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "error: out of GPU memory (CUDA out of memory.). Use "),
        (MemoryError("Unable to allocate 9 TiB"), "error: out of memory (Unable to allocate 9 TiB). Use a smaller"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: out of memory (DefaultCPUAllocator"),
    ],
)
def test_errors_of_the_users_making_are_one_line(error, message, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 1
    found = capsys.readouterr().err
    assert found.startswith(message)
    assert found.count("\n") == 1


def test_errors_of_ours_are_not_hidden():
    def main():
        raise KeyError("a mistake in the code")

    with pytest.raises(KeyError):
        run_script(main)


def test_a_name_in_another_encoding_is_printed(capsys):
    run_script(lambda: print("caf\udce9.jpg"))
    assert capsys.readouterr().out == "caf\\udce9.jpg\n"


# --- the run folder ---


def test_run_folder_keeps_what_was_there(tmp_path, capsys):
    for number in range(2):
        run = RunFolder(tmp_path / "run", {"lr": 0.1})
        run.save_weights("max_acc.pth", {"w": torch.full((1,), float(number))})
        run.log(f"line {number}")
        run.record(epoch=1, val_acc=50.0)
        run.finish(test_acc=51.0)
    assert torch.load(tmp_path / "run" / "previous-1" / "max_acc.pth", weights_only=True)["params"]["w"].item() == 0
    assert torch.load(tmp_path / "run" / "max_acc.pth", weights_only=True)["params"]["w"].item() == 1
    assert (tmp_path / "run" / "results.txt").read_text() == "line 1\n"
    assert json.loads((tmp_path / "run" / "trlog.json").read_text()) == {
        "args": {"lr": 0.1},
        "epochs": [{"epoch": 1, "val_acc": 50.0}],
        "test_acc": 51.0,
    }
    assert not list(tmp_path.rglob("*.part"))
    assert f"run folder: {tmp_path / 'run'}" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the run to"):
        RunFolder(tmp_path / "file" / "run", {})


def test_a_disk_that_fills_up_costs_nothing_that_was_saved(tmp_path, monkeypatch):
    os.umask(umask := os.umask(0))
    run = RunFolder(tmp_path / "run", {})
    run.save_weights("max_acc.pth", {"w": torch.zeros(1)})
    path = run.path / "max_acc.pth"
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(utils.os, "fsync", full)
    with pytest.raises(InputError, match="cannot write .*max_acc.pth .No space left.*was saved before is intact$"):
        run.save_weights("max_acc.pth", {"w": torch.ones(1000)})
    assert path.read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))


def test_append_line(tmp_path):
    append_line(tmp_path / "a" / "results.txt")
    assert (tmp_path / "a" / "results.txt").read_text() == ""
    append_line(tmp_path / "a" / "results.txt", "one")
    append_line(tmp_path / "a" / "results.txt", "two")
    assert (tmp_path / "a" / "results.txt").read_text() == "one\ntwo\n"
    with pytest.raises(InputError, match="cannot write .*results.txt"):
        append_line(tmp_path / "a" / "results.txt" / "results.txt", "three")


# --- files that the user named ---


def test_an_output_replaces_the_file_behind_a_link_and_keeps_its_mode(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to("../real")
    write_output(tmp_path / "folder" / "link", b"new")
    assert (tmp_path / "folder" / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o600
    (tmp_path / "dangling").symlink_to("made")
    check_writable(tmp_path / "dangling")
    write_output(tmp_path / "dangling", b"new")
    assert (tmp_path / "made").read_bytes() == b"new"
    assert not list(tmp_path.rglob("*.part"))


def test_names_of_one_file_stay_names_of_one_file(tmp_path):
    (tmp_path / "one").write_text("old")
    os.link(tmp_path / "one", tmp_path / "other")
    write_output(tmp_path / "other", b"new")
    assert (tmp_path / "one").read_bytes() == b"new"


@pytest.mark.parametrize("write", [write_output, write_atomically])
def test_devices_are_written_to_and_stay_devices(tmp_path, write):
    master, slave = os.openpty()  # a device that nobody misses if it is replaced
    (tmp_path / "link").symlink_to(os.ttyname(slave))
    check_writable(tmp_path / "link")
    write(tmp_path / "link", b"content")
    assert os.read(master, 100) == b"content"
    assert stat.S_ISCHR((tmp_path / "link").stat().st_mode)


def test_a_pipe_is_written_once_and_read_whole(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    check_writable(tmp_path / "pipe")  # a reader would take an open and close for the whole content
    write_output(tmp_path / "pipe", b"content")
    reader.join(10)
    assert read == [b"content"]
    end, start = os.pipe()
    check_writable(Path(f"/dev/fd/{start}"))  # what >(...) is in a shell
    write_output(Path(f"/dev/fd/{start}"), b"content")
    assert os.read(end, 100) == b"content"


def test_what_cannot_be_written_is_reported_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "below", tmp_path / ("n" * 300)):
        with pytest.raises(InputError, match="cannot write"):
            check_writable(path)
    path = tmp_path / ("\u6f22" * 85)  # all 255 bytes: the partial file beside it has a name of its own
    write_output(path, b"new")
    assert path.read_bytes() == b"new"


# --- files of ours ---


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": 1}', b"[" * 100_000, b"null"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="run.json is damaged, or not the flags of a run"):
        read_json(path, "the flags of a run", lambda found: found["flags"])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot read the flags of a run from .*run.json .No such file"):
        read_json(tmp_path / "run.json", "the flags of a run")
    (tmp_path / "run.json").write_text('{"flags": {"way": 5}}')
    assert read_json(tmp_path / "run.json", "the flags of a run", lambda found: found["flags"]) == {"way": 5}


# --- names ---


def test_a_printable_name_is_one_line_that_can_be_encoded():
    assert printable("a\nb\x1b[31m\udce9 \u200f\u8c93 $x$") == "a?b?[31m? ?\u8c93 $x$"


# --- processes ---


def test_only_the_first_process_of_a_run_reports(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")  # what a launcher left in the environment decides nothing
    status("one")
    monkeypatch.setattr(utils.process, "rank", 1)
    status("two")
    warn("three")
    assert capsys.readouterr().err == "one\n"


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(utils.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(utils.process, "local_size", 4)
    assert available_cores() == 2
    monkeypatch.setattr(utils.process, "local_size", 16)
    assert available_cores() == 1


# --- flags ---


@pytest.mark.parametrize("given", ["-k 5", "-ks 5", "-kshot2 5", "--kshot 5", "-k=5"])
def test_flags_are_not_abbreviated(given, capsys):
    parser = make_parser("a script")
    parser.add_argument("-kshot", type=int)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(given.split())
    assert end.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err
    assert parser.parse_args(["-kshot", "-5"]).kshot == -5
    assert parser.parse_args(["-kshot=5"]).kshot == 5


def test_files_in_shared_memory_are_replaced():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:  # below /dev, and as ordinary as any
        for content in (b"old and longer", b"new"):
            write_atomically(Path(folder, "file"), content)
        assert Path(folder, "file").read_bytes() == b"new"


def test_defaults_that_depend_on_other_flags_are_filled_in_for_commands_too(capsys):
    def complete(parsed):
        parsed.width = 2 * parsed.height if parsed.width is None else parsed.width
        if parsed.width < parsed.height:
            raise InputError("-width is less than -height")

    parser = make_parser("a script")
    command = parser.add_subparsers(dest="command").add_parser("draw")
    for name in ("-height", "-width"):
        command.add_argument(name, type=int, default=3 if name == "-height" else None)
    command.completions.append(complete)
    assert parser.parse_args(["draw"]).width == 6
    assert parser.parse_args(["draw", "-height", "5"]).width == 10
    assert parser.parse_args(["draw", "-width", "4"]).width == 4
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["draw", "-width", "1"])
    assert end.value.code == 2
    assert "draw: -width is less than -height" in capsys.readouterr().err
