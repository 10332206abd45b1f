"""The heart of the paper: two sets of nodes -> weights and similarity -> the optimal matching -> a logit.

Zhang, Cai, Lin, Shen: "DeepEMD: Few-Shot Image Classification with Differentiable Earth Mover's Distance and
Structured Classifiers", CVPR 2020. Section and equation numbers refer to it. This file goes backwards through section 3:
what a node weighs (3.4), what it costs to match two nodes (3.3), and the matching itself (3.2).

Axes: W way (prototypes), Q queries, C channels, M nodes of a query, N of a prototype. Any leading axes (episodes) come first.
"""

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from Models.choices import check_choice
from Models.emd import SOLVERS, emd, scale_to_mass
from Models.statistics import NodeStatistics, normalised

# The choices of -norm and -weights.
NORMS = {
    "center": "subtract each node's own mean over channels",
    "none": "leave the nodes as they are",
    "base": "subtract the mean node of training images",
    "standard": "as base, then divide each channel by its standard deviation over training nodes",
}
WEIGHTS = {"cross": "by cross-reference, on the nodes as the encoder gives them", "uniform": "the same for every node"}

WEIGHT_FLOOR = 1e-3
SMALLEST_NORM = 1e-8
# The published OpenCV path adds this to the weights once more, its QPTH path does not. It matters where all weights of an
# image lie near the floor: 2e-3 in such logits.
OPENCV_FLOOR = 1e-5


# --- Section 3.4: the weights of the nodes, by cross-reference --------------------------------------------------------


def cross_reference_weights(nodes: Tensor, other: Tensor) -> Tensor:
    """How much of each node matters, judged by what it is compared with (equation 8).

    A node that looks like the *average* node of the other image probably belongs to what both images share, and one
    that does not is probably background: ``weight_i = relu(<node_i, mean_j other_j>) + 1e-3``. Taken on the nodes as the
    encoder gives them, not centred.

    ``(..., A, C, N)`` and ``(..., B, C, M)``, A images against B, with the same leading axes, to ``(..., A, B, N)``: at least
    1e-3, not scaled.
    """
    return F.relu(other.mean(-1).unsqueeze(-3) @ nodes) + WEIGHT_FLOOR  # (..., 1, B, C) x (..., A, C, N)


def node_weights(
    nodes: Tensor, other: Tensor, *, weights: str = "cross", power: float = 1.0, floor: float = 0.0
) -> Tensor:
    """The weights of nodes by a key of ``WEIGHTS``, shaped as those of :func:`cross_reference_weights`.

    ``cross`` adds ``floor`` to cross-reference weights and raises them to ``power``; ``uniform`` is 1 for every node. Only the
    ratios within an image matter: the caller scales them.
    """
    check_choice("weights", weights, WEIGHTS)
    if weights == "uniform":
        return nodes.new_ones(*nodes.shape[:-2], other.shape[-3], nodes.shape[-1])
    weight = cross_reference_weights(nodes, other) + floor if floor else cross_reference_weights(nodes, other)
    if power == 1:
        return weight
    return (weight / weight.amax(-1, keepdim=True)) ** power  # which float32 can hold, whatever the length of the nodes


# --- Section 3.3: the cost of moving mass between two nodes -----------------------------------------------------------


def cosine_similarity_map(
    query: Tensor, proto: Tensor, *, norm: str = "center", statistics: NodeStatistics | None = None
) -> Tensor:
    """Cosine similarity of every query node with every prototype node (equation 6: cost = 1 - similarity).

    ``(..., Q, C, M)`` and ``(..., W, C, N)`` to ``(..., Q, W, M, N)``, in [-1, 1]. ``norm`` is a key of ``NORMS``; ``center``
    first subtracts each node's mean over channels, ``base`` and ``standard`` need ``statistics``.
    """
    check_choice("norm", norm, NORMS)
    query, proto = normalised(query, norm, statistics), normalised(proto, norm, statistics)
    if norm == "center":
        query, proto = query - query.mean(-2, keepdim=True), proto - proto.mean(-2, keepdim=True)
    # One matrix product per episode. Dividing it by the lengths touches fewer numbers than normalising the nodes.
    left = query.transpose(-2, -1).flatten(-3, -2)  # (..., Q*M, C)
    right = proto.transpose(-3, -2).flatten(-2)  # (..., C, W*N)
    similarity = left @ right  # (..., Q*M, W*N)
    similarity = similarity / left.norm(dim=-1).unsqueeze(-1).clamp_min(SMALLEST_NORM)
    similarity = similarity / right.norm(dim=-2).unsqueeze(-2).clamp_min(SMALLEST_NORM)
    # (..., Q*M, W*N) -> (..., Q*M, W, N) -> (..., Q, M, W, N) -> (..., Q, W, M, N)
    similarity = similarity.unflatten(-1, (proto.shape[-3], proto.shape[-1]))
    return similarity.unflatten(-3, (query.shape[-3], query.shape[-1])).transpose(-3, -2)


