"""What every script needs: parser, flags of a run, seed, device, run folder, checkpoint, interval.

torch is imported by the functions that need it, so that importing this module takes no time and a script can answer
Ctrl-C from its first moment.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

BEST_WEIGHTS, LAST_STATE = "max_acc.pth", "last.pth"
STATE_FORMAT = 1
LARGEST_SEED = 2**63 - 1


class InputError(ValueError):
    """Something the user gave is not as expected. The message is one line: what was expected, what came, what to do."""

    is_user_error = True  # run_script prints errors that say so as one line


# --- Command line -----------------------------------------------------------------------------------------------------


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # A switch is off and an empty value is empty: nothing to say about either.
        says_nothing = action.default is None or action.default is False or action.default == ""
        return action.help if says_nothing else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} -h)\n")


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows every default, and answers bad flags with one line and exit status 2."""
    return _Parser(description=description, allow_abbrev=False, formatter_class=_Formatter)


def add_run_arguments(parser: argparse.ArgumentParser, *, has_folder: bool = True) -> None:
    """The flags that :func:`choose_device`, :func:`choose_seed` and :func:`set_seed` read, and :class:`RunFolder` perhaps."""
    group = parser.add_argument_group("run")
    group.add_argument("-gpu", help='GPUs to use, as in 0 or 0,1,2,3, or "cpu" (default: one GPU, else the CPU)')
    group.add_argument(
        "-seed", type=number_between(0, LARGEST_SEED, int), default=1, help="of every random draw; 0 draws a seed"
    )
    group.add_argument(
        "-deterministic", action="store_true", help="on a GPU, use deterministic kernels: repeatable, and slower"
    )
    if has_folder:
        group.add_argument(
            "-extra_dir",
            type=folder_name,
            default="",
            help="a folder below the run folder, to keep runs apart; eval.py adds its result to "
            "checkpoint/eval/<extra_dir>/results.txt",
        )


def number_at_least(minimum: float, kind: type) -> Callable[[str], Any]:
    """An argparse type: ``int`` or ``float``, finite and not below ``minimum``."""
    return _number(kind, lambda value: value >= minimum, f"of {minimum} or more")


def number_above_zero(kind: type) -> Callable[[str], Any]:
    """An argparse type: ``int`` or ``float``, finite and positive."""
    return _number(kind, lambda value: value > 0, "above 0")


def number_between(minimum: float, maximum: float, kind: type) -> Callable[[str], Any]:
    """An argparse type: ``int`` or ``float`` from ``minimum`` to ``maximum``."""
    return _number(kind, lambda value: minimum <= value <= maximum, f"from {minimum} to {maximum}")


def _number(kind: type, is_good: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
            if math.isfinite(value) and is_good(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"expected a {'whole ' if kind is int else ''}number {what}; got {text!r}")

    return parse


def whole_numbers(text: str) -> tuple[int, ...]:
    """An argparse type: ``"2,3"`` to ``(2, 3)``."""
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text.strip()):
        raise argparse.ArgumentTypeError(f"expected whole numbers above 0 joined by commas, as in 2,3; got {text!r}")
    return tuple(int(part) for part in text.split(","))


def folder_name(text: str) -> str:
    """An argparse type: a relative path that stays below the folder it is joined to."""
    path = Path(text)
    if path.is_absolute() or ".." in path.parts or "\0" in text:
        raise argparse.ArgumentTypeError(
            f"expected the name of a folder below checkpoint/, as in trial-2; got {text!r}"
        )
    return text


