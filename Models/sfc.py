"""The structured fully connected layer (DeepEMD paper, section 3.5): k-shot prototypes fitted through the head.

A fully connected layer compares a feature with one weight *vector* per class; its structured counterpart compares a set
of nodes with one *set* of nodes per class, by the EMD. Like the weights of a last layer, those sets are learned by SGD,
here from the K support images of each class.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from Models.heads import head_logits
from utils import InputError

KSHOT = {
    "sfc": "prototypes fitted to the support images through the head, from their mean on",
    "mean": "the mean of the support images of a class, node by node",
}

# The published settings. The dampening scales every step but the first to a tenth, which is why the learning rates in
# use look large.
MOMENTUM, DAMPENING = 0.9, 0.9


class FitError(InputError):
    """The fit of the prototypes ran away. The message says what to change."""


def mean_prototypes(support: Tensor, *, way: int, shot: int | None = None, labels: Tensor | None = None) -> Tensor:
    """The mean of each class's support nodes, node i with node i of each image: where the fit starts.

    ``(..., K*W, C, N)``, class-interleaved, or ``(..., S, C, N)`` with ``labels`` to ``(..., W, C, N)``; the gradient reaches
    the support. Arguments as for :func:`fit_prototypes`.

    Raises:
        ValueError: another number of support images, or a class without any.
    """
    if labels is not None:
        counts = labels.bincount(minlength=way)
        if labels.shape != support.shape[-3:-2] or len(counts) != way or not bool((counts > 0).all()):
            raise ValueError(
                f"expected labels ({support.shape[-3]},) from 0 to {way - 1}, each at least once; got {labels.tolist()}"
            )
        return torch.stack([support[..., labels == number, :, :].mean(-3) for number in range(way)], dim=-3)
    shot = support.shape[-3] // way if shot is None else shot
    if support.dim() < 3 or support.shape[-3] != way * shot:
        raise ValueError(
            f"expected support (..., {way * shot}, C, N) for {way} way {shot} shot; got {tuple(support.shape)}"
        )
    return support.unflatten(-3, (shot, way)).mean(-4)


def fit_prototypes(
    support: Tensor,
    *,
    way: int,
    shot: int | None = None,
    labels: Tensor | None = None,
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
    ``batch_size`` of them per SGD step, on the cross entropy of their logits against the prototypes. Episodes are fitted
    side by side and do not influence each other.

    Args:
        support: ``(..., K*W, C, N)``, class-interleaved: image i is of class ``i % W``. Leading axes are episodes.
        way, shot: W and K.
        labels: ``(S,)``, instead of ``shot``: the classes of ``support (..., S, C, N)`` where they have different numbers of
            images. A class with one image is that image; the others are fitted beside it.
        lr, weight_decay: of SGD with momentum 0.9 and dampening 0.9.
        steps: passes over the support.
        batch_size: images per SGD step; the last batch of a pass may be smaller.
        permutations: ``(steps, K*W)`` or ``(..., steps, K*W)``, the order of the images in each pass. Drawn from
            ``generator``, episode after episode, when not given.
        generator: a CPU generator, or one per episode; torch's global one when not given.
        head: keyword arguments of :func:`Models.heads.head_logits`.

    Returns:
        ``(..., W, C, N)``, detached: no gradient reaches the support through the fit.

    Raises:
        ValueError: shapes or numbers that do not fit together.
        FitError: the prototypes are not finite in the end, though the support is.
    """
    start = mean_prototypes(support.detach(), way=way, shot=shot, labels=labels)
    images = support.shape[-3]
    fixed = torch.zeros(way, dtype=torch.bool) if labels is None else labels.bincount(minlength=way) == 1
    fixed = fixed.view(way, 1, 1).to(support.device)
    labels = torch.arange(images) % way if labels is None else labels
    labels = labels.to(support.device)
    if steps < 0 or batch_size < 1:
        raise ValueError(f"expected steps >= 0 and batch_size >= 1; got {steps} and {batch_size}")
    episode_shape, node_shape = support.shape[:-3], support.shape[-2:]
    support = support.detach().reshape(-1, images, *node_shape)  # (E, K*W, C, N)
    order = _orders(permutations, len(support), steps, images, generator).to(support.device)
    rows = torch.arange(len(support), device=support.device).unsqueeze(1)

    start = start.reshape(-1, way, *node_shape)  # (E, W, C, N)
    proto = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([proto], lr, MOMENTUM, DAMPENING, weight_decay)
    for step in range(steps):
        for chosen in order[:, step].split(batch_size, dim=1):  # (E, b)
            with torch.enable_grad():
                logits = head_logits(torch.where(fixed, start, proto), support[rows, chosen], **head)  # (E, b, W)
                # The mean over an episode's images and the sum over episodes: each episode gets the gradient it has alone.
                loss = (
                    F.cross_entropy(logits.flatten(0, 1), labels[chosen].flatten(), reduction="sum") / chosen.shape[1]
                )
                proto.grad = torch.autograd.grad(loss, proto)[0]
            optimizer.step()
    proto = torch.where(fixed, start, proto.detach())
    if not bool(proto.isfinite().all()) and bool(support.isfinite().all()):
        raise FitError(
            f"expected a learning rate at which the prototypes stay finite; they diverged with {lr:g}. Lower -sfc_lr "
            "(squared distances, as in -head proto, need about 0.1), or take -kshot mean"
        )
    return proto.reshape(*episode_shape, way, *node_shape)


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
