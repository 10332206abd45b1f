"""What several test files share: golden files, formula weights, images, and scripts run in this process or their own."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from utils import run_script, write_json

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
# Names that files and classes may have.
ODD_NAMES = [
    *("caf\udce9", "$x_1$ and 5$ {\\frac", "two\nlines\tand \x1b[31m"),  # the first is not UTF-8
    *("\u732b \u72ac", "\u202eabc\u05d0\u05d1 \u0642\u0637", "\U0001f408"),  # cat and dog; right to left
    *("x" * 300, "", " "),
]


def golden(name: str) -> dict[str, Tensor]:
    """A golden file as tensors (strings stay numpy arrays)."""
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return {
            key: torch.from_numpy(np.asarray(archive[key])) if archive[key].dtype.kind in "fiu" else archive[key]
            for key in archive.files
        }


def formula_weights(encoder: nn.Module, seed: int) -> None:
    """Fill a ResNet-12 by the formula of golden/README.md."""
    random = np.random.RandomState(seed)
    state = encoder.state_dict()
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros_like(value)
            continue
        draw = torch.from_numpy(random.standard_normal(tuple(value.shape)).astype(np.float32))
        if value.dim() == 4:
            out_channels, _, height, width = value.shape
            draw = draw * (2 / (out_channels * height * width)) ** 0.5
        elif key.endswith("running_var"):
            draw = torch.exp(0.1 * draw)
        elif key.endswith("weight"):
            draw = 1 + 0.1 * draw
        else:
            draw = 0.1 * draw
        state[key] = draw
    encoder.load_state_dict(state)


def normal_images(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def write_images(folder: Path, count: int, *, seed: int = 0, size: int = 20, suffix: str = ".png") -> list[str]:
    """Random colour images of one tint; returns their names."""
    random = np.random.RandomState(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tint = random.randint(0, 200, 3)
    names = [f"{number:04d}{suffix}" for number in range(count)]
    for name in names:
        noise = random.randint(0, 55, (size, size, 3))
        Image.fromarray((tint + noise).astype(np.uint8)).save(folder / name)
    return names


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


def run(script: str, *flags: object, cwd: Path) -> Outcome:
    """A script as its own process would run it, in this one."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    before, argv = Path.cwd(), sys.argv
    os.chdir(cwd)
    sys.argv = [script]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main = importlib.import_module(script.removesuffix(".py")).main
            run_script(lambda: main([str(flag) for flag in flags]))
    except SystemExit as end:
        status = end.code
    finally:
        os.chdir(before)
        sys.argv = argv
    return Outcome(status, out.getvalue(), err.getvalue())


def succeed(script: str, *flags: object, cwd: Path) -> str:
    done = run(script, *flags, cwd=cwd)
    assert done.status == 0, done.err
    return done.out


def start(words: list[object], cwd: Path, *launcher: object) -> subprocess.Popen:
    command = [*map(str, launcher), str(ROOT / words[0]), *map(str, words[1:])]
    command = command if launcher else [sys.executable, *command]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> Outcome:
    out, err = process.communicate(timeout=240)
    return Outcome(process.returncode, out, err)


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def torchrun(count: int) -> list[object]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]


def write_run(folder: Path, epochs: int, **more) -> Path:
    """The folder of a run with a trlog.json of that many epochs."""
    names = ("epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_interval")
    rows = [dict(zip(names, (k, 2 / k, 10 * k, 1 / k, 20 + k, 2.0), strict=True)) for k in range(1, epochs + 1)]
    write_json(folder / "trlog.json", {"args": {}, "epochs": rows, **more})
    return folder


def write_evaluation(path: Path, accuracies, *, data=None, **flags) -> Path:
    """The results.json of an evaluation."""
    same = {"dataset": "glyphs", "set": "test", "way": 5, "shot": 1, "query": 5, "seed": 1, "verify_images": False}
    write_json(path, {"accuracies": [float(value) for value in accuracies], "flags": same | flags, "data": data})
    return path