def run_script(main: Callable[[], None]) -> None:
    """Run a script's ``main``; errors of the user's making end it with one line and exit status 1."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun then shows the error of the process that failed first
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may be in another encoding, as on stderr
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted; what was saved stays saved", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read standard output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        message = _user_message(error)
        if message is None:
            raise
        status = getattr(error, "exit_status", None)  # set by exceptions that are not errors
        if status:
            say(message)
        else:
            print(f"error: {message}", file=sys.stderr)
        sys.exit(status or 1)


def _user_message(error: Exception) -> str | None:
    """One line for errors that the user can do something about, None for others."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported
        return (
            f"out of GPU memory ({str(error).splitlines()[0]}) Try a smaller -query, fewer patches, "
            "-checkpoint_activations, or more GPUs with -gpu 0,1"
        )
    if "WORLD_SIZE" in os.environ and re.search("gloo|NCCL|Connection (closed|reset)", str(error)):
        return f"another process of the run was lost ({str(error).splitlines()[0]})"
    if not (getattr(error, "is_user_error", False) or isinstance(error, OSError)):
        return None
    # A loader's worker or a replica hands its error on with its traceback in the message; the last line is the error.
    return re.sub(r"^[A-Za-z_.]+Error: ", "", (str(error).strip() or type(error).__name__).splitlines()[-1])


def warn(message: str) -> None:
    """Print a warning on standard error."""
    say(f"warning: {message}")


def say(message: str) -> None:
    """Print a line on standard error; of several processes, the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


# --- Seed and device --------------------------------------------------------------------------------------------------


def choose_seed(seed: int) -> int:
    """The seed itself, or a drawn one for 0, which is printed."""
    if seed:
        return seed
    seed = int.from_bytes(os.urandom(4), "big") or 1
    say(f"seed: {seed}")
    return seed


def set_seed(seed: int, *, deterministic: bool = False) -> None:
    """Seed everything.

    Args:
        deterministic: on a GPU, take deterministic kernels instead of the fastest ones.
    """
    import numpy as np
    import torch

    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - for libraries that draw from numpy's global generator


def named_generator(seed: int, *name: str | int) -> torch.Generator:
    """A CPU generator for one draw, which depends on the seed and the name and on nothing drawn before."""
    import torch

    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def gpu_numbers(gpu: str | None) -> list[int]:
    """The CUDA ids that ``-gpu`` names, or all there are; none for the CPU.

    Raises:
        InputError: an id that this machine does not have.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is None:
        return list(range(count))
    if gpu.strip().lower() == "cpu":
        return []
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", gpu.strip()):
        raise InputError(f'-gpu {gpu}: expected GPU numbers joined by commas, as in 0,1, or "cpu"')
    ids = list(dict.fromkeys(int(part) for part in gpu.split(",")))
    missing = [number for number in ids if number >= count]
    if missing:
        there = f"0 to {count - 1}" if count > 1 else "only 0" if count else "none"
        raise InputError(
            f"-gpu {gpu}: there is no GPU {missing[0]}; CUDA devices here: {there}. Leave -gpu out, or give -gpu cpu"
        )
    return ids


def choose_device(gpu: str | None) -> tuple[torch.device, list[int]]:
    """``-gpu`` to the main device and the CUDA ids to spread over; none on the CPU. Says which device is used."""
    import torch

    ids = gpu_numbers(gpu)
    if not ids:
        say("device: cpu" + ("" if gpu else " (no CUDA device found)"))
        return torch.device("cpu"), []
    more = ""
    if gpu is None and len(ids) > 1:
        more, ids = f" ({len(ids)} found; -gpu 0,1 spreads over two)", ids[:1]
    torch.cuda.set_device(ids[0])
    say(f"device: cuda {','.join(map(str, ids))}, {torch.cuda.get_device_name(ids[0])}{more}")
    return torch.device("cuda", ids[0]), ids


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- Run folder -------------------------------------------------------------------------------------------------------


