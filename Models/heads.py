"""The heads: ways to compare queries with prototypes, each ``(proto, query, settings) -> logits``.

``proto (..., W, C, N)`` and ``query (..., Q, C, M)`` to ``(..., Q, W)``. A new head is a function and a row of ``HEADS``.

``deepemd`` is the method of the paper. The others are those that the paper compares it with on the same features
(miniImageNet, 5-way 1-shot: ProtoNet 60.37, MatchingNet 63.08, k nearest neighbours 62.52, prediction fusion 62.38,
DeepEMD 65.91). ``chamfer`` is its cheap relative. The norms ``base`` and ``standard`` change the nodes of every head; ``center``
is a part of DeepEMD, and of ``chamfer``. Weights are always those of the nodes as the encoder gives them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from Models.choices import check_choice, parse_choice
from Models.emd import SOLVERS, scale_to_mass
from Models.matching import (
    METRICS,
    NORMS,
    WEIGHTS,
    Matching,
    check_nodes,
    cosine_similarity_map,
    match_nodes,
    node_weights,
)
from Models.statistics import OF_STATISTICS, NodeStatistics, normalised

# Queries are compared in slices whose pairs of nodes take less memory than this; a pair takes about so many bytes: similarity,
# cost, float64 cost and flow, float32 flow.
SLICE_BYTES, PAIR_BYTES = 256_000_000, 30


@dataclass(frozen=True)
class HeadSettings:
    """How queries are compared with prototypes. A head ignores settings that mean nothing to it.

    Args:
        head: a key of :data:`HEADS`, which may carry options of its own: ``knn:k=3``.
        temperature, metric, norm, weights, weight_power: see :func:`Models.matching.match_nodes`.
        solver: a key of :data:`Models.emd.SOLVERS`, which may carry options too: ``ipm:form=QP``.
        head_options, solver_options: options by name; those in ``head`` and ``solver`` override them.
        statistics: of training nodes, which the norms ``base`` and ``standard`` need.

    ValueError for an unknown choice or option, or a value out of range.
    """

    head: str = "deepemd"
    temperature: float = 12.5
    metric: str = "cosine"
    norm: str = "center"
    weights: str = "cross"
    weight_power: float = 1.0
    solver: str = "opencv"
    head_options: Mapping[str, Any] = field(default_factory=dict)
    solver_options: Mapping[str, Any] = field(default_factory=dict)
    statistics: NodeStatistics | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for what, known in (("head", HEADS), ("solver", SOLVERS)):
            name, options = parse_choice(what, getattr(self, what), known, getattr(self, f"{what}_options"))
            object.__setattr__(self, what, name)
            object.__setattr__(self, f"{what}_options", options)
        check_choice("metric", self.metric, METRICS)
        check_choice("norm", self.norm, NORMS)
        check_choice("weights", self.weights, WEIGHTS)
        if not 0 <= self.weight_power < math.inf:
            raise ValueError(f"weight_power must be 0 or more and finite; got {self.weight_power}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite; got {self.temperature}")

    @classmethod
    def of(cls, **keywords: Any) -> "HeadSettings":
        """Settings from plain keywords: the fields above, and beside them the options of the head, or of its solver."""
        given = {part.name: keywords.pop(part.name) for part in fields(cls) if part.name in keywords}
        head = HEADS.get(given.get("head", cls.head).partition(":")[0])
        owner = "solver_options" if head and head.uses_solver else "head_options"
        return cls(**{**given, owner: {**given.get(owner, {}), **keywords}})

    def with_solver(self, solver: str, options: Mapping[str, Any]) -> "HeadSettings":
        """The same with another solver, and of ``options`` those that it takes."""
        row = SOLVERS.get(solver.partition(":")[0])
        taken = {name: value for name, value in options.items() if row and name in row.options}
        return replace(self, solver=solver, solver_options=taken)

    @property
    def uses_solver(self) -> bool:
        return HEADS[self.head].uses_solver

    @property
    def needs_statistics(self) -> bool:
        return self.norm in OF_STATISTICS

    @property
    def of_nodes(self) -> dict[str, Any]:
        """What is done to nodes before they are compared, as keywords."""
        return {"norm": self.norm, "statistics": self.statistics}


def head_logits(proto: Tensor, query: Tensor, settings: HeadSettings | None = None, **keywords: Any) -> Tensor:
    """Logits ``(..., Q, W)`` by the head that the settings name, or plain keywords as :meth:`HeadSettings.of` takes them.

    Many queries, or large maps, are compared a slice at a time: see :data:`SLICE_BYTES`.

    ValueError or EmdError: shapes that do not fit, or invalid settings; see also :func:`Models.emd.emd`.
    """
    settings = settings or HeadSettings.of(**keywords)
    check_nodes(proto, query)
    a_query = PAIR_BYTES * math.prod(proto.shape[:-2]) * proto.shape[-1] * query.shape[-1]  # (..., W) x N x M
    if query.shape[-3] * a_query <= SLICE_BYTES:
        return HEADS[settings.head].logits(proto, query, settings)
    if a_query > SLICE_BYTES and proto.dim() > 3 and len(proto) > 1:  # an episode at a time
        return torch.stack([head_logits(*episode, settings) for episode in zip(proto, query, strict=True)])
    slices = query.split(max(1, SLICE_BYTES // a_query), dim=-3)
    return torch.cat([HEADS[settings.head].logits(proto, part, settings) for part in slices], dim=-2)


def match_with(proto: Tensor, query: Tensor, settings: HeadSettings) -> Matching:
    """:func:`Models.matching.match_nodes` with the settings of the head ``deepemd``."""
    published = {"temperature": settings.temperature, "metric": settings.metric, **settings.of_nodes}
    weights = {"weights": settings.weights, "weight_power": settings.weight_power}
    return match_nodes(proto, query, **published, **weights, solver=settings.solver, **settings.solver_options)


def deepemd_logits(proto: Tensor, query: Tensor, settings: HeadSettings) -> Tensor:
    """The optimal matching of all nodes: ``temperature * (1 - EMD / M)``."""
    return match_with(proto, query, settings).logits


def proto_logits(proto: Tensor, query: Tensor, settings: HeadSettings) -> Tensor:
    """ProtoNet: ``-||mean_i query_i - mean_j proto_j||^2``, not scaled by the temperature."""
    proto, query = _compared(proto, query, settings)
    # (..., Q, 1, C) - (..., 1, W, C). Multiplied out, the square would lose its digits where features are alike.
    return -(query.mean(-1).unsqueeze(-2) - proto.mean(-1).unsqueeze(-3)).square().sum(-1)


def cosine_logits(proto: Tensor, query: Tensor, settings: HeadSettings) -> Tensor:
    """MatchingNet with one example or prototype per class: ``temperature * cos(mean_i query_i, mean_j proto_j)``."""
    proto, query = _compared(proto, query, settings)
    pooled = query.mean(-1, keepdim=True), proto.mean(-1, keepdim=True)  # one node an image
    return settings.temperature * cosine_similarity_map(*pooled, norm="none")[..., 0, 0]


def knn_logits(proto: Tensor, query: Tensor, settings: HeadSettings) -> Tensor:
    """Nearest local features: ``temperature * mean_i sum_{j in kNN(i)} cos(query_i, proto_j)`` (as DN4, with k = 3 there).

    With the default k = 1 each query node is matched with the node most like it, which is the optimal matching of DeepEMD
    without the demand that every prototype node be matched too. A prototype with fewer than k nodes counts all it has.
    """
    proto, query = _compared(proto, query, settings)
    k = min(settings.head_options.get("k", 1), proto.shape[-1])
    similarity = cosine_similarity_map(query, proto, norm="none")  # (..., Q, W, M, N)
    return settings.temperature * similarity.topk(k, dim=-1).values.sum(-1).mean(-1)


def fusion_logits(proto: Tensor, query: Tensor, settings: HeadSettings) -> Tensor:
    """Prediction fusion: every query node is classified on its own, and the predictions are averaged.

    ``log mean_i softmax_w(temperature * cos(query_i, mean_j proto_wj))``, so that a softmax of the logits is the average.
    """
    proto, query = _compared(proto, query, settings)
    similarity = cosine_similarity_map(query, proto.mean(-1, keepdim=True), norm="none")[..., 0]  # (..., Q, W, M)
    return (settings.temperature * similarity).log_softmax(-2).logsumexp(-1) - math.log(query.shape[-1])


def chamfer_logits(proto: Tensor, query: Tensor, settings: HeadSettings) -> Tensor:
    """Nearest nodes both ways: ``temperature / 2 * (sum_i a_i max_j s_ij + sum_j b_j max_i s_ij)``.

    The weights a and b of the nodes are those of ``deepemd``, and sum to 1 on each side: an optimal matching that may move the
    mass of each side freely.
    """
    similarity = METRICS[settings.metric](query, proto, **settings.of_nodes)  # (..., Q, W, M, N)
    given = {"weights": settings.weights, "power": settings.weight_power}
    a = scale_to_mass(node_weights(query, proto, **given), 1)  # (..., Q, W, M)
    b = scale_to_mass(node_weights(proto, query, **given).transpose(-3, -2), 1)  # (..., Q, W, N)
    both = (a * similarity.amax(-1)).sum(-1) + (b * similarity.amax(-2)).sum(-1)
    return settings.temperature / 2 * both


def _compared(proto: Tensor, query: Tensor, settings: HeadSettings) -> tuple[Tensor, Tensor]:
    """The nodes that heads without weights compare: those of the encoder, except with the norms ``base`` and ``standard``."""
    return normalised(proto, **settings.of_nodes), normalised(query, **settings.of_nodes)


@dataclass(frozen=True)
class Head:
    """One row of :data:`HEADS`."""

    logits: Callable[[Tensor, Tensor, HeadSettings], Tensor]
    summary: str
    uses_solver: bool = False  # solves transportation problems, by the solver of the settings
    weighs_nodes: bool = False  # has the weights of the settings, and the norm center
    options: Mapping[str, Any] = field(default_factory=dict)  # the head's own options, and their defaults


HEADS: dict[str, Head] = {
    "deepemd": Head(deepemd_logits, "the optimal matching of all nodes", uses_solver=True, weighs_nodes=True),
    "proto": Head(proto_logits, "squared distance of the mean nodes"),
    "cosine": Head(cosine_logits, "cosine similarity of the mean nodes"),
    "knn": Head(knn_logits, "each query node by its k nearest nodes", options={"k": 1}),
    "fusion": Head(fusion_logits, "each query node classified on its own"),
    "chamfer": Head(chamfer_logits, "nearest nodes both ways, weighted as in deepemd", weighs_nodes=True),
}
