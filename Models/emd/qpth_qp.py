"""QPTH: the transportation problem as a dense quadratic program, by a batched interior point method in float64.

    minimise    1/2 x^T Q x + p^T x
    subject to  x >= 0,   row sums <= supply,   column sums <= demand,   sum x = total

with x the N*M entries of the flow (DeepEMD paper, section 3.2), Q and p as in :mod:`Models.emd.forms`.

Gradient: implicit function theorem on the optimality conditions, for the cost *and* both weight vectors. Memory: Q and
the constraints are dense, (N*M)^2 doubles each, per problem.
"""

import threading
import warnings

import torch
from torch import Tensor

from .forms import QP_RIDGE, solve_prepared
from .on_cpu import one_thread
from .problem import MissingLibraryError, SolverError

# qpth does not report how good its answer is. A flow that misses the weights by more than the first fraction of the mass is
# an error, one that misses them by more than the second a warning.
MARGINAL_FAILURE, MARGINAL_WARNING = 1e-2, 1e-3
# A value below the least cost of the mass, or above the largest, by more than this fraction of the largest in size, is an error.
VALUE_FAILURE = 1e-2
LARGEST_LEAK = 1e-3  # see solve_prepared

# qpth keeps a work matrix in a global; its batched LU of more than about 150 unknowns hangs in several MKL threads.
_one_at_a_time = threading.RLock()


def solve(
    cost: Tensor, supply: Tensor, demand: Tensor, *, form: str = "L2", l2_strength: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``(B,N,M), (B,N), (B,M) -> value (B,), flow (B,N,M)``, see :func:`Models.emd.emd`; ``form`` as in :mod:`Models.emd.forms`.

    ``l2_strength`` is the weight of the quadratic term of form ``L2``, positive. Larger is smoother and less exact.
    """
    return solve_prepared(
        lambda *dense: _Qpth.apply(*dense, form, l2_strength), (cost, supply, demand), form, l2_strength, LARGEST_LEAK
    )


class _Qpth(torch.autograd.Function):
    """qpth's own graph, wrapped so that forward and backward both run under the lock."""

    @staticmethod
    def forward(ctx, cost, supply, demand, form, l2_strength):
        ctx.form = form
        ctx.leaves = [x.detach().requires_grad_(ctx.needs_input_grad[i]) for i, x in enumerate((cost, supply, demand))]
        with _one_at_a_time, one_thread(cost.device), torch.enable_grad():
            flow = _solve_qp(*ctx.leaves, form, l2_strength)
            ctx.inner = (ctx.leaves[0] * flow).sum((-2, -1))
        flow = flow.detach()
        ctx.mark_non_differentiable(flow)
        return ctx.inner.detach(), flow

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_value, _):
        wanted = [leaf for leaf in ctx.leaves if leaf.requires_grad]
        with _one_at_a_time, one_thread(grad_value.device):
            try:
                found = iter(torch.autograd.grad(ctx.inner, wanted, grad_value, retain_graph=True))
            except RuntimeError as error:
                raise SolverError(f"qpth met a singular system in the gradient (form {ctx.form}): {error}") from error
        return (*(next(found) if leaf.requires_grad else None for leaf in ctx.leaves), None, None)


def _solve_qp(cost: Tensor, supply: Tensor, demand: Tensor, form: str, l2_strength: float) -> Tensor:
    try:
        from qpth.qp import QPFunction
    except ImportError as error:
        raise MissingLibraryError(f'solver "qpth" needs qpth: pip install qpth "numpy<2" ({error})') from error

    batch, n, m = cost.shape
    flat = cost.reshape(batch, n * m)
    identity = torch.eye(n * m, dtype=cost.dtype, device=cost.device)
    if form == "L2":
        quadratic, linear = l2_strength * identity, flat
    else:
        quadratic, linear = flat.unsqueeze(2) * flat.unsqueeze(1) + QP_RIDGE * identity, torch.zeros_like(flat)
    # Whatever carries a gradient is passed per problem, because qpth averages (instead of summing) the gradient of
    # what it broadcasts over the batch. Constants are shared.
    cells = identity.reshape(n, m, n * m)
    constraints = torch.cat([-identity, cells.sum(1), cells.sum(0)])  # x >= 0, rows, columns
    bounds = torch.cat([torch.zeros_like(flat), supply, demand], dim=1)
    ones = identity.new_ones(1, n * m)
    total = torch.minimum(supply.sum(1), demand.sum(1)).unsqueeze(1)
    try:
        flow = QPFunction(verbose=-1, check_Q_spd=False)(quadratic, linear, constraints, bounds, ones, total)
        if flow is None:
            raise RuntimeError("its first step met a singular system")
    except RuntimeError as error:  # qpth does not tell which problem failed
        raise SolverError(f"qpth failed on one of {batch} problems (form {form}): {error}") from error
    flow = flow.reshape(batch, n, m)
    _check_flow(flow.detach(), cost.detach(), supply.detach(), demand.detach(), form)
    return flow


def _check_flow(flow: Tensor, cost: Tensor, supply: Tensor, demand: Tensor, form: str) -> None:
    mass, least, largest = supply.sum(1), cost.amin((1, 2)), cost.amax((1, 2))
    miss = torch.maximum((flow.sum(2) - supply).abs().amax(1), (flow.sum(1) - demand).abs().amax(1)) / mass
    price, slack = (cost * flow).sum((1, 2)) / mass, VALUE_FAILURE * torch.maximum(largest.abs(), least.abs())
    beyond = torch.maximum(least - price, price - largest)
    failed = ~((miss <= MARGINAL_FAILURE) & (beyond <= slack))
    index = int(failed.nonzero()[0]) if bool(failed.any()) else int(miss.argmax())
    what = (
        f"qpth did not converge on problem {index} of {len(flow)} (form {form}): its flow misses the weights by "
        f"{float(miss[index]):.2g} of the mass and costs {float(price[index]):.3g} per unit of mass, where cells cost "
        f"{float(least[index]):.3g} to {float(largest[index]):.3g}"
    )
    if bool(failed.any()):
        raise SolverError(what)
    if float(miss[index]) > MARGINAL_WARNING:
        warnings.warn(what, stacklevel=2)
