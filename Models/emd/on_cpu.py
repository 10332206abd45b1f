"""What the solvers on the CPU share: one transfer each way per batch, and threads."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# Below this many cells of cost per thread, handing the problems out costs more than it saves.
CELLS_PER_THREAD = 10_000


def to_numpy(cost: Tensor, supply: Tensor, demand: Tensor, dtype: torch.dtype) -> tuple[np.ndarray, ...]:
    """``(B,N,M), (B,N), (B,M)`` as arrays of ``dtype``, by one transfer where they lie on another device."""
    batch, n, m = cost.shape
    tensors = [tensor.detach() for tensor in (cost, supply, demand)]
    if cost.device.type != "cpu":
        packed = torch.cat([tensor.to(dtype).reshape(batch, -1) for tensor in tensors], dim=1).cpu()
        tensors = packed[:, : n * m].reshape(batch, n, m), packed[:, n * m : n * m + n], packed[:, n * m + n :]
    return tuple(tensor.to(dtype).contiguous().numpy() for tensor in tensors)


def in_threads(work: Callable[[int, int], None], cost: np.ndarray) -> None:
    """Call ``work(first, last)`` on ranges that cover all problems of ``cost (B,N,M)``, in threads.

    ``work`` should release the interpreter lock.

    As many threads as ``torch.get_num_threads()`` says, so that one setting governs the whole process.
    """
    problems = len(cost)
    threads = min(torch.get_num_threads(), problems, cost.size // CELLS_PER_THREAD)
    if threads < 2:
        work(0, problems)
        return
    bounds = np.linspace(0, problems, threads + 1).astype(int).tolist()
    pool = _pool(os.getpid())
    for done in [pool.submit(work, *pair) for pair in zip(bounds[:-1], bounds[1:], strict=True)]:
        done.result()


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Keep torch to one thread, where ``device`` is the CPU."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _pool(process_id: int) -> ThreadPoolExecutor:
    # Keyed by the process: a forked child must not wait for threads that stayed with its parent.
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="emd")
