"""A run on disk: its folder, lock, logs and state; how it is resumed; run.json and results.json."""

import contextlib
import io
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from engine.distributed import Ranks
from engine.evaluation import Evaluation
from utils import BEST_WEIGHTS, InputError, append_line, file_hash, load_plain, save_plain, write_atomically, write_json

LAST_STATE = "last.pth"
STATE_FORMAT = 1
# Flags that do not decide the result of a run, and may differ when it is resumed.
FREE_TO_DIFFER = (
    *("num_workers", "gpu", "data_dir", "save_every", "save_all", "solver_threads"),
    *("feature_cache", "episode_batch", "checkpoint_activations"),  # the same but for float rounding
    *("resume", "extra_dir", "json", "log_images"),  # where it is written, and what beside it
)


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
        write_atomically(self.path / "results.txt", "".join(f"{line}\n" for line in self.lines).encode())
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
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "png")
        folder = self.path / "images" / name
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"epoch-{epoch}.png", content.getbuffer())
        self.writer.add_image(f"images/{name}", pixels, epoch, dataformats="HWC")

    def _restore_images(self) -> None:
        # The pictures themselves are too large for the state: those of finished epochs come from their files.
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


def environment() -> dict[str, str]:
    """Versions of Python, of the libraries that compute, and the commit of this project where git knows it."""
    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "numpy", "opencv-python", "numba", "qpth", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    git = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return found


def open_run(
    script: str,
    args: Any,
    folder: Path,
    ranks: Ranks,
    *,
    weights: nn.Module,
    data: dict[str, Any],
    started_from: dict[str, str | None] | None = None,
) -> RunFolder | OtherRank:
    """The folder of the run, new or resumed; the first rank alone writes to it, and to ``run.json`` in it.

    Args:
        weights: the module whose weights the run is going to save.
        data: fingerprints of the data; those of a run that is resumed have to be the same.
        started_from: path and hash of the weights that a new run starts from.

    Raises:
        InputError: as :class:`utils.RunFolder`, or other data than that of the run.
    """
    ranks.gather([0])  # no rank is still reading what an earlier run left in the folder
    run = None
    if ranks.is_first:
        kept = args.max_epoch if args.save_all else 0
        run = RunFolder(folder, vars(args), resume=args.resume is not None, weights=weights, kept=kept)
        path = folder / "run.json"
        start = {"versions": environment(), "device": str(ranks.device), "processes": ranks.size}
        if run.state:
            known = json.loads(path.read_text())
            different = [split for split in data if known["data"].get(split, data[split]) != data[split]]
            if different:
                raise InputError(
                    f"-resume: expected the data of the run in {folder}; its {different[0]} images have other names or sizes"
                )
            known["resumed"] = [*known.get("resumed", []), start]
        else:
            known = {"script": script, **start, "data": data, "weights": started_from}
        write_json(path, {**known, "flags": vars(args)})
    state = ranks.from_first(run.state if run else None)
    return run or OtherRank(folder, state)


def is_finished(args: Any, run: RunFolder | OtherRank) -> bool:
    """Whether the run that was resumed has nothing left to do."""
    return bool(run.state and run.state.get("finished") and run.state["progress"]["epoch"] > args.max_epoch)


def deciding(args: Any) -> dict[str, Any]:
    """The flags that decide a result."""
    return {name: value for name, value in vars(args).items() if name not in FREE_TO_DIFFER}


def results(
    args: Any, evaluation: Evaluation, weights: str | Path, seconds: float, *, data: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What ``results.json`` says of an evaluation; ``data`` is the fingerprint of its images."""
    return {
        "accuracy": evaluation.accuracy,
        "interval": evaluation.interval,
        "accuracies": evaluation.accuracies,
        "loss": evaluation.loss,
        "flags": vars(args),
        "versions": environment(),
        "seconds": seconds,
        "weights": fingerprint(weights),
        "data": data,
    }


def fingerprint(weights: str | Path) -> dict[str, str | None] | None:
    """Path and hash of a checkpoint; None for "none"."""
    if str(weights) == "none":
        return None
    path = Path(weights) / BEST_WEIGHTS if Path(weights).is_dir() else Path(weights)
    return {"path": str(path), "sha256": file_hash(path) if path.is_file() else None}
