"""A run on disk: its folder, lock, logs and state; how it is resumed; run.json."""

import contextlib
import io
import itertools
import json
import os
import platform
import shutil
import subprocess
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

import utils
from engine.distributed import Ranks
from utils import BEST_WEIGHTS, RECORD, InputError

LAST_STATE = "last.pth"
# Flags that do not decide the result of a run, and may differ when it is resumed.
NON_RESULT_FLAGS = (
    *("num_workers", "gpu", "data_dir", "save_every", "save_all", "solver_threads"),
    *("feature_cache", "episode_batch", "checkpoint_activations"),  # the same except for rounding
    *("resume", "extra_dir", "json", "csv", "log_images"),  # where it is written, and what beside it
    *("features", "features_out", "episodes_in", "episodes_out"),  # whose content is a part of the data
)


class RunFolder:
    """The folder of a run, which one process at a time may write to.

    Args:
        resume: resume the run in the folder, if there is one: ``state`` is what :meth:`save_state` was last given, and the
            logs are rolled back to it. Otherwise the files of an earlier run are moved to ``previous-<n>/``.
        room: bytes that a new run needs there.
        writes: False on ranks that leave all files and lines to the first.

    Raises:
        InputError: the folder cannot be written, has no room, or is in use; its state is damaged or of another version.
    """

    def __init__(
        self, path: str | Path, flags: dict[str, Any], *, resume: bool = False, room: int = 0, writes: bool = True
    ) -> None:
        self.path, self.writes = Path(path), writes
        self.state: dict[str, Any] | None = None
        self.curves: dict[str, Any] = {"args": flags, "epochs": []}
        if not writes:
            return
        points: dict[str, Any] = {}
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(f"the logs of a run need TensorBoard: pip install tensorboard ({error})") from error
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            advice = "Wait for it to finish, or choose another folder with -extra_dir"
            self._lock = hold_lock(self.path / "run.lock", advice)
            for partial in self.path.glob("*.part"):  # of a process that was killed while it wrote
                partial.unlink()
            if resume and (self.path / LAST_STATE).is_file():
                points = self._restore()
                self.curves["args"] = flags
            else:
                if (free := shutil.disk_usage(self.path).free) < room:
                    needed = f"{room / 1e6:.0f} MB of free space in {self.path}; there are {free / 1e6:.0f}"
                    raise InputError(f"the run needs {needed}")
                self._move_earlier_run()
            self.writer = SummaryWriter(str(self.path / "tf"))
            threading.excepthook = _leave_to_main
        except OSError as error:
            raise InputError(f"cannot write the run to {path} ({error})") from error
        for name, rows in points.items():
            for step, value, when in rows.tolist():
                self.writer.add_scalar(name, value, int(step), walltime=when)
        print(f"run folder: {self.path}" + (", resumed" if self.state else ""), flush=True)

    def _restore(self) -> dict[str, Tensor]:
        """Roll the logs back to the state. Returns TensorBoard scalars (step, value, time) that are to be written again."""
        path = self.path / LAST_STATE
        content = utils.load_plain(path, "state of a run")
        try:
            state, curves, points = content["state"], dict(content["curves"]), content.get("points", {})
            epoch = dict(state).get("progress", {}).get("epoch", 1)
            if content["format"] == 1:  # has the logs in it: lines, and points of the curves
                sizes = {"results.txt": sum(len(line.encode()) + 1 for line in content["lines"])}
            else:
                sizes = {name: int(size) for name, size in content["log_sizes"].items()}
            if not (isinstance(epoch, int) and isinstance(curves["epochs"], list) and content["format"] in (1, 2)):
                raise TypeError("its content has other types, or its format is unknown")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{path} is not the state of a run that this version can resume ({reason})") from error
        for name, file in self._log_files().items():
            if name not in sizes:
                file.unlink()
            elif file.stat().st_size > sizes[name]:
                os.truncate(file, sizes[name])
        self.state, self.curves = state, curves
        self._write_curves()
        for file in self.path.glob("images/*/epoch-*.png"):
            number = file.stem.removeprefix("epoch-")
            if number.isdecimal() and int(number) > len(curves["epochs"]):
                file.unlink()
        return points

    def _log_files(self) -> dict[str, Path]:
        files = (self.path / "results.txt", *(self.path / "tf").glob("*"))
        return {str(file.relative_to(self.path)): file for file in files if file.is_file()}

    def _move_earlier_run(self) -> None:
        names = ("results.txt", "trlog.json", "tf", "images", BEST_WEIGHTS, LAST_STATE, RECORD, "results.json")
        names = (*names, utils.STATISTICS_FILE)
        mine = [*(self.path / name for name in names), *self.path.glob("epoch-*.pth")]
        if earlier := [path for path in mine if os.path.lexists(path)]:
            places = (self.path / f"previous-{number}" for number in itertools.count(1))
            aside = next(place for place in places if not place.exists())
            aside.mkdir()
            for path in earlier:
                path.rename(aside / path.name)
            print(f"moved the earlier run in {self.path} to {aside}")

    def log(self, line: str) -> None:
        """Print a line, and add it to ``results.txt``."""
        if self.writes:
            print(line, flush=True)
            utils.append_line(self.path / "results.txt", line)

    def scalars(self, step: int, **values: float) -> None:
        """Send scalars to TensorBoard, as ``data/<name>``."""
        if self.writes:
            with utils.writing(self.path / "tf"):
                for name, value in values.items():
                    self.writer.add_scalar(f"data/{name}", value, step)

    def image(self, name: str, pixels: np.ndarray, epoch: int) -> None:
        """Send a picture ``(height, width, 3)``, uint8, to TensorBoard, and keep it in ``images/``."""
        if self.writes:
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, "png")
            utils.write_atomically(self.path / "images" / name / f"epoch-{epoch}.png", content.getbuffer())
            self.writer.add_image(f"images/{name}", pixels, epoch, dataformats="HWC")

    def record(self, **values: Any) -> None:
        """Add one epoch to ``trlog.json``."""
        if self.writes:
            self.curves["epochs"].append(values)
            self._write_curves()

    def finish(self, **values: Any) -> None:
        """Add the results of the whole run to ``trlog.json``, and close the logs."""
        if self.writes:
            self.curves.update(values)
            self._write_curves()
            if self.state is not None:
                self.save_state({**self.state, "finished": True})
            self.writer.close()

    def is_finished(self, max_epoch: int) -> bool:
        """Whether the run that was resumed has nothing left to do."""
        state = self.state or {}
        return bool(state.get("finished") and state.get("progress", {}).get("epoch", 0) > max_epoch)

    def _write_curves(self) -> None:
        utils.write_json(self.path / "trlog.json", self.curves)

    def save_weights(self, name: str, state: dict[str, Tensor]) -> None:
        """Write ``{"params": state}``, as the published checkpoints have it."""
        if self.writes:
            params = {key: value.detach().cpu().contiguous() for key, value in state.items()}
            utils.save_plain(self.path / name, {"params": params})

    def save_state(self, state: dict[str, Any]) -> None:
        """Write ``last.pth``: the state of the training, which consists of plain data, and how long the logs are."""
        if not self.writes:
            return
        self.state = state
        with utils.writing(self.path / "tf"):
            self.writer.flush()
        sizes = {}
        for name, file in self._log_files().items():
            with file.open("r+b") as log:
                os.fsync(log.fileno())
                sizes[name] = log.seek(0, os.SEEK_END)
        curves = json.loads(json.dumps(self.curves))
        utils.save_plain(self.path / LAST_STATE, {"format": 2, "state": state, "curves": curves, "log_sizes": sizes})