class RunFolder:
    """The folder of a run, which one process at a time may write to.

    ``results.txt`` (lines), ``trlog.json`` (curves), ``tf/`` (TensorBoard), ``images/`` (pictures in it), ``run.json`` (what
    was run on what), weights, and ``last.pth``: all that it takes to go on. The log of a run that is resumed is put back to
    where its state was saved, so that no line is there twice. What an earlier run left in the folder is moved to
    ``previous-<n>/``.

    Args:
        path: made where it is not there.
        flags: of the run.
        resume: go on with the run that is there, if there is one.
        weights: the module whose weights the run is going to save; too little space for them is an error now.
        kept: how often they are saved beside the best ones.

    Attributes:
        state: what :meth:`save_state` was given last, where a run is resumed; None for a new one.

    Raises:
        InputError: the folder cannot be written, has no room, or is in use.
    """

    def __init__(
        self,
        path: str | Path,
        flags: dict[str, Any],
        *,
        resume: bool = False,
        weights: nn.Module | None = None,
        kept: int = 0,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: it takes seconds to import

        self.path = Path(path)
        self.state: dict[str, Any] | None = None
        self.lines: list[str] = []
        self.curves: dict[str, Any] = {"args": flags, "epochs": []}
        self.points: dict[str, list[tuple[int, float, float]]] = {}  # step, value, time of each TensorBoard scalar
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = hold_lock(self.path / "run.lock", "Wait for it to end, or keep the runs apart with -extra_dir")
            for partial in self.path.glob("*.part"):  # of a process that was killed while it wrote
                partial.unlink()
            if resume and (self.path / LAST_STATE).is_file():
                self._restore()
                self.curves["args"] = flags
            else:
                self._check_room(weights, kept)
                self._move_earlier_run()
            self.writer = SummaryWriter(str(self.path / "tf"))
        except OSError as error:
            raise InputError(f"expected to write the run to {path}; it cannot be written ({error})") from error
        for name, points in self.points.items():
            for step, value, when in points:
                self.writer.add_scalar(name, value, step, walltime=when)
        self._restore_images()
        print(f"run folder: {self.path}" + (", resumed" if self.state else ""), flush=True)

    def _check_room(self, weights: nn.Module | None, kept: int) -> None:
        if weights is not None:
            # The best weights, the state (as large again for the momentum), and the successor of either.
            room = (kept + 5) * sum(value.nbytes for value in weights.state_dict().values())
            free = shutil.disk_usage(self.path).free
            if free < room:
                raise InputError(
                    f"expected {room / 1e6:.0f} MB of free space for the run in {self.path}; there are {free / 1e6:.0f}"
                )

    def _restore(self) -> None:
        content = load_plain(self.path / LAST_STATE, "state of a run")
        if not isinstance(content, dict) or content.get("format") != STATE_FORMAT:
            raise InputError(
                f"expected a state of format {STATE_FORMAT} in {self.path / LAST_STATE}; another version wrote it"
            )
        self.state, self.lines, self.curves = content["state"], content["lines"], content["curves"]
        self.points = {name: [(int(n), v, t) for n, v, t in rows.tolist()] for name, rows in content["points"].items()}
        _write_atomically(self.path / "results.txt", "".join(f"{line}\n" for line in self.lines).encode())
        self._write_curves()
        shutil.rmtree(self.path / "tf", ignore_errors=True)

    def _move_earlier_run(self) -> None:
        names = ("results.txt", "trlog.json", "tf", "images", BEST_WEIGHTS, LAST_STATE, "run.json", "results.json")
        mine = [self.path / name for name in names]
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
        print(line, flush=True)
        self.lines.append(line)
        append_line(self.path / "results.txt", line)

    def scalars(self, step: int, **values: float) -> None:
        """Send scalars to TensorBoard, as ``data/<name>``."""
        for name, value in values.items():
            when = time.time()
            self.points.setdefault(f"data/{name}", []).append((step, value, when))
            self.writer.add_scalar(f"data/{name}", value, step, walltime=when)

    def image(self, name: str, pixels: np.ndarray, epoch: int) -> None:
        """Send a picture ``(height, width, 3)``, uint8, to TensorBoard, and keep it in ``images/``."""
        from PIL import Image

        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "png")
        folder = self.path / "images" / name
        folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(folder / f"epoch-{epoch}.png", content.getbuffer())
        self.writer.add_image(f"images/{name}", pixels, epoch, dataformats="HWC")

    def _restore_images(self) -> None:
        # The pictures themselves are too large for the state: those of finished epochs come from their files.
        import numpy as np
        from PIL import Image

        files = [(int(file.stem.removeprefix("epoch-")), file) for file in self.path.glob("images/*/epoch-*.png")]
        for epoch, file in sorted(files):
            if epoch > len(self.curves["epochs"]):
                file.unlink()
                continue
            with Image.open(file) as image:
                pixels, when = np.asarray(image.convert("RGB")), file.stat().st_mtime
            tag = f"images/{file.parent.name}"
            self.writer.add_image(tag, pixels, epoch, walltime=when, dataformats="HWC")

    def record(self, **values: Any) -> None:
        """Add one epoch to ``trlog.json``."""
        self.curves["epochs"].append(values)
        self._write_curves()

    def finish(self, **values: Any) -> None:
        """Add what is said once per run to ``trlog.json``, and close the log."""
        self.curves.update(values)
        self._write_curves()
        self.writer.close()
        if self.state is not None:
            self.save_state({**self.state, "finished": True})

    def _write_curves(self) -> None:
        write_json(self.path / "trlog.json", self.curves)

    def save_weights(self, name: str, state: dict[str, Tensor]) -> Path:
        """Write ``{"params": state}``, as the published checkpoints have it."""
        params = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_plain(self.path / name, {"params": params})
        return self.path / name

    def save_state(self, state: dict[str, Any]) -> None:
        """Write ``last.pth``: the state of the training and of the log. It consists of plain data."""
        import torch

        self.state = state
        points = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in self.points.items()}
        log = {"lines": self.lines, "curves": json.loads(json.dumps(self.curves)), "points": points}
        save_plain(self.path / LAST_STATE, {"format": STATE_FORMAT, "state": state, **log})


