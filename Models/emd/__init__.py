"""The Earth Mover's Distance between two weighted sets of nodes, as a differentiable layer.

The transportation problem (DeepEMD paper, section 3.2)::

    minimise    <cost, flow>
    subject to  flow 1 = supply,   flow^T 1 = demand,   flow >= 0

This package needs nothing but torch, and whatever the chosen solver needs; the folder may be lifted out as it is
(without its __pycache__, where numba keeps what it compiled under this name).

    >>> import torch
    >>> from Models.emd import emd, scale_to_mass
    >>> points, others = torch.rand(1, 6, 2), torch.rand(1, 4, 2)
    >>> weights = scale_to_mass(torch.ones(1, 6), 1.0), scale_to_mass(torch.ones(1, 4), 1.0)
    >>> result = emd(torch.cdist(points, others), *weights, solver="opencv")
    >>> result.value.shape, result.flow.shape
    (torch.Size([1]), torch.Size([1, 6, 4]))
"""

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import EmdError, MissingLibraryError, ProblemError, SolverError

__all__ = [
    "SOLVERS",
    "EmdError",
    "EmdResult",
    "MissingLibraryError",
    "ProblemError",
    "Solver",
    "SolverError",
    "emd",
    "scale_to_mass",
]

# Totals are compared after a sum over at most a few hundred nodes; float32 weights that were scaled to the same mass
# differ by about 1e-6 of it. A real mismatch (a forgotten scaling) is larger by orders of magnitude.
TOTALS_TOLERANCE = 1e-4


class EmdResult(NamedTuple):
    """What :func:`emd` returns."""

    value: Tensor  # (...,)      <cost, flow>, differentiable as the solver says
    flow: Tensor  # (..., N, M)  the optimal flow, detached unless the solver was asked otherwise


class Solver(NamedTuple):
    """One row of :data:`SOLVERS`."""

    module: str  # the module of this package whose ``solve`` does it; imported when first used
    options: tuple[str, ...]  # the keyword arguments that ``solve`` takes
    summary: str


SOLVERS: dict[str, Solver] = {
    "opencv": Solver("opencv", (), "exact, float32, on the CPU; gradient for the cost only"),
    "simplex": Solver(
        "simplex",
        ("gradient",),
        "exact, float64, on the CPU, fast; gradient for cost and weights, or for the cost only",
    ),
    "ipm": Solver(
        "interior_point",
        ("form", "l2_strength", "differentiable_flow"),
        "the problem of qpth by a faster method, on any device",
    ),
    "qpth": Solver(
        "qpth_qp", ("form", "l2_strength"), "regularised, float64, on any device; gradient for cost and weights"
    ),
}


def emd(cost: Tensor, supply: Tensor, demand: Tensor, *, solver: str = "opencv", **options: Any) -> EmdResult:
    """Solve a batch of transportation problems.

    Args:
        cost: ``(..., N, M)``, float32 or float64, finite. ``cost[..., i, j]`` is the price of moving one unit of
            mass from node i to node j; it may be negative.
        supply: ``(..., N)``, non-negative: the mass that node i gives.
        demand: ``(..., M)``, non-negative: the mass that node j takes. Sums to the same total as ``supply``.
        solver: a key of :data:`SOLVERS`.
        options: what the solver takes; see its module.

    Returns:
        ``value (...)`` and ``flow (..., N, M)``, in the dtype and on the device of ``cost``. How ``value`` is
        differentiable is said in the docstring of the solver's module. Inputs are never modified.

    Raises:
        ProblemError: (a ValueError) an unknown solver or option, or input that breaks what is said above.
        SolverError: the solver failed; the message names the problem by its index in the flattened batch.
        MissingLibraryError: (an ImportError) the solver's library is not there; the message says what to install.
    """
    if solver not in SOLVERS:
        raise ProblemError(f"expected solver to be one of {', '.join(SOLVERS)}; got {solver!r}")
    unknown = [name for name in options if name not in SOLVERS[solver].options]
    if unknown:
        known = ", ".join(SOLVERS[solver].options) or "none"
        raise ProblemError(f"solver {solver!r} does not take the option {unknown[0]!r}; it takes: {known}")
    _check(cost, supply, demand)

    batch_shape, (n, m) = cost.shape[:-2], cost.shape[-2:]
    if batch_shape.numel() == 0:
        # Sums of nothing, so that the result still hangs on the graph of the inputs.
        return EmdResult(value=(cost.sum((-2, -1)) + supply.sum(-1) + demand.sum(-1)) * 0, flow=cost.detach().clone())
    solve = importlib.import_module(f"{__name__}.{SOLVERS[solver].module}").solve
    with torch.autocast(device_type=cost.device.type, enabled=False):
        value, flow = solve(cost.reshape(-1, n, m), supply.reshape(-1, n), demand.reshape(-1, m), **options)
    flow = flow if options.get("differentiable_flow") else flow.detach()
    return EmdResult(value.to(cost.dtype).reshape(batch_shape), flow.to(cost.dtype).reshape(*batch_shape, n, m))