def _leave_to_main(failure: Any) -> None:
    """In TensorBoard's thread, a full disk is an error without a traceback: the next call of the writer raises it."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def hold_lock(path: Path, advice: str) -> Any:
    """Lock a file while the returned object lives; InputError with ``advice`` if another process, which it names, holds it."""
    try:
        import fcntl
    except ImportError:  # not a system with such locks
        return None
    file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 - open for as long as the run lasts
    try:
        # A lock of the process, not of the open file: worker processes that outlive it for a moment do not inherit it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = utils.printable(file.read().strip()) or "another process"
        raise InputError(f"{path.parent} is in use by {holder}. {advice}") from None
    except OSError:  # a file system without locks
        return None
    file.truncate(0)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"process {os.getpid()} on {platform.node()} (started {started})", file=file, flush=True)
    return file


def environment() -> dict[str, str]:
    """Versions of Python, of the libraries that compute, and the commit of this project where git knows it."""
    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "numpy", "opencv-python", "numba", "qpth", "pillow", "timm"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    git = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return found


def read_record(folder: Path) -> dict[str, Any]:
    """The content of ``run.json``; InputError if it is missing or damaged."""

    def check(content: dict[str, Any]) -> dict[str, Any]:
        flags = content["flags"]
        if not (isinstance(content["script"], str) and isinstance(flags["max_epoch"] + flags["seed"], int)):
            raise TypeError("its flags have other types")
        return {**content, "data": dict(content.get("data") or {}), "resumed": list(content.get("resumed") or [])}

    return utils.read_json(folder / RECORD, "the flags of a run", check)


def open_run(
    script: str,
    args: Any,
    folder: Path,
    ranks: Ranks,
    *,
    weights: nn.Module,
    data: dict[str, Any],
    started_from: dict[str, str | None] | None = None,
) -> RunFolder:
    """The folder of the run, new or resumed, and ``run.json`` in it; the first rank alone writes.

    Args:
        weights: the module whose weights the run is going to save.
        data: fingerprints of the data; a resumed run needs the same data as before, or it is an InputError.
        started_from: path and hash of the weights that a new run starts from.
    """
    ranks.gather(None)  # no rank is still reading what an earlier run left in the folder
    # The best weights, the state (as large again for the momentum), and the successor of either.
    copies = 5 + (args.max_epoch if args.save_all else 0)
    room = copies * sum(value.nbytes for value in weights.state_dict().values())
    run = RunFolder(folder, vars(args), resume=args.resume is not None, room=room, writes=ranks.is_first)
    if ranks.is_first:
        start = {"versions": environment(), "device": str(ranks.device), "processes": ranks.size}
        record = {"script": script, **start, "data": data, "weights": started_from}
        if run.state:
            record = read_record(folder)
            for split in data:
                if record["data"].get(split, data[split]) != data[split]:
                    changed = f"the data of the run in {folder} has changed"
                    raise InputError(f"-resume: {changed}: its {split} images have other names or sizes")
            record["resumed"].append(start)
        utils.write_json(folder / RECORD, {**record, "flags": vars(args)})
    run.state = ranks.from_first(run.state)
    return run


def result_flags(args: Any) -> dict[str, Any]:
    """The flags that decide a result."""
    return {name: value for name, value in vars(args).items() if name not in NON_RESULT_FLAGS}


def fingerprint(weights: str | Path) -> dict[str, str | None] | None:
    """Path and hash of a checkpoint; None for "none"."""
    if str(weights) == "none":
        return None
    path = Path(weights) / BEST_WEIGHTS if Path(weights).is_dir() else Path(weights)
    return {"path": str(path), "sha256": utils.file_hash(path) if path.is_file() else None}
