"""What a transportation problem is: the checks of :func:`Models.emd.emd`, and the errors of this package."""

import torch
from torch import Tensor

# Totals of float32 weights that were scaled to the same mass differ by about 1e-6 of it, forgotten scalings by much more.
TOTALS_TOLERANCE = 1e-4


class EmdError(Exception):
    """Base of the errors of this package. Every message is one line: what is wrong and what to do."""

    is_user_error = True  # a script prints it as that line


class ProblemError(EmdError, ValueError):
    """The input is not a transportation problem, or the solver, an option or its value is unknown."""


class SolverError(EmdError, RuntimeError):
    """A solver failed or did not converge. The message names the problem by its index in the flattened batch."""


class MissingLibraryError(EmdError, ImportError):
    """The library behind a solver cannot be imported. The message says what to install."""


def check_tensors(cost: Tensor, supply: Tensor, demand: Tensor) -> None:
    """Raise ProblemError unless types, dtypes, devices and shapes match. Reads no value."""
    for name, tensor in {"cost": cost, "supply": supply, "demand": demand}.items():
        if not isinstance(tensor, Tensor):
            raise ProblemError(f"{name} must be a tensor; it is a {type(tensor).__name__}")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ProblemError(f"{name} must be float32 or float64; it is {tensor.dtype}: convert it with .float()")
        if tensor.device != cost.device:
            raise ProblemError(f"{name} is on {tensor.device} and cost on {cost.device}: move them to one device")
    if cost.dim() < 2 or min(cost.shape[-2:]) < 1:
        raise ProblemError(f"cost must be (..., N, M) with N and M at least 1; it is {tuple(cost.shape)}")
    shapes = ("supply", supply, cost.shape[:-1]), ("demand", demand, cost.shape[:-2] + cost.shape[-1:])
    for name, tensor, expected in shapes:
        if tensor.shape != expected:
            of = f"for cost {tuple(cost.shape)}"
            raise ProblemError(f"{name} must be {tuple(expected)} {of}; it is {tuple(tensor.shape)}")


def check_values(cost: Tensor, supply: Tensor, demand: Tensor) -> None:
    """Raise ProblemError unless ``(B,N,M), (B,N), (B,M)`` are finite, weights non-negative and their totals equal."""
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
            index = int(fault.nonzero()[0])
            sums = f" ({float(total[index]):.6g} and {float(other[index]):.6g})" if "totals" in what else ""
            raise ProblemError(f"problem {index} of {len(fault)}: {what}{sums}")