def scale_to_mass(weight: Tensor, mass: float) -> Tensor:
    """Scale non-negative weights ``(..., N)`` so that each set sums to ``mass``. Differentiable.

    The paper scales both sides of every problem to the number of nodes N (section 3.3).

    Raises:
        ValueError: ``mass`` is not positive.
    """
    if not mass > 0:
        raise ProblemError(f"expected a positive mass; got {mass}")
    return weight * (mass / weight.sum(-1, keepdim=True))


def _check(cost: Tensor, supply: Tensor, demand: Tensor) -> None:
    named = {"cost": cost, "supply": supply, "demand": demand}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise ProblemError(f"expected {name} to be a tensor; got {type(tensor).__name__}")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ProblemError(f"expected {name} in float32 or float64; got {tensor.dtype}: convert it with .float()")
        if tensor.device != cost.device:
            raise ProblemError(f"expected {name} on the device of cost, {cost.device}; got {tensor.device}")
    if cost.dim() < 2 or min(cost.shape[-2:]) < 1:
        raise ProblemError(f"expected cost (..., N, M) with N and M at least 1; got {tuple(cost.shape)}")
    for name, tensor, expected in (
        ("supply", supply, cost.shape[:-1]),
        ("demand", demand, cost.shape[:-2] + cost.shape[-1:]),
    ):
        if tensor.shape != expected:
            raise ProblemError(
                f"expected {name} {tuple(expected)} to go with cost {tuple(cost.shape)}; got {tuple(tensor.shape)}"
            )
    cost, supply, demand = cost.detach(), supply.detach(), demand.detach()
    total, other = supply.sum(-1), demand.sum(-1)
    # A sum is finite only if all its terms are, and costs less than looking at each.
    faults = {
        "cost has entries that are not finite (or too large to add up)": ~torch.isfinite(cost.sum((-2, -1))),
        "supply has entries that are negative or not finite": ~((supply.amin(-1) >= 0) & torch.isfinite(total)),
        "demand has entries that are negative or not finite": ~((demand.amin(-1) >= 0) & torch.isfinite(other)),
        "supply and demand sum to different totals; scale both with scale_to_mass": (total - other).abs()
        > TOTALS_TOLERANCE * torch.maximum(total, other),
    }
    # One transfer for the whole check, so that a GPU is waited for once.
    found = torch.stack([fault.any() for fault in faults.values()]).tolist()
    for is_found, (what, fault) in zip(found, faults.items(), strict=True):
        if is_found:
            index = int(fault.flatten().nonzero()[0])
            sums = (
                f" ({float(total.flatten()[index]):.6g} and {float(other.flatten()[index]):.6g})"
                if "totals" in what
                else ""
            )
            raise ProblemError(f"problem {index} of {fault.numel()}: {what}{sums}")
