"""The *regularised* problem that qpth and ipm solve: its two forms, and what both do to a problem before solving it.

    minimise    1/2 x^T Q x + p^T x     over the flows x >= 0 with the given row and column sums

* ``L2``: Q = l2_strength * I, p = cost. The linear program with a small quadratic term.
* ``QP``: Q = cost cost^T + 1e-4 I, p = 0. Its objective is half the square of the linear one, plus a small term.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import simplex
from .problem import ProblemError, SolverError

FORMS = ("L2", "QP")
QP_RIDGE = 1e-4
# Nodes with less than this fraction of the mass get it, because without mass they leave a problem without an interior. They
# carry no flow, and their weights have the gradient zero.
SMALLEST_SHARE = 3e-8
# Costs are cut at this many times the largest that some node cannot avoid, because an interior point method resolves costs
# relative to the largest one. They are never cut below so many times what the quadratic term adds to the price of a cell that
# takes all the mass, nor where an optimal flow may need them. Costs below the last times the largest are then not resolved.
LARGEST_SPAN, MOST_RIDGES, RESOLVED = 1e3, 1e6, 1e-9


def solve_prepared(
    solve: Callable[..., tuple[Tensor, Tensor]], problem: tuple[Tensor, ...], form: str, l2_strength: float, leak: float
) -> tuple[Tensor, Tensor]:
    """``solve`` in float64, with weights raised and costs cut. ``(B,N,M), (B,N), (B,M) -> value (B,), flow (B,N,M)``.

    A flow that is optimal with costs cut and uses no cell that was cut is optimal.

    Raises:
        ProblemError: ``form`` is not one of FORMS or ``l2_strength`` not positive.
        SolverError: cells that were cut carry more than ``leak`` of the mass, costs are as far below zero, or not resolved.
    """
    if form not in FORMS:
        raise ProblemError(f"unknown form {form!r}; choose one of {', '.join(FORMS)}")
    if not l2_strength > 0:
        raise ProblemError(f"l2_strength must be above 0; it is {l2_strength}")
    cost, supply, demand = (tensor.double() for tensor in problem)
    if min(cost.shape[1:]) == 1:  # one feasible flow, and no interior
        total = demand.sum(1, keepdim=True)
        flow = supply.unsqueeze(2) * (demand / torch.where(total > 0, total, 1)).unsqueeze(1)
        return (cost * flow).sum((1, 2)), flow
    ridge, mass = QP_RIDGE if form == "QP" else l2_strength, supply.detach().sum(1)
    has_mass, raised, is_empty = mass > 0, [], []
    for weight in (supply, demand):
        least = torch.where(has_mass, SMALLEST_SHARE * mass, 1 / weight.shape[1])[:, None]
        is_empty.append(weight.detach() < least)
        raised.append(torch.where(is_empty[-1], least, weight))
    of_empty = is_empty[0].unsqueeze(2) | is_empty[1].unsqueeze(1)
    cost = cost.masked_fill(of_empty, 0)
    size = cost.detach().abs()
    price = size.masked_fill(of_empty, torch.inf)
    least_prices = torch.cat([price.amin(2), price.amin(1)], dim=1)
    unavoidable = least_prices.masked_fill(torch.cat(is_empty, dim=1), 0).amax(1)
    lowest = ceiling = torch.maximum(LARGEST_SPAN * unavoidable, MOST_RIDGES * ridge * mass)[:, None, None]
    rounding = max(1e-9, 32 * max(torch.finfo(weight.dtype).eps for weight in problem[1:]))
    while bool((is_cut := cost.detach() > ceiling).any()):
        # An optimal flow uses no cell of more than 2 min(N, M) times the dearest of another flow: exchanging around a cycle of
        # other cells is cheaper. ``forced`` is the mass that no flow keeps out of the cells above that.
        near = cost.detach() > ceiling / (2 * min(cost.shape[1:]))
        forced, _ = simplex.solve(near.double(), supply.detach(), demand.detach())
        is_low = ((forced.detach() > rounding * mass) & is_cut.any(2).any(1))[:, None, None]
        if not bool(is_low.any()):
            break
        ceiling = torch.where(is_low, 10 * ceiling, ceiling)
    largest = torch.minimum(size.amax((1, 2), keepdim=True), ceiling)
    is_hidden = (ceiling > lowest) & (size > 0) & (size < RESOLVED * largest)
    # The square of form QP grows with the costs only where none is negative.
    is_negative = (cost.detach() < (-ceiling if form == "L2" else 0)) & (size > ceiling).any(2).any(1)[:, None, None]
    failed = (is_hidden | is_negative).any(2).any(1)
    if not bool(failed.any()):
        value, flow = solve(torch.where(is_cut, ceiling, cost), *raised)
        failed = (flow.detach() * is_cut).sum((1, 2)) > leak * mass
    if bool(failed.any()):
        which = f"problem {int(failed.nonzero()[0])} of {len(cost)}"
        raise SolverError(f"the costs of {which} span too many orders of magnitude for this solver; use simplex")
    return value * has_mass, flow.masked_fill(of_empty, 0)
