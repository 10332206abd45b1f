"""Helpers of the solvers on the CPU: one checked transfer per batch, and threads."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .problem import check_values

# With fewer cells of cost per thread, distributing the problems costs more than it saves.
CELLS_PER_THREAD = 10_000
_threads: int | None = None


def set_threads(count: int | None) -> None:
    """How many threads the solvers on the CPU may use; as many as torch, when None. Holds for this process."""
    global _threads
    _threads = count


def to_numpy(cost: Tensor, supply: Tensor, demand: Tensor, dtype: torch.dtype) -> tuple[np.ndarray, ...]:
    """``(B,N,M), (B,N), (B,M)``, checked, as contiguous arrays of ``dtype``, by one transfer from another device."""
    batch, n, m = cost.shape
    tensors = [tensor.detach() for tensor in (cost, supply, demand)]
    if cost.device.type != "cpu":
        packed = torch.cat([tensor.reshape(batch, -1) for tensor in tensors], dim=1).cpu()
        tensors = packed[:, : n * m].reshape(batch, n, m), packed[:, n * m : n * m + n], packed[:, n * m + n :]
    check_values(*tensors)
    return tuple(tensor.to(dtype).contiguous().numpy() for tensor in tensors)


def in_threads(work: Callable[[int, int], None], cost: np.ndarray) -> None:
    """Call ``work(first, last)`` on ranges that cover all problems of ``cost (B,N,M)``, in threads. Passes exceptions on."""
    problems = len(cost)
    allowed = _threads or torch.get_num_threads()
    threads = min(allowed, problems, cost.size // CELLS_PER_THREAD)
    if threads < 2:
        work(0, problems)
        return
    bounds = np.linspace(0, problems, threads + 1).astype(int).tolist()
    pool = _pool(os.getpid(), allowed)
    for done in [pool.submit(work, *pair) for pair in zip(bounds[:-1], bounds[1:], strict=True)]:
        done.result()


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Limit torch to one thread if ``device`` is the CPU."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _pool(process_id: int, workers: int) -> ThreadPoolExecutor:
    # Keyed by the process: a forked child inherits the pool but not its threads, and would wait for them forever.
    return ThreadPoolExecutor(max_workers=workers, thread_name_prefix="emd")
