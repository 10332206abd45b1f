"""The heads: ways to compare queries with prototypes, each ``(proto, query, **settings) -> logits``.

``proto (..., W, C, N)`` and ``query (..., Q, C, M)`` to ``(..., Q, W)``. A new head is a function and a line in ``HEADS``.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from Models.matching import emd_logits

HEADS: dict[str, Callable[..., Tensor]] = {"deepemd": emd_logits}


def head_logits(proto: Tensor, query: Tensor, *, head: str = "deepemd", **settings: Any) -> Tensor:
    """Logits ``(..., Q, W)`` by the head of that name.

    Raises:
        ValueError: ``head`` is no key of ``HEADS``, or what the head itself raises.
    """
    if head not in HEADS:
        raise ValueError(f"expected head to be one of {', '.join(HEADS)}; got {head!r}")
    return HEADS[head](proto, query, **settings)
