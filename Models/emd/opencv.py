"""``cv2.EMD``: OpenCV's transportation simplex, one problem at a time, float32, on the CPU.

Gradient: the flow is treated as a constant, so ``d value / d cost = flow`` and ``supply`` and ``demand`` get none.
This is the published "opencv" recipe. It omits the path through the weights, 10-18 % of the gradient's norm on typical
problems.

cv2 returns a flow that is not optimal where it takes more than 500 pivots, or where costs span orders of magnitude: its
tolerance is 1e-5 of the largest. Such problems are solved by :mod:`Models.emd.simplex` as well, whose flow is returned where
that of cv2 is more expensive.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from . import simplex
from .on_cpu import in_threads, to_numpy
from .problem import MissingLibraryError, SolverError

# cv2 is not called with more than MOST_NODES on a side. Its flow is compared with that of simplex with more than TRUSTED_NODES on
# both sides together, or where a cost is more than TRUSTED_SPAN times the largest that some node cannot avoid.
MOST_NODES, TRUSTED_NODES, TRUSTED_SPAN = 150, 128, 50
OPTIMALITY_TOLERANCE = 1e-5  # relative to the cost of the flow


def solve(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
    """``(B,N,M), (B,N), (B,M) -> value (B,), flow (B,N,M)``. Called by :func:`Models.emd.emd`, which says what is raised."""
    flow = torch.from_numpy(_solve_arrays(*to_numpy(cost, supply, demand, torch.float64)))
    flow = flow.to(device=cost.device, dtype=cost.dtype)
    return (cost * flow).sum((-2, -1)), flow


def _solve_arrays(cost: np.ndarray, supply: np.ndarray, demand: np.ndarray) -> np.ndarray:
    cv2 = _import_cv2()
    size, (batch, n, m), tiny = np.abs(cost), cost.shape, np.finfo(np.float32).tiny
    unavoidable = np.maximum(size.min(2).max(1), size.min(1).max(1))
    doubtful = size.max((1, 2)) > TRUSTED_SPAN * np.maximum(unavoidable, tiny)
    doubtful |= n + m > TRUSTED_NODES
    with np.errstate(over="ignore"):
        cost32, supply32, demand32 = (array.astype(np.float32) for array in (cost, supply, demand))
    flow = np.zeros_like(cost32)
    is_skipped = (max(n, m) > MOST_NODES) | ~np.isfinite(cost32).all((1, 2)) | ~supply32.any(1) | ~demand32.any(1)

    def work(first: int, last: int) -> None:
        for index in range(first, last):
            if is_skipped[index]:
                continue
            weights = supply32[index, :, None], demand32[index, :, None]
            try:
                _, _, flow[index] = cv2.EMD(*weights, cv2.DIST_USER, cost32[index])
            except cv2.error as error:
                raise SolverError(f"opencv failed on problem {index} of {batch}: {error}") from error

    in_threads(work, cost)  # cv2 releases the interpreter lock while it solves
    # When cv2 gives up it returns what it has moved so far, so a wrong answer shows in the marginals.
    miss = np.maximum(np.abs(flow.sum(2) - supply).max(1), np.abs(flow.sum(1) - demand).max(1))
    missed = ~(miss <= 1e-3 * np.maximum(supply.sum(1), tiny))
    for index in np.flatnonzero(missed & ~doubtful)[:1]:
        which = f"problem {index} of {batch}"
        raise SolverError(f"opencv did not solve {which}: its flow misses the weights by {miss[index]:.3g}")
    if doubtful.any():
        chosen = np.flatnonzero(doubtful)
        try:
            problems = cost[chosen], supply[chosen], demand[chosen]
            exact = simplex.solve_arrays(*problems, precision=np.finfo(np.float32).eps)[1]
        except MissingLibraryError as error:
            raise MissingLibraryError(
                f"OpenCV alone cannot be trusted with problem {chosen[0]} of {batch} ({n} and {m} nodes, or costs of very "
                "different size); solver simplex checks it, and needs numba: pip install numba"
            ) from error
        excess, price = (cost[chosen] * (flow[chosen] - exact)).sum((1, 2)), (size[chosen] * exact).sum((1, 2))
        is_dear = ~(excess <= OPTIMALITY_TOLERANCE * price) | missed[chosen]
        flow[chosen[is_dear]] = exact[is_dear]
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
