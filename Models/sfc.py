"""The structured fully connected layer (DeepEMD paper, section 3.5): k-shot prototypes fitted through the EMD.

A fully connected layer compares a feature with one weight *vector* per class; its structured counterpart compares a set
of nodes with one *set* of nodes per class, by the EMD. Like the weights of a last layer, those sets are learned by SGD,
here from the K support images of each class.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from Models.emd.on_cpu import one_thread

# The published settings. The dampening scales every step but the first to a tenth, which is why the learning rates in
# use look large.
MOMENTUM, DAMPENING = 0.9, 0.9
# Numbers in all prototypes together below which several threads of a CPU would wait for each other more than they work.
SMALL = 1 << 18


def fit_prototypes(
    support: Tensor,
    *,
    way: int,
    shot: int,
    lr: float,
    steps: int,
    batch_size: int,
    weight_decay: float = 0.0,
    permutations: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    **head: Any,
) -> Tensor:
    """Fit one set of nodes per class to the support images.

    Starts from the mean of each class's support nodes and takes ``steps`` passes over the support images in random order,
    ``batch_size`` of them per SGD step, on the cross entropy of their EMD logits against the prototypes. Episodes are
    fitted side by side and do not influence each other.

    Args:
        support: ``(..., K*W, C, N)``, class-interleaved: image i is of class ``i % W``. Leading axes are episodes.
        way, shot: W and K.
        lr, weight_decay: of SGD with momentum 0.9 and dampening 0.9.
        steps: passes over the support.
        batch_size: images per SGD step; the last batch of a pass may be smaller.
        permutations: ``(steps, K*W)`` or ``(..., steps, K*W)``, the order of the images in each pass. Drawn from
            ``generator``, episode after episode, when not given.
        generator: a CPU generator, or one per episode; torch's global one when not given.
        head: keyword arguments of :func:`Models.deepemd.emd_logits`.

    Returns:
        ``(..., W, C, N)``, detached: no gradient reaches the support through the fit.

    Raises:
        ValueError: shapes or numbers that do not fit together.
    """
    images = way * shot
    if support.dim() < 3 or support.shape[-3] != images:
        raise ValueError(
            f"expected support (..., {images}, C, N) for {way} way {shot} shot; got {tuple(support.shape)}"
        )
    if steps < 0 or batch_size < 1:
        raise ValueError(f"expected steps >= 0 and batch_size >= 1; got {steps} and {batch_size}")
    episode_shape, (channels, nodes) = support.shape[:-3], support.shape[-2:]
    support = support.detach().reshape(-1, images, channels, nodes)  # (E, K*W, C, N)
    episodes = len(support)
    order = _orders(permutations, episodes, steps, images, generator).to(support.device)
    rows = torch.arange(episodes, device=support.device).unsqueeze(1)

    problem = _SupportLoss(support, way, **head)
    proto = support.unflatten(1, (shot, way)).mean(1).mT.contiguous()  # (E, W, N, C): channels last, see below
    momentum = None
    with one_thread(proto.device) if proto.numel() < SMALL else nullcontext():
        for step in range(steps):
            for chosen in order[:, step].split(batch_size, dim=1):  # (E, b)
                gradient = problem.gradient(proto, rows, chosen)
                if weight_decay:
                    gradient.add_(proto, alpha=weight_decay)
                if momentum is None:
                    momentum = gradient
                else:
                    momentum.mul_(MOMENTUM).add_(gradient, alpha=1 - DAMPENING)
                proto.sub_(momentum, alpha=lr)
    return proto.mT.reshape(*episode_shape, way, channels, nodes)


class _SupportLoss:
    """The cross entropy of support images against prototypes, and its gradient for the prototypes.

    It is :func:`Models.deepemd.emd_logits` that is differentiated here by hand, down to the similarities and weights of
    the matching, where the solver's own backward takes over. What depends on the support alone is computed once. With
    channels last, node by node, all is matrix products and sums over contiguous memory:

    * With x a support node, centred and scaled to length 1, and p a prototype node of mean m and centred length r, the
      similarity is <x, p - m> / r = <x, p> / r, as x sums to zero. Its derivative for p is (x - similarity (p - m) / r) / r.
    * The weight of a support node is relu(<node, mean of the prototype's nodes>) + const, that of a prototype node
      relu(<mean of the support nodes, node>) + const. Their derivatives are the other factor, where the relu is open.
    """

    def __init__(
        self,
        support: Tensor,
        way: int,
        *,
        temperature: float = 12.5,
        metric: str = "cosine",
        norm: str = "center",
        solver: str = "opencv",
        **options: Any,
    ) -> None:
        from Models import deepemd  # here, because deepemd itself is built on this module

        deepemd.check_geometry(metric, norm)
        self.way = way
        self.is_centred = norm == "center"
        self.floor, self.smallest_norm = deepemd.WEIGHT_FLOOR, deepemd.SMALLEST_NORM
        self.logits_of = partial(deepemd.matching_logits, temperature=temperature, solver=solver, **options)
        self.nodes = support.mT.contiguous()  # (E, K*W, N, C)
        self.mean = support.mean(-1)  # (E, K*W, C)
        self.unit = deepemd.unit_nodes(support, norm).mT.contiguous()  # (E, K*W, N, C)

    def gradient(self, proto: Tensor, rows: Tensor, chosen: Tensor) -> Tensor:
        """``(E, W, N, C)``, for the support images ``chosen (E, b)`` of each episode.

        The loss is the mean over the images of an episode and the sum over episodes: each gets what it has alone.
        """
        e, w, n, _ = proto.shape
        b = chosen.shape[1]
        nodes, mean, unit = (tensor[rows, chosen] for tensor in (self.nodes, self.mean, self.unit))
        nodes, unit = nodes.flatten(1, 2), unit.flatten(1, 2)  # (E, b*N, C)
        flat = proto.flatten(1, 2)  # (E, W*N, C)
        proto_mean = proto.mean(2)  # (E, W, C)

        centre = flat.mean(-1, keepdim=True) if self.is_centred else flat.new_zeros(e, w * n, 1)
        length = (flat.square().sum(-1, keepdim=True) - flat.shape[-1] * centre.square()).clamp_min(0).sqrt()
        length = length.clamp_min(self.smallest_norm)  # (E, W*N, 1)
        similarity = unit @ flat.mT / length.mT  # (E, b*N, W*N)
        node_dots = (nodes @ proto_mean.mT).unflatten(1, (b, n)).mT  # (E, b, W, N)
        proto_dots = (mean @ flat.mT).unflatten(2, (w, n))  # (E, b, W, N)

        with torch.enable_grad():
            leaves = similarity.unflatten(2, (w, n)).unflatten(1, (b, n)).transpose(2, 3), node_dots, proto_dots
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            logits = self.logits_of(leaves[0], *(F.relu(dots) + self.floor for dots in leaves[1:]))  # (E, b, W)
            loss = F.cross_entropy(logits.flatten(0, 1), (chosen % self.way).flatten(), reduction="sum") / b
            by_similarity, by_node_dots, by_proto_dots = torch.autograd.grad(loss, leaves, allow_unused=True)

        by_similarity = by_similarity.transpose(2, 3).reshape(e, b * n, w * n) / length.mT
        along = (by_similarity * similarity).sum(1).unsqueeze(2) / length  # (E, W*N, 1)
        gradient = by_similarity.mT @ unit
        gradient.addcmul_(flat, along, value=-1)
        if self.is_centred:
            gradient.add_(along * centre)
        if by_proto_dots is not None:
            gradient.baddbmm_(by_proto_dots.reshape(e, b, w * n).mT, mean)
        gradient = gradient.unflatten(1, (w, n))
        if by_node_dots is not None:
            by_mean = by_node_dots.transpose(1, 2).reshape(e, w, b * n) @ nodes  # (E, W, C)
            gradient.add_(by_mean.unsqueeze(2), alpha=1 / n)
        return gradient


def _orders(
    permutations: Tensor | None,
    episodes: int,
    steps: int,
    images: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    """``(E, steps, K*W)``."""
    if permutations is not None:
        if permutations.shape[-2:] != (steps, images):
            raise ValueError(f"expected permutations (..., {steps}, {images}); got {tuple(permutations.shape)}")
        return permutations.reshape(-1, steps, images).expand(episodes, -1, -1)
    generators = generator if isinstance(generator, Sequence) else [generator] * episodes
    if len(generators) != episodes:
        raise ValueError(f"expected one generator, or one for each of {episodes} episodes; got {len(generators)}")
    order = torch.empty(episodes, steps, images, dtype=torch.long)
    for episode, own in enumerate(generators):
        for step in range(steps):
            order[episode, step] = torch.randperm(images, generator=own)
    return order
