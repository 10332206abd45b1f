"""The bookkeeping of a run: flags common to all scripts, seed, device, run folder, checkpoint, log, interval."""

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BEST_WEIGHTS = "max_acc.pth"


class InputError(ValueError):
    """Something the user gave is not as expected. The message is one line: what was expected, what came, what to do."""


# --- Command line -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} -h)\n")


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser that answers bad flags with one line and exit status 2."""
    return _Parser(description=description, allow_abbrev=False)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that :func:`choose_device`, :func:`set_seed` and :class:`RunFolder` read."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "-gpu", help='GPUs to use, as in 0 or 0,1,2,3, or "cpu" (default: all GPUs there are, else the CPU)'
    )
    group.add_argument(
        "-seed",
        type=number_at_least(0, int),
        default=1,
        help="0 draws a seed and lets cuDNN choose the fastest kernels (default: %(default)s)",
    )
    group.add_argument(
        "-extra_dir",
        default="",
        help="a further folder below the run folder, to keep runs apart; eval.py then adds its result to "
        "checkpoint/eval/<extra_dir>/results.txt",
    )


def number_at_least(minimum: float, kind: type) -> Callable[[str], Any]:
    """An argparse type: ``int`` or ``float``, finite and not below ``minimum``."""
    return _number(kind, lambda value: value >= minimum, f"of {minimum} or more")


def number_above_zero(kind: type) -> Callable[[str], Any]:
    """An argparse type: ``int`` or ``float``, finite and positive."""
    return _number(kind, lambda value: value > 0, "above 0")


def _number(kind: type, is_good: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and is_good(value)):
            raise argparse.ArgumentTypeError(f"expected a {'whole ' if kind is int else ''}number {what}; got {text!r}")
        return value

    return parse


def whole_numbers(text: str) -> tuple[int, ...]:
    """An argparse type: ``"2,3"`` to ``(2, 3)``."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text.strip()):
        raise argparse.ArgumentTypeError(f"expected whole numbers above 0 joined by commas, as in 2,3; got {text!r}")
    return tuple(int(part) for part in text.split(","))


