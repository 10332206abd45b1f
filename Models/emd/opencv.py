"""``cv2.EMD``: OpenCV's transportation simplex, one problem at a time, float32, on the CPU.

Gradient: the flow is treated as a constant, so ``d value / d cost = flow`` and ``supply`` and ``demand`` get none.
This is the published "opencv" recipe. It omits the path through the weights, 10-18 % of the gradient's norm on typical
problems.

cv2 returns a flow that is not optimal where it takes more than 500 pivots, or where costs span orders of magnitude: its
tolerance is 1e-5 of the largest. Problems that it does not solve are solved by :mod:`Models.emd.simplex`.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from . import simplex
from .on_cpu import in_threads, to_numpy
from .problem import MissingLibraryError, SolverError

# With more nodes on a side, cv2 is not called. With more on both sides together than the second, or costs that span more
# than the third, its flow is checked.
MOST_NODES, TRUSTED_NODES, TRUSTED_SPAN = 150, 128, 50
OPTIMALITY_TOLERANCE = 1e-5  # relative to the cost of the flow


def solve(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
    """``(B,N,M), (B,N), (B,M) -> value (B,), flow (B,N,M)``. Called by :func:`Models.emd.emd`, which says what is raised."""
    flow = torch.from_numpy(_solve_arrays(*to_numpy(cost, supply, demand, torch.float64)))
    flow = flow.to(device=cost.device, dtype=cost.dtype)
    return (cost * flow).sum((-2, -1)), flow


def _solve_arrays(cost: np.ndarray, supply: np.ndarray, demand: np.ndarray) -> np.ndarray:
    cv2 = _import_cv2()
    with np.errstate(over="ignore"):
        cost32, supply32, demand32 = (array.astype(np.float32) for array in (cost, supply, demand))
    flow = np.zeros_like(cost32)
    skipped = max(cost.shape[1:]) > MOST_NODES or not np.isfinite(cost32).all()
    is_doubtful = _span(cost32) > TRUSTED_SPAN
    is_doubtful |= sum(cost.shape[1:]) > TRUSTED_NODES
    not_solved = list(range(len(cost))) if skipped else []

    def work(first: int, last: int) -> None:
        for index in range(first, last):
            if not supply32[index].any() or not demand32[index].any():
                continue  # no mass, no flow
            weights = supply32[index, :, None], demand32[index, :, None]
            try:
                _, _, flow[index] = cv2.EMD(*weights, cv2.DIST_USER, cost32[index])
            except cv2.error as error:
                raise SolverError(f"opencv failed on problem {index} of {len(cost)}: {error}") from error
            if is_doubtful[index] and not _is_optimal(cost[index], flow[index]):
                not_solved.append(index)

    if not skipped:
        in_threads(work, cost)  # cv2 releases the interpreter lock while it solves
    if not_solved:
        try:
            problems = (array[not_solved] for array in (cost, supply, demand))
            flow[not_solved] = simplex.solve_arrays(*problems, precision=np.finfo(np.float32).eps)[1]
        except MissingLibraryError as error:
            nodes = f"{cost.shape[1]} and {cost.shape[2]} nodes, or costs of very different size"
            raise MissingLibraryError(
                f"OpenCV cannot solve problem {not_solved[0]} of {len(cost)} ({nodes}); solver simplex can, and needs numba: "
                "pip install numba"
            ) from error
    # When cv2 gives up it returns what it has moved so far, so a wrong answer shows in the marginals.
    miss = np.maximum(np.abs(flow.sum(2) - supply).max(1), np.abs(flow.sum(1) - demand).max(1))
    bad = np.flatnonzero(~(miss <= 1e-3 * np.maximum(supply.sum(1), np.finfo(np.float32).tiny)))
    if len(bad):
        index = bad[0]
        raise SolverError(
            f"opencv did not solve problem {index} of {len(cost)}: its flow misses the weights by {miss[index]:.3g}"
        )
    return flow


def _span(cost: np.ndarray) -> np.ndarray:
    """``(B,N,M) -> (B,)``: the largest cost in units of the largest that some node cannot avoid."""
    size = np.abs(cost)
    unavoidable = np.maximum(size.min(2).max(1), size.min(1).max(1))
    return size.max((1, 2)) / np.maximum(unavoidable, np.finfo(np.float32).tiny)


def _is_optimal(cost: np.ndarray, flow: np.ndarray) -> bool:
    """Whether duals show that no flow with the same sums is cheaper than ``flow``, both ``(N,M)``.

    The duals are shortest paths (Bellman-Ford): v is the largest feasible one, u is raised to meet the cells in use.
    """
    moved = flow.astype(np.float64)
    is_used = moved > 1e-6 * moved.max()
    allowed = OPTIMALITY_TOLERANCE * (np.abs(cost) * moved).sum()
    u = np.zeros(len(cost))
    for _ in range(sum(cost.shape)):
        v = (cost - u[:, None]).min(0)
        if ((cost - u[:, None] - v) * moved).sum() <= allowed:
            return True
        u = np.maximum(u, np.where(is_used, cost - v, -np.inf).max(1))
    return False


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
