"""The *regularised* problem that qpth and ipm solve: its two forms, and the case that needs no solver.

    minimise    1/2 x^T Q x + p^T x     over the flows x >= 0 with the given row and column sums

* ``L2``: Q = l2_strength * I, p = cost. The linear program with a small quadratic term.
* ``QP``: Q = cost cost^T + 1e-4 I, p = 0. Its objective is half the square of the linear one, plus a small term.
"""

from torch import Tensor

from .errors import ProblemError

FORMS = ("L2", "QP")
QP_RIDGE = 1e-4


def check_form(form: str, l2_strength: float) -> None:
    """Raise ProblemError unless ``form`` is one of FORMS and ``l2_strength`` is positive."""
    if form not in FORMS:
        raise ProblemError(f"expected form to be one of {', '.join(FORMS)}; got {form!r}")
    if not l2_strength > 0:
        raise ProblemError(f"expected a positive l2_strength; got {l2_strength}")


def forced_flow(supply: Tensor, demand: Tensor) -> Tensor:
    """``(B,N), (B,M) -> (B,N,M)`` where N or M is 1: the only feasible flow. Such a problem has no interior."""
    return supply.unsqueeze(2) * (demand / demand.sum(1, keepdim=True)).unsqueeze(1)
