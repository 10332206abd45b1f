"""What every script needs: messages, the command line, files, draws, and numbers."""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import hashlib
import io
import json
import math
import os
import re
import signal
import stat
import sys
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch

BEST_WEIGHTS = "max_acc.pth"
RECORD = "run.json"
STATISTICS_FILE = "base_statistics.npz"  # of training nodes, beside the weights
T = TypeVar("T")


class InputError(ValueError):
    """Invalid input from the user. The message is one line: what was found, what is needed, how to fix it."""

    is_user_error = True  # run_script prints errors with this attribute as one line


MOST_NODES = 400


def check_node_count(nodes: int, advice: str = "") -> None:
    """Raise InputError if an image has so many nodes that its match takes a second, and an episode's a gigabyte."""
    if nodes > MOST_NODES:
        advice = f"Pool the map with -map_size, as in -map_size 5{advice}"
        raise InputError(f"{nodes} nodes of an image are too many to match; at most {MOST_NODES} are allowed. {advice}")


# --- Scripts ----------------------------------------------------------------------------------------------------------


def number_at_least(minimum: float, kind: type) -> Callable[[str], Any]:
    """An argparse type: ``int`` or ``float`` from ``minimum`` to a billion or a million, which no experiment exceeds."""
    return number_between(minimum, 10**9 if kind is int else 1e6, kind)


def number_between(minimum: float, maximum: float, kind: type) -> Callable[[str], Any]:
    """An argparse type: ``int`` or ``float``, finite and from ``minimum`` to ``maximum``."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if math.isfinite(value) and minimum <= value <= maximum:
                return value
        wanted = f"a {'whole ' * (kind is int)}number from {minimum} to {maximum}"
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {wanted}")

    return parse


def whole_numbers(text: str) -> tuple[int, ...]:
    """An argparse type: ``"2,3"`` to ``(2, 3)``."""
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers above 0 joined by commas, as in 2,3")
    return tuple(int(part) for part in text.split(","))


def run_script(main: Callable[[], None]) -> None:
    """Run a script's ``main``; user errors are printed as one line, with exit status 1."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # so that torchrun shows the error of the process that failed first
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be in another encoding; stderr does the same
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as scripts set it while they import
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted; files saved so far are kept", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of standard output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        message = _user_message(error)
        if message is None:
            raise
        if exit_status := getattr(error, "exit_status", None):  # of exceptions that are not errors
            status(message)
            sys.exit(exit_status)
        print(f"error: {printable(message)}", file=sys.stderr)
        sys.exit(1)


def _user_message(error: Exception) -> str | None:
    """One line for errors that the user can do something about, None for others."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, torch.OutOfMemoryError):
        advice = (
            "Use a smaller -query or -episode_batch, fewer patches, -checkpoint_activations, or more GPUs (-gpu 0,1)"
        )
        return f"out of GPU memory ({lines[0]}). {advice}"
    if isinstance(error, MemoryError) or re.search(r"can't allocate memory|bad_alloc", str(error)):
        return f"out of memory ({lines[0]}). Use a smaller -query, -episode_batch or -image_size, or fewer patches"
    if process.size > 1 and re.search("gloo|NCCL|Connection (closed|reset)", str(error)):
        return f"another process of the run was lost ({lines[0]})"
    if not (getattr(error, "is_user_error", False) or isinstance(error, OSError)):
        return None
    if "Traceback (most recent call last)" in str(error):  # from a loader's worker; the message comes last
        lines = re.split(r"^[\w.]+(?:Error|Exception): ", str(error).strip(), flags=re.MULTILINE)[-1].splitlines()
    return " ".join(lines)


def warn(message: str) -> None:
    """Print a warning, as :func:`status` does."""
    status(f"warning: {message}")


def status(message: str) -> None:
    """Print a line on standard error; of the processes of a run, the first does."""
    if process.rank == 0:
        print(printable(message), file=sys.stderr, flush=True)


# This process among those of a run, of which ``local_size`` share this machine; engine.start sets it.
process = SimpleNamespace(rank=0, size=1, local_size=1)


def available_cores() -> int:
    """The cores that this process may use: its share of those of the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // process.local_size)


def named_generator(seed: int, *name: str | int) -> torch.Generator:
    """A CPU generator for one draw, which depends on the seed and the name and on nothing drawn before."""
    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# --- Files ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path, more: str = "") -> Iterator[None]:
    """Create the folder of a file, and turn an OSError into a sentence about the file."""
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, f"{path.parent} is a file, not a folder") from error
        yield
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}){more}") from error


