"""The heads: ways to compare queries with prototypes, each ``(proto, query, **settings) -> logits``.

``proto (..., W, C, N)`` and ``query (..., Q, C, M)`` to ``(..., Q, W)``. A new head is a function and a line in ``HEADS``. It
takes what it uses by name, and the settings of other heads as ``**unused``, which it hands to :func:`_check`.

``deepemd`` is the method of the paper. The others are those that the paper compares it with on the same features
(miniImageNet, 5-way 1-shot: ProtoNet 60.37, MatchingNet 63.08, k nearest neighbours 62.52, prediction fusion 62.38,
DeepEMD 65.91). They compare nodes as the encoder gives them: centring (``norm``) is a part of DeepEMD alone.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from Models.emd import SOLVERS
from Models.matching import check_nodes, cosine_similarity_map, emd_logits, match_nodes


def proto_logits(proto: Tensor, query: Tensor, **unused: Any) -> Tensor:
    """ProtoNet: ``-||mean_i query_i - mean_j proto_j||^2``, not scaled by the temperature.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: a setting that no head has.
    """
    _check(proto, query, unused)
    # (..., Q, 1, C) - (..., 1, W, C). Multiplied out, the square would lose its digits where features are alike.
    return -(query.mean(-1).unsqueeze(-2) - proto.mean(-1).unsqueeze(-3)).square().sum(-1)


def cosine_logits(proto: Tensor, query: Tensor, *, temperature: float = 12.5, **unused: Any) -> Tensor:
    """MatchingNet with one example or prototype per class: ``temperature * cos(mean_i query_i, mean_j proto_j)``.

    Raises:
        ValueError, TypeError: as :func:`proto_logits`.
    """
    _check(proto, query, unused)
    pooled = query.mean(-1, keepdim=True), proto.mean(-1, keepdim=True)
    return temperature * cosine_similarity_map(*pooled, norm="none")[..., 0, 0]


def knn_logits(proto: Tensor, query: Tensor, *, temperature: float = 12.5, k: int = 1, **unused: Any) -> Tensor:
    """Nearest local features: ``temperature * mean_i sum_{j in kNN(i)} cos(query_i, proto_j)`` (as DN4, with k = 3 there).

    With the default k = 1 each query node is matched with the node most like it, which is the optimal matching of DeepEMD
    without the demand that every prototype node be matched too, and means the same for every number of nodes. Three
    neighbours out of the 2 x 2 cells of a 32-pixel image would be nearly all of them. A prototype with fewer than k nodes
    counts all it has.

    Raises:
        ValueError, TypeError: as :func:`proto_logits`.
    """
    _check(proto, query, unused)
    if k < 1:
        raise ValueError(f"expected k of 1 or more; got {k}")
    similarity = cosine_similarity_map(query, proto, norm="none")  # (..., Q, W, M, N)
    return temperature * similarity.topk(min(k, proto.shape[-1]), dim=-1).values.sum(-1).mean(-1)


def fusion_logits(proto: Tensor, query: Tensor, *, temperature: float = 12.5, **unused: Any) -> Tensor:
    """Prediction fusion: every query node is classified on its own, and the predictions are averaged.

    ``log mean_i softmax_w(temperature * cos(query_i, mean_j proto_wj))``, so that a softmax of the logits is the average.

    Raises:
        ValueError, TypeError: as :func:`proto_logits`.
    """
    _check(proto, query, unused)
    similarity = cosine_similarity_map(query, proto.mean(-1, keepdim=True), norm="none")[..., 0]  # (..., Q, W, M)
    return (temperature * similarity).log_softmax(-2).logsumexp(-1) - math.log(query.shape[-1])


HEADS: dict[str, Callable[..., Tensor]] = {
    "deepemd": emd_logits,
    "proto": proto_logits,
    "cosine": cosine_logits,
    "knn": knn_logits,
    "fusion": fusion_logits,
}


def head_logits(proto: Tensor, query: Tensor, *, head: str = "deepemd", **settings: Any) -> Tensor:
    """Logits ``(..., Q, W)`` by the head of that name.

    Raises:
        ValueError: ``head`` is no key of ``HEADS``, or what the head itself raises.
    """
    return find_head(head)(proto, query, **settings)


def takes_solver(head: str) -> bool:
    """Whether a head solves transportation problems: it then has a keyword argument ``solver``.

    Raises:
        ValueError: ``head`` is no key of ``HEADS``.
    """
    return "solver" in inspect.signature(find_head(head)).parameters


def find_head(head: str) -> Callable[..., Tensor]:
    """The head of that name.

    Raises:
        ValueError: ``head`` is no key of ``HEADS``.
    """
    if head not in HEADS:
        raise ValueError(f"expected head to be one of {', '.join(HEADS)}; got {head!r}")
    return HEADS[head]


def _check(proto: Tensor, query: Tensor, unused: dict[str, Any]) -> None:
    """Raise where shapes do not fit, or a setting is none that any head has."""
    check_nodes(proto, query)
    for name in unused:
        if name not in _settings():
            raise TypeError(f"no head takes the setting {name!r}; there are: {', '.join(sorted(_settings()))}")


@functools.cache
def _settings() -> frozenset[str]:
    """What a head may be given and leave alone: the settings of the matching and of its solvers."""
    parameters = inspect.signature(match_nodes).parameters.values()
    matching = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    return frozenset(matching.union(*(solver.options for solver in SOLVERS.values())))