def next_command(
    script: str, parser: argparse.ArgumentParser, args: argparse.Namespace, keep: Sequence[str], **more: Any
) -> str:
    """The command line of the next stage: the flags in ``keep`` that are not at their default, and ``more``."""
    words = ["python", script]
    changed = {name: getattr(args, name) for name in keep if getattr(args, name) != parser.get_default(name)}
    for name, value in {**changed, **more}.items():
        words += (
            [f"-{name}"]
            if value is True
            else [f"-{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
        )
    return shlex.join(words)


def run_script(main: Callable[[], None], *expected: type[Exception]) -> None:
    """Run a script's ``main``; errors of the user's making end it with one line and exit status 1."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; what was saved stays saved", file=sys.stderr)
        sys.exit(130)
    except (InputError, *expected) as error:
        # A loader worker or a replica hands its error on with its traceback in the message; the last line is the error.
        last_line = str(error).strip().splitlines()[-1]
        print(f"error: {re.sub(r'^[A-Za-z_.]+Error: ', '', last_line)}", file=sys.stderr)
        sys.exit(1)


# --- Seed and device --------------------------------------------------------------------------------------------------


def set_seed(seed: int) -> int:
    """Seed everything; 0 draws a seed and turns cuDNN's autotuning on. Returns the seed in force."""
    torch.backends.cudnn.benchmark = seed == 0
    torch.backends.cudnn.deterministic = seed != 0
    if seed == 0:
        seed = int.from_bytes(os.urandom(4), "big") or 1
        print(f"seed: {seed}")
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - for libraries that draw from numpy's global generator
    return seed


def named_generator(seed: int, *name: str | int) -> torch.Generator:
    """The CPU generator of one kind of draw, so that kinds do not disturb each other."""
    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def choose_device(gpu: str | None) -> tuple[torch.device, list[int]]:
    """``-gpu`` to the main device and the CUDA ids to spread over; none on the CPU.

    Raises:
        InputError: an id that this machine does not have.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is None:
        if not count:
            print("no CUDA device found: running on the CPU", file=sys.stderr)
        ids = list(range(count))
    elif gpu.strip().lower() == "cpu":
        ids = []
    elif re.fullmatch(r"\d+(,\d+)*", gpu.strip()):
        ids = list(dict.fromkeys(int(part) for part in gpu.split(",")))
        missing = [number for number in ids if number >= count]
        if missing:
            there = f"0 to {count - 1}" if count > 1 else "only 0" if count else "none"
            raise InputError(
                f"-gpu {gpu}: there is no GPU {missing[0]}; CUDA devices here: {there}. Leave -gpu out, or give -gpu cpu"
            )
    else:
        raise InputError(f'-gpu {gpu}: expected GPU numbers joined by commas, as in 0,1, or "cpu"')
    if not ids:
        return torch.device("cpu"), []
    torch.cuda.set_device(ids[0])
    return torch.device("cuda", ids[0]), ids


# --- Run folder -------------------------------------------------------------------------------------------------------


class RunFolder:
    """The folder of a run: ``results.txt``, ``trlog.json``, TensorBoard scalars under ``tf/``, weights.

    What an earlier run left in the same folder is moved to ``previous-<n>/`` inside it, so nothing is lost.
    """

    def __init__(self, path: str | Path, args: argparse.Namespace) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: it takes seconds to import

        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._move_earlier_run()
            self.writer = SummaryWriter(str(self.path / "tf"))
        except OSError as error:
            raise InputError(f"expected to write the run to {path}; it cannot be written ({error})") from error
        self.curves: dict[str, Any] = {"args": vars(args), "epochs": []}

    def _move_earlier_run(self) -> None:
        mine = [self.path / name for name in ("results.txt", "trlog.json", "tf", BEST_WEIGHTS)]
        earlier = [path for path in (*mine, *self.path.glob("epoch-*.pth")) if path.exists()]
        if not earlier:
            return
        number = 1
        while (self.path / f"previous-{number}").exists():
            number += 1
        aside = self.path / f"previous-{number}"
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
        print(f"moved the earlier run in {self.path} to {aside}")

    def log(self, line: str) -> None:
        """Print a line, and add it to ``results.txt``."""
        print(line)
        append_line(self.path / "results.txt", line)

    def scalars(self, step: int, **values: float) -> None:
        """Send scalars to TensorBoard, as ``data/<name>``."""
        for name, value in values.items():
            self.writer.add_scalar(f"data/{name}", value, step)

    def record(self, **values: Any) -> None:
        """Add one epoch to ``trlog.json``."""
        self.curves["epochs"].append(values)
        self._write_curves()

    def finish(self, **values: Any) -> None:
        """Add what is said once per run to ``trlog.json``, and close the log."""
        self.curves.update(values)
        self._write_curves()
        self.writer.close()

    def _write_curves(self) -> None:
        _write_atomically(self.path / "trlog.json", lambda file: file.write_text(json.dumps(self.curves, indent=1)))

    def save_weights(self, name: str, state: dict[str, Tensor]) -> Path:
        """Write ``{"params": state}``, as the published checkpoints have it."""
        params = {key: value.detach().cpu() for key, value in state.items()}
        _write_atomically(self.path / name, lambda file: torch.save({"params": params}, file))
        return self.path / name


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file, made with its folder where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    # A reader sees the old file or the new one, whenever the run is killed.
    partial = path.with_name(path.name + ".part")
    write(partial)
    os.replace(partial, path)


# --- Checkpoints ------------------------------------------------------------------------------------------------------

# Keys that a checkpoint may have or lack without being of another network: the pre-training classifier, and counters
# that no computation reads.
_IGNORED_KEYS = re.compile(r"^(fc|classifier)\.|\.num_batches_tracked$")


def load_encoder_weights(model: nn.Module, path: str | Path) -> None:
    """Load an encoder from any of the published checkpoint formats.

    Args:
        model: a module whose ``encoder`` is to be filled, or an encoder itself.
        path: a file ``{"params": state_dict}``: keys of the encoder as they are (pre-trained), or behind ``encoder.`` or
            ``module.encoder.`` (meta-trained). A folder stands for the ``max_acc.pth`` in it.

    Raises:
        InputError: no such file, no such format, or the weights of another architecture.
    """
    encoder = getattr(model, "encoder", model)
    path = Path(path)
    if path.is_dir():
        path = path / BEST_WEIGHTS
    if not path.is_file():
        raise InputError(f"expected a checkpoint in {path}; there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is no checkpoint makes the unpickler say
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"expected a checkpoint in {path}; it cannot be read as plain tensors ({reason})") from error
    if not isinstance(content, dict) or not isinstance(content.get("params"), dict):
        raise InputError(f'expected {{"params": state_dict}} in {path}; got {_describe(content)}')
    given = {re.sub(r"^(module\.)?(encoder\.(module\.)?)?", "", key): value for key, value in content["params"].items()}

    wanted = encoder.state_dict()
    missing = [key for key in wanted if key not in given and not _IGNORED_KEYS.search(key)]
    unexpected = [key for key in given if key not in wanted and not _IGNORED_KEYS.search(key)]
    misshapen = [key for key in wanted if key in given and given[key].shape != wanted[key].shape]
    if missing or unexpected or misshapen:
        faults = [f"lacks {_some(missing)}"] if missing else []
        faults += [f"has unknown {_some(unexpected)}"] if unexpected else []
        faults += [
            f"has {key} {tuple(given[key].shape)} where {tuple(wanted[key].shape)} is expected" for key in misshapen[:1]
        ]
        raise InputError(f"expected the weights of {type(encoder).__name__} in {path}; it {'; '.join(faults)}")
    encoder.load_state_dict({key: given.get(key, value) for key, value in wanted.items()})


def _describe(content: Any) -> str:
    return (
        f"a dict with the keys {_some(list(content))}" if isinstance(content, dict) else f"a {type(content).__name__}"
    )


def _some(names: Sequence[Any]) -> str:
    shown = ", ".join(map(str, names[:3])) or "none"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --- Figures ----------------------------------------------------------------------------------------------------------


def mean_confidence_interval(accuracies: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval, ``1.96 std / sqrt(n)`` with the population std, in the unit given."""
    values = np.asarray(accuracies, dtype=np.float64)
    if not len(values):
        raise ValueError("expected at least one accuracy; got none")
    return float(values.mean()), float(1.96 * values.std() / math.sqrt(len(values)))


class Stopwatch:
    """Wall-clock time since it was made, in words."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __str__(self) -> str:
        seconds = time.monotonic() - self.start
        if seconds < 120:
            return f"{seconds:.0f} s"
        return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