def append_line(path: Path, line: str | None = None) -> None:
    """Add a line to a text file, creating it and its folder; without a line, only check that this is possible."""
    with writing(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        if line is not None:
            file.write(line + "\n")


def check_writable(path: Path) -> None:
    """Raise InputError unless :func:`write_output` can write there; opens nothing that another process reads."""
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if not path.exists():
            tempfile.TemporaryFile(dir=Path(os.path.realpath(path)).parent).close()
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "permission denied")


def write_json(path: Path, content: Any) -> None:
    """Write one of our JSON files atomically."""
    write_atomically(path, json.dumps(content, indent=1).encode())


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table that the user named; None becomes an empty field."""
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_output(path, table.getvalue().encode(errors="backslashreplace"))


def save_plain(path: Path, content: Any) -> None:
    """Write tensors and plain values with torch.save, atomically."""
    buffer = io.BytesIO()  # torch's own file writer leaves a full disk to a long RuntimeError
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def write_output(path: Path, content: bytes | memoryview) -> None:
    """Write a file that the user named: as :func:`write_atomically`, but several hard links to a file stay one file."""
    if path.is_file() and path.stat().st_nlink > 1:
        with writing(path):
            path.write_bytes(content)
    else:
        write_atomically(path, content)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that a reader sees the old content or the new one, whenever the process is killed or power is lost.

    Its folder is created, links are followed, and an existing file keeps its mode. Devices and pipes are opened and written.
    InputError if it cannot be written; what was there before is intact.
    """
    real = Path(os.path.realpath(path))
    partial = real.with_name(f"{uuid.uuid4().hex}.part")
    with writing(path, "; what was saved before is intact"):
        before = os.stat(path) if path.exists() else None
        is_open = os.path.abspath(path).startswith(("/dev/fd/", "/dev/std", "/proc/"))  # by this process or its shell
        if before and (is_open or not stat.S_ISREG(before.st_mode)):
            with open(path, "ab") as file:
                file.write(content)
            return
        try:
            with open(partial, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if before:
                os.chmod(partial, stat.S_IMODE(before.st_mode))
            os.replace(partial, real)
        finally:
            with contextlib.suppress(OSError):  # there is none if all went well
                partial.unlink()
        if os.name == "posix":
            folder = os.open(real.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)


def read_json(path: Path, what: str, parse: Callable[[Any], T] = lambda content: content) -> T:
    """The content of a JSON file, as ``parse`` returns it; an error of Python's own in ``parse`` means another file.

    InputError if it cannot be read, or is not ``what`` it should be, as in "the results of an evaluation".
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8-sig")))  # Windows editors put a mark first
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {what} from {path} ({error.strerror})") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = printable(str(error))[:300]
        raise InputError(f"{path} is damaged, or not {what} ({type(error).__name__}: {reason})") from error


def load_plain(path: Path, what: str) -> Any:
    """The content of a file of tensors and plain values; nothing in it is executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever another kind of file makes the unpickler raise
        wants = re.search(r"(?:GLOBAL|[Uu]nsupported class) (\w+\.[\w.]+)", str(error))
        reason = f"it would run {wants[1]}, which is refused" if wants else "it is damaged or in another format"
        raise InputError(f"{path} is not a {what} of plain tensors: {reason}") from error


def file_hash(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:  # in parts, as a file of nodes may be as large as the memory
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()


# --- Text and numbers -----------------------------------------------------------------------------------------------


def first_few(names: Sequence[Any], others: str = "more") -> str:
    """The first three of many names, and the number of the others."""
    shown = ", ".join(map(str, names[:3])) or "none"
    return shown + (f" and {len(names) - 3} {others}" if len(names) > 3 else "")


def printable(name: str) -> str:
    """A name for people, on one line: "?" for line breaks, control characters and bytes that are not UTF-8."""
    return "".join(character if character.isprintable() else "?" for character in name)


def mean_confidence_interval(accuracies: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval, ``1.96 std / sqrt(n)`` with the population std, in the unit given."""
    if not len(accuracies):
        raise ValueError("the mean needs at least one accuracy")
    return float(np.mean(accuracies)), float(1.96 * np.std(accuracies) / math.sqrt(len(accuracies)))


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
