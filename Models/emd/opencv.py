"""``cv2.EMD``: OpenCV's transportation simplex, one problem at a time, float32, on the CPU.

Gradient: the flow is taken as a constant, so ``d value / d cost = flow`` and nothing reaches ``supply`` or ``demand``.
That is the published "opencv" recipe; it omits the weight path, 10-18 % of the gradient's norm on typical problems.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from Models.emd.errors import MissingLibraryError, SolverError

# Below this many problems per thread, handing them out costs more than it saves.
PROBLEMS_PER_THREAD = 16


def solve(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
    """``(B,N,M), (B,N), (B,M) -> value (B,), flow (B,N,M)``. Called by :func:`Models.emd.emd`."""
    # One transfer there and one back for the whole batch.
    n, m = cost.shape[-2:]
    packed = torch.cat([cost.detach().flatten(1), supply.detach(), demand.detach()], dim=1).float().cpu().numpy()
    flow = torch.from_numpy(_solve_all(packed, n, m)).to(device=cost.device, dtype=cost.dtype)
    return (cost * flow).sum((-2, -1)), flow


def _solve_all(packed: np.ndarray, n: int, m: int) -> np.ndarray:
    cv2 = _import_cv2()
    flow = np.empty((len(packed), n, m), dtype=np.float32)

    def solve_range(first: int, last: int) -> None:
        for index in range(first, last):
            problem = packed[index]
            # Copies, because cv2 wants whole rows of its own.
            costs = problem[: n * m].reshape(n, m).copy()
            supply, demand = problem[n * m : n * m + n, None].copy(), problem[n * m + n :, None].copy()
            try:
                _, _, flow[index] = cv2.EMD(supply, demand, cv2.DIST_USER, costs)
            except cv2.error as error:
                raise SolverError(f"opencv failed on problem {index} of {len(packed)}: {error}") from error

    threads = min(_thread_count(), len(packed) // PROBLEMS_PER_THREAD)
    if threads < 2:
        solve_range(0, len(packed))
    else:
        bounds = np.linspace(0, len(packed), threads + 1).astype(int)
        # cv2 releases the interpreter lock while it solves.
        for done in [
            _pool(os.getpid()).submit(solve_range, *pair) for pair in zip(bounds[:-1], bounds[1:], strict=True)
        ]:
            done.result()
    _check_marginals(flow, packed[:, n * m : n * m + n], packed[:, n * m + n :])
    return flow


def _check_marginals(flow: np.ndarray, supply: np.ndarray, demand: np.ndarray) -> None:
    # cv2 drops what is not moved when it gives up, so a wrong answer shows in the marginals.
    miss = np.maximum(np.abs(flow.sum(2) - supply).max(1), np.abs(flow.sum(1) - demand).max(1))
    bad = np.flatnonzero(~(miss <= 1e-3 * np.maximum(supply.sum(1), 1e-30)))
    if len(bad):
        raise SolverError(
            f"opencv did not solve problem {bad[0]} of {len(flow)}: its flow misses the weights by {miss[bad[0]]:.3g}"
        )


def _thread_count() -> int:
    # Follows torch.set_num_threads, so that one setting governs the whole process.
    return torch.get_num_threads()


@lru_cache(maxsize=1)
def _pool(process_id: int) -> ThreadPoolExecutor:
    # Keyed by the process: a forked child must not wait for threads that stayed with its parent.
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="emd-opencv")


@lru_cache(maxsize=1)
def _import_cv2():
    try:
        import cv2
    except ImportError as error:
        if "libGL" in str(error) or "libgthread" in str(error):
            raise MissingLibraryError(
                f"OpenCV is installed but a system library is missing ({error}). Install it (Debian and Ubuntu: "
                "apt-get install libgl1 libglib2.0-0), or put opencv-python-headless in the place of opencv-python"
            ) from error
        raise MissingLibraryError('solver "opencv" needs OpenCV: pip install "opencv-python<4.12"') from error
    return cv2
