"""Batches of images from worker processes."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from engine.stopping import ignore_signals


class LoaderError(RuntimeError):
    """A worker process was lost."""

    is_user_error = True


def make_loader(dataset: Dataset, batches: Iterable, *, num_workers: int, device: torch.device) -> DataLoader:
    """A loader of the given batches of items, whose worker processes outlive a pass over them."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # the loader's own draws decide nothing, and must not disturb those that do
    )


def stream(loader: DataLoader) -> Iterator[Any]:
    """One pass over a loader.

    Raises:
        LoaderError: a worker was killed, or ran out of shared memory.
    """
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "Traceback" in str(error):
            raise  # a worker's own error, handed on
        raise LoaderError(
            f"a process that loads images was lost ({str(error).splitlines()[0]}) Shared memory may be short: give a "
            "container more of it (--shm-size 8g), or lower -num_workers; 0 loads in the main process"
        ) from error
