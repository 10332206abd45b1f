"""Batches of images from worker processes, and the progress bars of passes over them."""

import atexit
import multiprocessing
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from engine.stopping import ignore_signals

SECONDS_BETWEEN_LINES = 60.0
_loaders: "weakref.WeakSet[DataLoader]" = weakref.WeakSet()


class LoaderError(RuntimeError):
    """A worker process was lost."""

    is_user_error = True


def make_loader(dataset: Dataset, batches: Iterable, *, num_workers: int, device: torch.device) -> DataLoader:
    """A loader of the given batches of items. Its worker processes are kept from pass to pass."""
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # the loader's own draws decide nothing, and must not disturb those that do
    )
    _loaders.add(loader)
    return loader


@atexit.register  # after those of torch and multiprocessing, so it is called before them
def _end_workers() -> None:
    """End what loaders have started. Exceptions that libraries keep can hold a script's frame, and so its loaders, until the
    exit, where multiprocessing would wait without end for processes that ignore its signal."""
    for loader in _loaders:
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()
    for process in multiprocessing.active_children():
        process.kill()


def stream(loader: DataLoader) -> Iterator[Any]:
    """One pass over a loader. Raises LoaderError if a worker was killed, or ran out of shared memory."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "Traceback" in str(error):
            raise  # an error in a worker
        lost = f"a process that loads images was lost ({str(error).splitlines()[0].rstrip('. ')})"
        advice = "If shared memory is short, give the container more (--shm-size 8g) or lower -num_workers"
        raise LoaderError(f"{lost}. {advice}; with 0, the main process loads them") from error


class _Lines(tqdm):
    """A bar that writes whole lines, at most one a minute, for logs."""

    def __init__(self, **settings: Any) -> None:
        self.next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        super().__init__(bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]", **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if shows := msg != "" and not self.disable and time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            print(self, file=self.fp, flush=True)
        return shows

    def clear(self, nolock: bool = False) -> None:
        pass


def progress_bar(desc: str, **settings: Any) -> tqdm:
    """A progress bar on standard error, or lines if that is a file; the settings are those of tqdm."""
    kind = tqdm if sys.stderr.isatty() else _Lines
    return kind(desc=desc, leave=False, dynamic_ncols=True, **settings)