# Similarities of nodes, with the arguments and the shapes of the one above: the cost of matching two nodes is 1 - similarity.
METRICS = {"cosine": cosine_similarity_map}


# --- Section 3.2: optimal matching -> logits --------------------------------------------------------------------------


class Matching(NamedTuple):
    """How queries were matched with prototypes."""

    logits: Tensor  # (..., Q, W)
    flow: Tensor  # (..., Q, W, M, N): the mass moved from each query node to each prototype node, detached
    similarity: Tensor  # (..., Q, W, M, N)
    supply: Tensor  # (..., Q, W, M): the weights of the query nodes, which sum to M
    demand: Tensor  # (..., Q, W, N): the weights of the prototype nodes, which sum to M


def match_nodes(
    proto: Tensor,
    query: Tensor,
    *,
    temperature: float = 12.5,
    metric: str = "cosine",
    norm: str = "center",
    statistics: NodeStatistics | None = None,
    weights: str = "cross",
    weight_power: float = 1.0,
    solver: str = "opencv",
    **options: Any,
) -> Matching:
    """Match the nodes of every query with those of every prototype, at the least cost.

    The flow is the optimal one for ``cost = 1 - similarity`` and for weights scaled to sum to M on both sides, and the
    logit is ``temperature / M * sum(flow * similarity)`` (equation 7), which is ``temperature * (1 - EMD / M)``.

    Args:
        proto: ``(..., W, C, N)``, one set of nodes per class.
        query: ``(..., Q, C, M)``, with the same leading axes (episodes).
        temperature: the scale of the logits.
        metric, norm: keys of ``METRICS`` and ``NORMS``. They decide the cost alone: weights are those of the nodes as given.
        statistics: of training nodes, for the norms ``base`` and ``standard``.
        weights, weight_power: a key of ``WEIGHTS``, and the power that cross-reference weights are raised to.
        solver, options: see :func:`Models.emd.emd`. A solver without a gradient for the weights (``opencv``, or ``simplex``
            with the gradient ``cost``) takes them as the published OpenCV path does; the others, as its QPTH path does.

    ValueError for shapes that do not fit or an unknown choice, EmdError as for :func:`Models.emd.emd`.
    """
    check_nodes(proto, query)
    check_choice("metric", metric, METRICS)
    check_choice("solver", solver, SOLVERS)
    similarity = METRICS[metric](query, proto, norm=norm, statistics=statistics)  # (..., Q, W, M, N)
    # Without a gradient for the weights, the encoder learns through the cost alone, as in the published OpenCV path.
    has_gradient = "supply" in SOLVERS[solver].differentiable and options.get("gradient") != "cost"
    given = {"weights": weights, "power": weight_power, "floor": 0.0 if has_gradient else OPENCV_FLOOR}
    supply = node_weights(query, proto, **given)  # (..., Q, W, M)
    demand = node_weights(proto, query, **given).transpose(-3, -2)  # (..., Q, W, N)
    if not has_gradient:
        supply, demand = supply.detach(), demand.detach()
    mass = similarity.shape[-2]
    supply, demand = scale_to_mass(supply, mass), scale_to_mass(demand, mass)
    distance, flow = emd(1 - similarity, supply, demand, solver=solver, **options)
    # sum(flow * similarity) = sum(flow) - <cost, flow>. The sum of the flow is the mass, except for what an
    # iterative solver leaves undone, which equation 7 includes.
    logits = temperature / mass * (flow.sum((-2, -1)) - distance)
    return Matching(logits, flow, similarity, supply, demand)


def emd_logits(proto: Tensor, query: Tensor, **settings: Any) -> Tensor:
    """The logits of :func:`match_nodes`: ``(..., W, C, N)`` and ``(..., Q, C, M)`` to ``(..., Q, W)``."""
    return match_nodes(proto, query, **settings).logits


def check_nodes(proto: Tensor, query: Tensor) -> None:
    """Raise ValueError unless ``proto (..., W, C, N)`` and ``query (..., Q, C, M)`` have the same leading axes and C."""
    if min(proto.dim(), query.dim()) < 3 or proto.shape[:-3] != query.shape[:-3] or proto.shape[-2] != query.shape[-2]:
        shapes = "their shapes must be (..., W, C, N) and (..., Q, C, M), with the same leading axes and C"
        raise ValueError(f"proto {tuple(proto.shape)} and query {tuple(query.shape)} do not fit: {shapes}")