class OtherRank:
    """The run as the processes see it that leave the writing to the first: they know its state and write nothing."""

    def __init__(self, path: Path, state: dict[str, Any] | None) -> None:
        self.path, self.state = path, state

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in ("log", "scalars", "image", "record", "finish", "save_weights", "save_state"):
            raise AttributeError(name)
        return lambda *values, **named: None


def hold_lock(path: Path, advice: str) -> Any:
    """Hold a file locked while the value returned lives; the system lets go of it however the process ends.

    Raises:
        InputError: another process holds it; the message ends with ``advice``.
    """
    try:
        import fcntl
    except ImportError:  # not a system with such locks
        return None
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open for as long as the run lasts
    try:
        # A lock of the process, not of the open file: worker processes that outlive it for a moment do not inherit it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise InputError(
            f"expected no other run in {path.parent}; {file.read().strip() or 'another process'} is writing to it. {advice}"
        ) from None
    except OSError:  # a file system without locks
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file


def append_line(path: Path, line: str | None = None) -> None:
    """Add a line to a text file, made with its folder where it is not there; without a line, only see that it can be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            if line is not None:
                file.write(line + "\n")
    except OSError as error:
        raise InputError(f"expected to write to {path}; it cannot be written ({error.strerror})") from error


def check_writable(path: Path) -> None:
    """Raise InputError unless a file can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
    except OSError as error:
        raise InputError(f"expected to write {path}; it cannot be written ({error.strerror})") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(path, json.dumps(content, indent=1).encode())


def save_plain(path: Path, content: Any) -> None:
    """Write tensors and plain values with torch.save, atomically."""
    import torch

    buffer = io.BytesIO()  # torch's own file writer leaves a full disk to a long RuntimeError
    torch.save(content, buffer)
    _write_atomically(path, buffer.getbuffer())


