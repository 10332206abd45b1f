"""``cv2.EMD``: OpenCV's transportation simplex, one problem at a time, float32, on the CPU.

Gradient: the flow is treated as a constant, so ``d value / d cost = flow`` and ``supply`` and ``demand`` get none.
This is the published "opencv" recipe. It omits the path through the weights, 10-18 % of the gradient's norm on typical
problems.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .errors import MissingLibraryError, SolverError
from .on_cpu import in_threads, to_numpy


def solve(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
    """``(B,N,M), (B,N), (B,M) -> value (B,), flow (B,N,M)``. Called by :func:`Models.emd.emd`, which says what is raised."""
    flow = torch.from_numpy(_solve_arrays(*to_numpy(cost, supply, demand, torch.float32)))
    flow = flow.to(device=cost.device, dtype=cost.dtype)
    return (cost * flow).sum((-2, -1)), flow


def _solve_arrays(cost: np.ndarray, supply: np.ndarray, demand: np.ndarray) -> np.ndarray:
    cv2 = _import_cv2()
    flow = np.empty_like(cost)

    def work(first: int, last: int) -> None:
        for index in range(first, last):
            try:
                _, _, flow[index] = cv2.EMD(supply[index, :, None], demand[index, :, None], cv2.DIST_USER, cost[index])
            except cv2.error as error:
                raise SolverError(f"opencv failed on problem {index} of {len(cost)}: {error}") from error

    in_threads(work, cost)  # cv2 releases the interpreter lock while it solves
    # When cv2 gives up it returns what it has moved so far, so a wrong answer shows in the marginals.
    miss = np.maximum(np.abs(flow.sum(2) - supply).max(1), np.abs(flow.sum(1) - demand).max(1))
    bad = np.flatnonzero(~(miss <= 1e-3 * np.maximum(supply.sum(1), np.finfo(np.float32).tiny)))
    if len(bad):
        index = bad[0]
        raise SolverError(
            f"opencv did not solve problem {index} of {len(cost)}: its flow misses the weights by {miss[index]:.3g}"
        )
    return flow


@lru_cache(maxsize=1)
def _import_cv2():
    try:
        import cv2
    except ImportError as error:
        if "libGL" in str(error) or "libgthread" in str(error):
            raise MissingLibraryError(
                f"OpenCV is installed but a system library is missing ({error}). Install it (Debian and Ubuntu: "
                "apt-get install libgl1 libglib2.0-0), or replace opencv-python with opencv-python-headless"
            ) from error
        raise MissingLibraryError('solver "opencv" needs OpenCV: pip install "opencv-python<4.12"') from error
    return cv2
