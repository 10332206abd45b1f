"""The *regularised* problem that qpth and ipm solve: its two forms, and what both do to a problem before solving it.

    minimise    1/2 x^T Q x + p^T x     over the flows x >= 0 with the given row and column sums

* ``L2``: Q = l2_strength * I, p = cost. The linear program with a small quadratic term.
* ``QP``: Q = cost cost^T + 1e-4 I, p = 0. Its objective is half the square of the linear one, plus a small term.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .problem import ProblemError, SolverError

FORMS = ("L2", "QP")
QP_RIDGE = 1e-4
# A node with a smaller fraction of the mass counts as one without: it would leave the problem with next to no interior.
SMALLEST_SHARE = 1e-12
# Costs up to this, in units of what the quadratic term adds to the price of a cell that takes all the mass, are never cut.
MOST_RIDGES = 1e6

# cost (B,N,M), supply (B,N), demand (B,M) and the names of the problems -> value (B,), flow (B,N,M)
Solve = Callable[[Tensor, Tensor, Tensor, list[str]], tuple[Tensor, Tensor]]


def solve_prepared(
    solve: Solve,
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    form: str,
    l2_strength: float,
    *,
    span: float,
    leak: float,
) -> tuple[Tensor, Tensor]:
    """``solve`` on the nodes that have mass, in float64. ``(B,N,M), (B,N), (B,M) -> value (B,), flow (B,N,M)``.

    Nodes without mass leave a problem without an interior. They carry no flow, and the gradient of their weight is the
    largest feasible dual.

    Args:
        solve: the solver, for nodes with mass, more than one on each side.
        form, l2_strength: the options of the solver.
        span, leak: see :func:`_solve_bounded`.

    Raises:
        ProblemError: ``form`` is not one of FORMS or ``l2_strength`` not positive.
        SolverError: as :func:`_solve_bounded`.
    """
    if form not in FORMS:
        raise ProblemError(f"expected form to be one of {', '.join(FORMS)}; got {form!r}")
    if not l2_strength > 0:
        raise ProblemError(f"expected a positive l2_strength; got {l2_strength}")
    is_qp = form == "QP"
    ridge = QP_RIDGE if is_qp else l2_strength
    cost, supply, demand = cost.double(), supply.double(), demand.double()
    rows, columns = (w > SMALLEST_SHARE * w.sum(1, keepdim=True) for w in (supply.detach(), demand.detach()))
    batch = torch.arange(len(cost), device=cost.device)

    def solve_part(chosen: Tensor, cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
        if min(cost.shape[1:]) == 1:
            flow = supply.unsqueeze(2) * (demand / demand.sum(1, keepdim=True)).unsqueeze(1)  # the only feasible one
            return (cost * flow).sum((1, 2)), flow
        names = [f"problem {k} of {len(batch)}" for k in chosen.tolist()]
        return _solve_bounded(solve, cost, supply, demand, names, is_qp, ridge, span, leak)

    if bool((rows.all() & columns.all()).item()):
        return solve_part(batch, cost, supply, demand)
    value = (cost.sum((1, 2)) + supply.sum(1) + demand.sum(1)) * 0  # in the graph, where no node has mass
    flow = torch.zeros_like(cost)
    counts = torch.stack([rows.sum(1), columns.sum(1)], dim=1)
    for n, m in counts.unique(dim=0).tolist():
        chosen = batch[(counts[:, 0] == n) & (counts[:, 1] == m)]
        if min(n, m) == 0:
            continue
        i, j = rows[chosen].nonzero()[:, 1].view(-1, n), columns[chosen].nonzero()[:, 1].view(-1, m)
        cells = chosen[:, None, None], i[:, :, None], j[:, None, :]
        weights = supply[chosen[:, None], i], demand[chosen[:, None], j]
        wants_duals = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        if wants_duals:
            weights = tuple(weight if weight.requires_grad else weight.requires_grad_() for weight in weights)
        part_value, part_flow = solve_part(chosen, cost[cells], *weights)
        if wants_duals:
            u, v = torch.autograd.grad(part_value.sum(), weights, retain_graph=True)
            u_all = torch.full_like(supply[chosen], -torch.inf).scatter(1, i, u)
            v_all = torch.zeros_like(demand[chosen]).scatter(1, j, v)
            costs, without = cost[chosen].detach(), (~rows[chosen], ~columns[chosen])
            v_all = torch.where(without[1], (costs - u_all.unsqueeze(2)).amin(1), v_all)
            u_all = torch.where(without[0], (costs - v_all.unsqueeze(1)).amin(2), u_all)
            part_value = part_value + (u_all * without[0] * supply[chosen]).sum(1)
            part_value = part_value + (v_all * without[1] * demand[chosen]).sum(1)
        value = value.index_put((chosen,), part_value)
        flow = flow.index_put(cells, part_flow)
    return value, flow


def _solve_bounded(
    solve: Solve,
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    names: list[str],
    is_qp: bool,
    ridge: float,
    span: float,
    leak: float,
) -> tuple[Tensor, Tensor]:
    """``solve`` with costs cut down to ``span`` times the largest that some node cannot avoid.

    An interior point method resolves costs relative to the largest one, so a cell that is forbidden by a huge cost would
    spoil all others. A flow that is optimal below the ceiling and uses no cell above it is optimal without the ceiling.

    Raises:
        SolverError: cells above the ceiling carry more than ``leak`` of the mass, or costs lie below minus the ceiling.
    """
    size, mass = cost.detach().abs(), supply.detach().sum(1)
    unavoidable = torch.maximum(size.amin(2).amax(1), size.amin(1).amax(1))
    ceiling = torch.maximum(span * unavoidable, MOST_RIDGES * ridge * mass)[:, None, None]
    is_cut = cost.detach() > ceiling
    value, flow = solve(torch.where(is_cut, ceiling, cost), supply, demand, names)
    leaked = (flow.detach() * is_cut).sum((1, 2)) > leak * mass
    below = (size > ceiling).logical_and(~is_cut).any(2).any(1)
    # The square of form QP grows with the costs only where none is negative.
    failed = leaked | below | (is_cut.any(2).any(1) & (cost.detach() < 0).any(2).any(1) & is_qp)
    if bool(failed.any()):
        raise SolverError(
            f"the costs of {names[int(failed.nonzero()[0])]} span too many orders of magnitude for this solver; use simplex"
        )
    return value, flow
