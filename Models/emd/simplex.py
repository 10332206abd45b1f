"""The network simplex: exact, with both vectors of duals. In numba on the CPU, float64, several problems at a time; on a CUDA
device by :mod:`Models.emd.simplex_cuda`, in the dtype of the input.

Gradient ``full``: that of the linear program itself, for cost and both weight vectors. Gradient ``cost``: the flow is
treated as a constant and the weights get none, as in :mod:`Models.emd.opencv`.
"""

import sys
import threading
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from . import simplex_cuda
from .on_cpu import in_threads, to_numpy
from .problem import MissingLibraryError, ProblemError, SolverError

GRADIENTS = {"full": "for cost and weights", "cost": "for the cost only, as with opencv"}
ROWS_PER_PRICING = 12  # priced together before a pivot: fewer find a cell sooner, more find a better one
SECONDS_BEFORE_NOTICE = 2.0


def solve(cost: Tensor, supply: Tensor, demand: Tensor, *, gradient: str = "full") -> tuple[Tensor, Tensor]:
    """``(B,N,M), (B,N), (B,M) -> value (B,), flow (B,N,M)``, see :func:`Models.emd.emd`. ``gradient`` is a key of GRADIENTS."""
    if gradient not in GRADIENTS:
        raise ProblemError(f"unknown gradient {gradient!r}; choose one of {', '.join(GRADIENTS)}")
    if gradient == "cost":
        supply, demand = supply.detach(), demand.detach()
    precision = max(torch.finfo(weight.dtype).eps for weight in (supply, demand))
    dtype = torch.promote_types(cost.dtype, torch.promote_types(supply.dtype, demand.dtype))
    if cost.device.type == "cuda" and simplex_cuda.is_usable(cost.device, *cost.shape[1:], dtype):
        precision = None
    else:
        dtype = torch.float64
    return _Simplex.apply(cost.to(dtype), supply.to(dtype), demand.to(dtype), precision)


class _Simplex(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cost, supply, demand, precision):
        if precision is None:  # on the device
            inputs = (tensor.detach().contiguous() for tensor in (cost, supply, demand))
            value, flow, u, v, *_ = simplex_cuda.solve_tensors(*inputs)
        else:
            arrays = solve_arrays(*to_numpy(cost, supply, demand, torch.float64), precision=precision)
            value, flow, u, v = (torch.from_numpy(array) for array in arrays)
        if value.device != cost.device:  # one transfer back
            packed = torch.cat([value.unsqueeze(1), flow.flatten(1), u, v], dim=1).to(cost.device)
            value, flow, u, v = packed.split([1, flow[0].numel(), u.shape[1], v.shape[1]], dim=1)
            value, flow = value.squeeze(1), flow.reshape(cost.shape)
        ctx.save_for_backward(flow, u, v)
        ctx.mark_non_differentiable(flow)
        return value, flow

    # The value of a linear program as a function of its data. By strong duality
    #
    #     value(c, s, d) = min { <c, x> : x 1 = s, x^T 1 = d, x >= 0 } = max { <s, u> + <d, v> : u_i + v_j <= c_ij }.
    #
    # The first is a minimum of functions linear in c, the second a maximum of functions linear in (s, d). Where the optimum
    # is unique, the gradient is that of the function that attains it (envelope theorem):
    #
    #     d value / d c = x,      d value / d s = u,      d value / d d = v.
    #
    # Elsewhere these are a supergradient in c and a subgradient in (s, d). As the totals of s and d must agree, u and v are
    # determined up to a constant that moves from one to the other; changes that keep the totals equal do not see it.
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_value, _):
        flow, u, v = ctx.saved_tensors
        wants_cost, wants_supply, wants_demand, _ = ctx.needs_input_grad
        return (
            grad_value[:, None, None] * flow if wants_cost else None,
            grad_value[:, None] * u if wants_supply else None,
            grad_value[:, None] * v if wants_demand else None,
            None,
        )


def solve_arrays(
    cost: np.ndarray, supply: np.ndarray, demand: np.ndarray, *, precision: float = np.finfo(np.float64).eps
) -> tuple[np.ndarray, ...]:
    """Contiguous float64 ``(B,N,M), (B,N), (B,M)`` to value ``(B,)``, flow ``(B,N,M)`` and duals ``u (B,N), v (B,M)``.

    ``precision`` is the relative error of the weights: where forbidden cells separate some nodes from the others, their totals
    are equal only up to this error.

    Raises:
        SolverError: a problem was not solved within its limit of pivots, or its costs cannot be told apart in float64.
        MissingLibraryError: numba cannot be imported.
    """
    kernel = _kernel()
    value, flow, u, v = np.empty(len(cost)), np.empty_like(cost), np.empty_like(supply), np.empty_like(demand)
    status, pivots = np.empty((2, len(cost)), np.int64)

    def work(first: int, last: int) -> None:
        kernel.solve_range(
            cost, supply, demand, first, last, precision, ROWS_PER_PRICING, value, flow, u, v, status, pivots
        )

    in_threads(work, cost)
    for index in np.flatnonzero(status != kernel.SOLVED)[:1]:
        why = {1: f" within {pivots[index]} pivots", 2: ": its costs span too many orders of magnitude"}[status[index]]
        raise SolverError(f"simplex did not solve problem {index} of {len(cost)}{why}")
    return value, flow, u, v


@lru_cache(maxsize=1)
def _kernel():
    """The module, compiled, or read from numba's cache."""
    try:
        import numba  # noqa: F401 - imported here so that an ImportError can mean nothing else
    except ImportError as error:
        raise MissingLibraryError(f'solver "simplex" needs numba: pip install numba ({error})') from error
    from . import simplex_kernel

    kept = "cached for later runs" if simplex_kernel.CACHE else "set NUMBA_CACHE_DIR to a writable folder to keep it"
    message = f"compiling the simplex solver ({kept})"
    notice = threading.Timer(SECONDS_BEFORE_NOTICE, print, [message], {"file": sys.stderr})
    notice.daemon = True
    notice.start()
    try:
        cells, nodes, one, state = np.ones((1, 1, 1)), np.ones((1, 1)), np.ones(1), np.ones(1, np.int64)
        simplex_kernel.solve_range(cells, nodes, nodes, 0, 1, 1e-16, 1, one, cells, nodes, nodes, state, state)
    finally:
        notice.cancel()
    return simplex_kernel
