"""A batched primal-dual interior point method for the regularised problem: any device, float64, torch operations only.

Problem and gradient are those of :mod:`Models.emd.qpth_qp`, but it exploits the structure: the constraints are row and column
sums and the Hessian is diagonal (plus rank one), so a Newton step is a system of M - 1 unknowns instead of N*M.
"""

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from .forms import QP_RIDGE, solve_prepared
from .problem import SolverError

MAX_ITERATIONS = 60
ITERATIONS_BETWEEN_CHECKS = 2
# Complementarity x z, relative to its scale: the iteration stops at the first, and a problem that rounding keeps above it
# still counts as solved at the second.
TOLERANCE, ACCEPTABLE = 1e-11, 1e-8
STEP_TO_BOUNDARY = 0.995
# The smallest entry of the Newton system's diagonal that the gradient keeps, relative to the largest: where the
# optimum is a corner with fewer cells than nodes, the system without it falls apart.
SMALLEST_THETA = 1e-13
LARGEST_LEAK = 1e-7  # see solve_prepared

_warm_up_lock = threading.Lock()
_warm_devices: set[torch.device] = set()


def solve(
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    *,
    form: str = "L2",
    l2_strength: float = 1e-6,
    differentiable_flow: bool = False,
) -> tuple[Tensor, Tensor]:
    """As ``solve`` of qpth_qp. ``differentiable_flow`` keeps the gradient of the flow, which the regularised problem has."""
    # torch loads its linear algebra for CUDA on first use, which fails if several threads are the first at once.
    with _warm_up_lock:
        if cost.device not in _warm_devices:
            torch.linalg.cholesky_ex(torch.eye(2, dtype=torch.float64, device=cost.device))
            _warm_devices.add(cost.device)

    def solve_dense(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
        if cost.shape[2] > cost.shape[1]:  # factorise the smaller side
            value, flow = _InteriorPoint.apply(cost.mT, demand, supply, form == "QP", l2_strength)
            return value, flow.mT
        return _InteriorPoint.apply(cost, supply, demand, form == "QP", l2_strength)

    return solve_prepared(solve_dense, (cost, supply, demand), form, l2_strength, LARGEST_LEAK)


# Optimality, with duals u, v of the sums and z of x >= 0:
#
#     Q x + p - u - v - z = 0,    x 1 = s,    x^T 1 = d,    x z = 0,    x, z >= 0.
#
# A Newton step from (x, u, v, z), with dz eliminated, is (Q + z/x) dx - du - dv = h and the row and column sums of dx
# given. Q + z/x = diag(1/theta) + [QP] c c^T. Without the rank-one part dx = theta (du + dv + h); eliminating du likewise
# leaves
#
#     (D_c - theta^T D_r^-1 theta) dv = right-hand side,     D_r, D_c the row and column sums of theta:
#
# the Laplacian of a graph on the columns with edge weights W = theta^T D_r^-1 theta. It is singular, because v is
# determined up to a constant, so the last dv is set to 0. Its diagonal is summed from W instead of subtracted, which keeps
# it accurate to the end, where theta spans twenty orders of magnitude.


class _Factors(NamedTuple):
    theta: Tensor  # (B,N,M)
    row_sum: Tensor  # (B,N)
    cholesky: Tensor  # (B,M-1,M-1)
    is_sound: Tensor  # (B,): whether that factor exists
    rank_one: Tensor | None  # (B,N,M): the cost, where Q has the part c c^T
    answer: tuple[Tensor, Tensor, Tensor] | None  # dx, du, dv of the system without that part, for h = c


def _factorise(theta: Tensor, rank_one: Tensor | None) -> _Factors:
    row_sum = theta.sum(2)
    weights = theta.mT @ (theta / row_sum.unsqueeze(2))  # (B,M,M)
    weights.diagonal(dim1=1, dim2=2).zero_()
    laplacian = torch.diag_embed(weights.sum(2)) - weights
    cholesky, fault = torch.linalg.cholesky_ex(laplacian[:, :-1, :-1])
    factors = _Factors(theta, row_sum, cholesky, fault == 0, None, None)
    if rank_one is None:
        return factors
    answer = _newton(factors, rank_one, torch.zeros_like(row_sum), torch.zeros_like(theta[:, 0]))
    return factors._replace(rank_one=rank_one, answer=answer)


def _newton(factors: _Factors, h: Tensor, row_change: Tensor, column_change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, du, dv of the step above, for h ``(B,N,M)`` and the changes of the row and column sums."""
    theta, row_sum, cholesky, _, rank_one, answer = factors
    scaled = theta * h
    row_rest, column_rest = row_change - scaled.sum(2), column_change - scaled.sum(1)
    right = column_rest - (theta * (row_rest / row_sum).unsqueeze(2)).sum(1)
    dv = torch.zeros_like(column_change)
    dv[:, :-1] = torch.cholesky_solve(right[:, :-1, None], cholesky)[..., 0]
    du = (row_rest - (theta @ dv.unsqueeze(2)).squeeze(2)) / row_sum
    dx = theta * (du.unsqueeze(2) + dv.unsqueeze(1) + h)
    if rank_one is None:
        return dx, du, dv
    # Sherman-Morrison: h becomes h - c tau with tau = <c, dx>.
    tau = _total(rank_one * dx) / (1 + _total(rank_one * answer[0]))
    return dx - tau * answer[0], du - tau[:, 0] * answer[1], dv - tau[:, 0] * answer[2]


class _InteriorPoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cost, supply, demand, is_qp, l2_strength):
        ctx.is_qp, ctx.ridge = is_qp, QP_RIDGE if is_qp else l2_strength
        flow, dual = _solve(cost, supply, demand, ctx.ridge, is_qp)
        ctx.save_for_backward(cost, flow, dual)
        return (cost * flow).sum((1, 2)), flow

    # With y = (u, v), b = (s, d), A the sums and H = Q + z/x, the optimum moves as
    #
    #     [ H  -A^T ] [dx]   [-dp - dQ x]
    #     [ A    0  ] [dy] = [    db    ],
    #
    # so for a loss with d loss / d x = g, and w, y from the transposed system  H w + A^T y = g,  A w = 0:
    #
    #     d loss / d p = -w,     d loss / d b = y,
    #
    # and in form QP, where dQ x = dc <c, x> + c <dc, x>,  d loss / d c = -w <c, x> - x <c, w>.
    # The value <c, x> gives g = c, and adds x to the gradient for c.
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_value, grad_flow):
        cost, flow, dual = ctx.saved_tensors
        grad_value = grad_value[:, None, None]
        g = grad_value * cost + grad_flow
        theta = 1 / (ctx.ridge + dual / flow)
        theta = torch.maximum(theta, SMALLEST_THETA * theta.amax((1, 2), keepdim=True))
        factors = _factorise(theta, cost if ctx.is_qp else None)
        w, minus_u, minus_v = _newton(factors, g, torch.zeros_like(flow[:, :, 0]), torch.zeros_like(flow[:, 0]))
        failed = ~(factors.is_sound & torch.isfinite(w).all(2).all(1))
        if bool(failed.any()):
            which = f"problem {int(failed.nonzero()[0])} of {len(cost)}"
            raise SolverError(f"ipm met a singular system in the gradient of {which}")
        moved = w * _total(cost * flow) + flow * _total(cost * w) if ctx.is_qp else w
        return grad_value * flow - moved, -minus_u, -minus_v, None, None


def _total(values: Tensor) -> Tensor:
    return values.sum((1, 2), keepdim=True)


def _solve(cost: Tensor, supply: Tensor, demand: Tensor, ridge: float, is_qp: bool) -> tuple[Tensor, Tensor]:
    """The flow x and the duals z of x >= 0, both ``(B,N,M)`` and positive."""
    total = supply.sum(1, keepdim=True)
    demand = demand * (total / demand.sum(1, keepdim=True))

    def gradient(x: Tensor) -> Tensor:
        return ridge * x + (cost * _total(cost * x) if is_qp else cost)

    # Start half way between the product flow, which satisfies all sums but is close to the boundary where weights are small,
    # and a uniform flow. The duals satisfy stationarity, with u small enough to keep z positive.
    even = total / (supply.shape[1] * demand.shape[1])
    x = (supply.unsqueeze(2) * demand.unsqueeze(1) / total.unsqueeze(2) + even.unsqueeze(2)) / 2
    slope = gradient(x)
    scale = slope.abs().amax((1, 2)).clamp_min(torch.finfo(x.dtype).tiny)
    u = slope.amin(2) - scale.unsqueeze(1)
    v = torch.zeros_like(demand)
    z = slope - u.unsqueeze(2)
    goal = scale * total[:, 0] / x[0].numel()  # the scale of complementarity per cell

    done = torch.zeros_like(goal, dtype=torch.bool)
    for iteration in range(MAX_ITERATIONS):
        mu = (x * z).mean((1, 2))
        done = mu <= TOLERANCE * goal
        if iteration % ITERATIONS_BETWEEN_CHECKS == 0 and bool(done.all()):
            break
        stationarity = gradient(x) - u.unsqueeze(2) - v.unsqueeze(1) - z
        row_change, column_change = supply - x.sum(2), demand - x.sum(1)
        factors = _factorise(1 / (ridge + z / x), cost if is_qp else None)
        # Mehrotra's predictor-corrector: a plain Newton step gives the centring parameter and the second-order error.
        dx, _, _ = _newton(factors, -stationarity - z, row_change, column_change)
        dz = -z - z / x * dx
        reach = _step_length(x, dx, z, dz)
        mu_ahead = ((x + reach * dx) * (z + reach * dz)).mean((1, 2))
        centre = (mu * (mu_ahead / mu).clamp(0, 1) ** 3)[:, None, None]
        complementarity = centre - x * z - dx * dz
        dx, du, dv = _newton(factors, complementarity / x - stationarity, row_change, column_change)
        dz = (complementarity - z * dx) / x
        step = (STEP_TO_BOUNDARY * _step_length(x, dx, z, dz)).clamp_max(1)
        # A problem that is done, or whose system is numerically singular, stays where it is.
        usable = (factors.is_sound & torch.isfinite(dx + dz).all(2).all(1) & ~done)[:, None, None]
        x = torch.where(usable, x + step * dx, x)
        z = torch.where(usable, z + step * dz, z)
        u = torch.where(usable[:, 0], u + step[:, 0] * du, u)
        v = torch.where(usable[:, 0], v + step[:, 0] * dv, v)

    _check_optimality(
        complementarity=(x * z).mean((1, 2)) / goal,
        stationarity=(gradient(x) - u.unsqueeze(2) - v.unsqueeze(1) - z).abs().amax((1, 2)) / scale,
        rows=(x.sum(2) - supply).abs().amax(1) / total[:, 0],
        columns=(x.sum(1) - demand).abs().amax(1) / total[:, 0],
    )
    return x, z


def _check_optimality(**residuals: Tensor) -> None:
    """Raise SolverError unless all residuals ``(B,)``, each relative to its scale, are at most ACCEPTABLE."""
    failed = ~(torch.stack(list(residuals.values())) <= ACCEPTABLE).all(0)
    if bool(failed.any()):
        index = int(failed.nonzero()[0])
        found = ", ".join(f"{what} {float(value[index]):.2g}" for what, value in residuals.items())
        where = f"problem {index} of {len(failed)} within {MAX_ITERATIONS} iterations"
        raise SolverError(f"ipm did not converge on {where}; relative residuals: {found}")


def _step_length(x: Tensor, dx: Tensor, z: Tensor, dz: Tensor) -> Tensor:
    """``(B,1,1)``: the longest step that keeps x and z non-negative, at most 1 after scaling by STEP_TO_BOUNDARY."""
    ahead_x = torch.where(dx < 0, -x / dx, torch.inf).amin((1, 2))
    ahead_z = torch.where(dz < 0, -z / dz, torch.inf).amin((1, 2))
    return torch.minimum(ahead_x, ahead_z).clamp_max(1 / STEP_TO_BOUNDARY)[:, None, None]
