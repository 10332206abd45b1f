"""The Earth Mover's Distance between two weighted sets of nodes, as a differentiable layer.

The transportation problem (DeepEMD paper, section 3.2)::

    minimise    <cost, flow>
    subject to  flow 1 = supply,   flow^T 1 = demand,   flow >= 0

The folder needs torch, numpy, and the library of the chosen solver. ``pip install .`` installs it as ``emd_layer``, and it can
be copied into another project (without its __pycache__: numba's cache in it refers to this package by name).

    >>> import torch
    >>> from Models.emd import emd, scale_to_mass
    >>> points, others = torch.rand(1, 6, 2), torch.rand(1, 4, 2)
    >>> weights = scale_to_mass(torch.ones(1, 6), 1.0), scale_to_mass(torch.ones(1, 4), 1.0)
    >>> result = emd(torch.cdist(points, others), *weights, solver="opencv")
    >>> result.value.shape, result.flow.shape
    (torch.Size([1]), torch.Size([1, 6, 4]))
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .on_cpu import set_threads
from .problem import EmdError, MissingLibraryError, ProblemError, SolverError, check_tensors, check_values
from .simplex_cuda import settle

__all__ = ["SOLVERS", "EmdResult", "Solver", "emd", "scale_to_mass", "set_threads", "settle"]
__all__ += ["EmdError", "MissingLibraryError", "ProblemError", "SolverError"]


class EmdResult(NamedTuple):
    """What :func:`emd` returns."""

    value: Tensor  # (...,)      <cost, flow>, differentiable in what the solver's row names
    flow: Tensor  # (..., N, M)  the optimal flow, detached unless the option differentiable_flow is set


@dataclass(frozen=True)
class Solver:
    """One row of :data:`SOLVERS`."""

    module: str  # the module of this package with its ``solve``, imported when first used
    device: Literal["cpu", "any"]  # "cpu": inputs are copied to the CPU, and what comes back is copied to their device
    summary: str
    differentiable: tuple[str, ...] = ("cost", "supply", "demand")  # the inputs that ``value`` has a gradient for
    options: Mapping[str, Any] = field(default_factory=dict)  # the keyword arguments of ``solve``, with their defaults
    cuda_module: str | None = None  # its ``is_usable``: whether it solves problems on a CUDA device without waiting

    @property
    def solve(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """The module's ``solve``: ``(B,N,M), (B,N), (B,M) -> value (B,), flow (B,N,M)``."""
        return importlib.import_module(f"{__name__}.{self.module}").solve

    def never_waits(self, device: torch.device, n: int, m: int, dtype: torch.dtype) -> bool:
        """Whether problems of this size are solved on the device without waiting for it, as a CUDA graph needs."""
        if device.type != "cuda" or self.cuda_module is None:
            return False
        return importlib.import_module(f"{__name__}.{self.cuda_module}").is_usable(device, n, m, dtype)


_FORM = {"form": "L2", "l2_strength": 1e-6}
_WITH_FLOW = {**_FORM, "differentiable_flow": False}
SOLVERS: dict[str, Solver] = {
    "opencv": Solver("opencv", "cpu", "exact, float32, on the CPU; gradient for the cost only", ("cost",)),
    "simplex": Solver(
        "simplex",
        "cpu",
        "exact, fast; on the CPU in float64, on a GPU for up to 64 nodes; gradient for cost and weights, or for the cost only",
        options={"gradient": "full"},
        cuda_module="simplex_cuda",
    ),
    "ipm": Solver("interior_point", "any", "the problem of qpth by a faster method, on any device", options=_WITH_FLOW),
    "qpth": Solver(
        "qpth_qp", "any", "regularised, float64, on any device; gradient for cost and weights", options=_FORM
    ),
}


def emd(cost: Tensor, supply: Tensor, demand: Tensor, *, solver: str = "opencv", **options: Any) -> EmdResult:
    """Solve a batch of transportation problems (DeepEMD paper, section 3.2), for any batch shape.

    Args:
        cost: ``(..., N, M)``, float32 or float64, finite: the price of moving one unit of mass; it may be negative.
        supply: ``(..., N)``, non-negative: the mass at node i.
        demand: ``(..., M)``, non-negative: the mass that node j takes. Sums to the same total as ``supply``.
        solver: a key of :data:`SOLVERS`.
        options: keyword arguments of the solver; see ``solve`` in its module.

    Returns:
        ``value (...)`` and ``flow (..., N, M)``, in the dtype and on the device of ``cost``. Inputs are never modified.

    Raises:
        ProblemError: (a ValueError) an unknown solver or option, or inputs other than described above.
        SolverError: the solver failed; the message names the problem by its index in the flattened batch.
        MissingLibraryError: (an ImportError) the solver's library cannot be imported; the message says what to install.
    """
    if solver not in SOLVERS:
        raise ProblemError(f"there is no solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    chosen = SOLVERS[solver]
    for name in options.keys() - chosen.options.keys():
        known = ", ".join(chosen.options) or "none"
        raise ProblemError(f"solver {solver!r} does not take the option {name!r}; it takes: {known}")
    check_tensors(cost, supply, demand)

    batch_shape, (n, m) = cost.shape[:-2], cost.shape[-2:]
    if batch_shape.numel() == 0:
        # Empty sums keep the result in the graph of the inputs.
        return EmdResult(value=(cost.sum((-2, -1)) + supply.sum(-1) + demand.sum(-1)) * 0, flow=cost.detach().clone())
    flat = cost.reshape(-1, n, m), supply.reshape(-1, n), demand.reshape(-1, m)
    if chosen.device == "any":
        check_values(*flat)  # solvers on the CPU check what they have copied there, which saves waiting for a GPU twice
    with torch.autocast(device_type=cost.device.type, enabled=False):
        value, flow = chosen.solve(*flat, **options)
    flow = flow if options.get("differentiable_flow") else flow.detach()
    return EmdResult(value.to(cost.dtype).reshape(batch_shape), flow.to(cost.dtype).reshape(*batch_shape, n, m))


def scale_to_mass(weight: Tensor, mass: float) -> Tensor:
    """Scale non-negative weights ``(..., N)`` so that each set sums to ``mass``, in the paper N (section 3.3). Differentiable.

    ProblemError (a ValueError) unless ``mass`` is positive.
    """
    if not mass > 0:
        raise ProblemError(f"mass must be positive, not {mass}")
    return weight * (mass / weight.sum(-1, keepdim=True))