def _write_atomically(path: Path, content: bytes | memoryview) -> None:
    # A reader sees the old file or the new one, whenever the run is killed, and so it is after a loss of power.
    partial = None
    try:
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part")
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_umask())  # mkstemp gives it to the owner alone
        os.replace(partial, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise InputError(
            f"expected to write {path}; it cannot be written ({error.strerror}). What was saved before is intact"
        ) from error
    finally:
        if partial is not None and os.path.exists(partial):
            os.unlink(partial)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- Checkpoints ------------------------------------------------------------------------------------------------------

# Keys that a checkpoint may have or lack without being of another network: the pre-training classifier, and counters
# that no computation reads.
_IGNORED_KEYS = re.compile(r"^(fc|classifier)\.|\.num_batches_tracked$")


def load_encoder_weights(model: nn.Module, path: str | Path, *, hint: str = "") -> None:
    """Load an encoder from any of the published checkpoint formats.

    Args:
        model: a module whose ``encoder`` is to be filled, or an encoder itself.
        path: a file ``{"params": state_dict}``: keys of the encoder as they are (pre-trained), or behind ``encoder.`` or
            ``module.encoder.`` (meta-trained). A folder stands for the ``max_acc.pth`` in it.
        hint: what to do where there is no such file.

    Raises:
        InputError: no such file, no such format, the weights of another architecture, or weights that no training can
            have left (not finite, negative variances).
    """
    encoder = getattr(model, "encoder", model)
    path = Path(path)
    if path.is_dir():
        path = path / BEST_WEIGHTS
    if not path.is_file():
        raise InputError(f"expected a checkpoint in {path}; there is no such file. {hint}".strip())
    params = _read_params(path)
    given = {re.sub(r"^(module\.)?(encoder\.(module\.)?)?", "", key): value for key, value in params.items()}

    wanted = encoder.state_dict()
    missing = [key for key in wanted if key not in given and not _IGNORED_KEYS.search(key)]
    unexpected = [key for key in given if key not in wanted and not _IGNORED_KEYS.search(key)]
    given = {key: given.get(key, value) for key, value in wanted.items()}
    misshapen = [key for key in wanted if given[key].shape != wanted[key].shape]
    if missing or unexpected or misshapen:
        faults = [f"lacks {some(missing)}"] if missing else []
        faults += [f"has unknown {some(unexpected)}"] if unexpected else []
        faults += [
            f"has {key} {tuple(given[key].shape)} where {tuple(wanted[key].shape)} is expected" for key in misshapen[:1]
        ]
        raise InputError(f"expected the weights of {type(encoder).__name__} in {path}; it {'; '.join(faults)}")
    for key, value in given.items():
        if not bool(value.isfinite().all()):
            raise InputError(f"expected finite weights in {path}; {key} has entries that are NaN or infinite")
        if key.endswith("running_var") and bool((value < 0).any()):
            raise InputError(f"expected variances of 0 or more in {path}; {key} has negative entries")
    encoder.load_state_dict(given)


def load_plain(path: Path, what: str) -> Any:
    """The content of a file of tensors and plain values; nothing in it is executed."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a file that is no checkpoint makes the unpickler say
        wants = re.search(r"(?:GLOBAL|[Uu]nsupported class) (\w+\.[\w.]+)", str(error))
        reason = f"it asks to run {wants[1]}, which is refused" if wants else "it is damaged or another format"
        raise InputError(f"expected a {what} of plain tensors in {path}; {reason}") from error


def _read_params(path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file."""
    import torch

    content = load_plain(path, "checkpoint")
    if not isinstance(content, dict) or not isinstance(content.get("params"), dict):
        raise InputError(f'expected {{"params": state_dict}} in {path}; got {_describe(content)}')
    for key, value in content["params"].items():
        if not isinstance(key, str):
            raise InputError(f"expected names as keys in {path}; got {key!r}, {_describe(key)}")
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            kind = f"a {value.layout} tensor" if isinstance(value, torch.Tensor) else _describe(value)
            kind = "a tensor without values" if getattr(getattr(value, "device", None), "type", "") == "meta" else kind
            raise InputError(f"expected dense tensors in {path}; {key} is {kind}")
    return content["params"]


def _describe(content: Any) -> str:
    return f"a dict with the keys {some(list(content))}" if isinstance(content, dict) else f"a {type(content).__name__}"


def some(names: Sequence[Any]) -> str:
    """The first few of many names."""
    shown = ", ".join(map(str, names[:3])) or "none"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --- What was run on what ---------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Versions of Python, of the libraries that compute, and the commit of this project where git knows it."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "numpy", "opencv-python", "numba", "qpth", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return found


def file_hash(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# --- Figures ----------------------------------------------------------------------------------------------------------


def mean_confidence_interval(accuracies: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval, ``1.96 std / sqrt(n)`` with the population std, in the unit given."""
    import numpy as np

    values = np.asarray(accuracies, dtype=np.float64)
    if not len(values):
        raise ValueError("expected at least one accuracy; got none")
    return float(values.mean()), float(1.96 * values.std() / math.sqrt(len(values)))


class Stopwatch:
    """Wall-clock time since it was made, in words."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def __str__(self) -> str:
        return duration(self.seconds)


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
