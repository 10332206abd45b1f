"""The structured fully connected layer (DeepEMD paper, section 3.5): k-shot prototypes fitted through the head.

A fully connected layer compares a feature with one weight *vector* per class; its structured counterpart compares a set
of nodes with one *set* of nodes per class, by the EMD. Like the weights of a last layer, those sets are learned by SGD,
here from the K support images of each class.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from Models.cuda_graph import GraphedStep
from Models.emd import SOLVERS
from Models.heads import HeadSettings, head_logits
from Models.statistics import needed_statistics
from utils import InputError

KSHOT = {
    "sfc": "prototypes fitted to the support images through the head, starting from their mean",
    "mean": "the mean of the support images of a class, node by node",
}

# As published. The dampening scales every step but the first to a tenth, which is why the learning rates look large.
MOMENTUM, DAMPENING = 0.9, 0.9
Draws = torch.Generator | Sequence[torch.Generator] | None


class FitError(InputError):
    """The prototype fit diverged. The message says what to change."""


@dataclass(frozen=True)
class FitSettings:
    """How the prototypes are fitted: by SGD with momentum 0.9 and dampening 0.9."""

    lr: float
    weight_decay: float
    steps: int  # passes over the support images
    batch_size: int  # images per SGD step; the last batch of a pass may be smaller

    def __post_init__(self) -> None:
        are_rates = 0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf
        if not are_rates or self.steps < 0 or self.batch_size < 1:
            raise ValueError(f"lr must be above 0, weight_decay and steps 0 or more, batch_size 1 or more; got {self}")


def mean_prototypes(support: Tensor, *, way: int, shot: int | None = None, labels: Tensor | None = None) -> Tensor:
    """The mean of each class's support nodes, node i with node i of each image: where the fit starts.

    Arguments and result as for :func:`fit_prototypes`, but the gradient reaches the support. ValueError for another number of
    support images, or a class without any.
    """
    images = support.shape[-3]
    if labels is not None:
        if labels.shape != (images,) or sorted(set(labels.tolist())) != list(range(way)):
            known = f"{images} numbers from 0 to {way - 1}, with every class in them"
            raise ValueError(f"labels must be {known}; got {labels.tolist()}")
        return torch.stack([support[..., labels == number, :, :].mean(-3) for number in range(way)], dim=-3)
    shot = images // max(1, way) if shot is None else shot
    if min(way, shot) < 1 or images != way * shot:
        raise ValueError(f"{way} way {shot} shot needs {way * shot} support images; got {images}")
    return support.unflatten(-3, (shot, way)).mean(-4)  # (..., K, W, C, N) -> (..., W, C, N)


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
    generator: Draws = None,
    settings: HeadSettings | None = None,
    **head: Any,
) -> Tensor:
    """Fit one set of nodes per class to the support images: starting from their mean, by SGD on the cross entropy of the
    images' logits against the prototypes. Episodes are fitted side by side and do not influence each other.

    With the norms ``base`` and ``standard``, SGD moves ``(nodes - mean) / unit``, where ``unit`` gives a training node the
    length 1: ``sqrt(C)`` times the deviation of each channel, or the root of the sum of their squares for ``base``.

    Args:
        support: ``(..., K*W, C, N)``, class-interleaved: image i is of class ``i % W``. Leading axes are episodes.
        way, shot: W and K.
        labels: ``(S,)``, instead of ``shot``: the classes of ``support (..., S, C, N)`` where they have different numbers of
            images. A class with one image is that image.
        lr, weight_decay, steps, batch_size: as in :class:`FitSettings`; images come in random order.
        permutations: ``(steps, K*W)`` or ``(..., steps, K*W)``, the order of the images in each pass. None: drawn from
            ``generator``, episode after episode; a CPU generator, one per episode, or torch's global one if None.
        settings, head: of the head, as for :func:`Models.heads.head_logits`.

    Returns:
        ``(..., W, C, N)``, detached: no gradient reaches the support through the fit.

    ValueError: shapes or numbers that do not fit. FitError: prototypes or logits are not finite, though the support is.
    """
    fit = FitSettings(lr, weight_decay, steps, batch_size)
    settings = settings or HeadSettings.of(**head)
    start = mean_prototypes(support.detach(), way=way, shot=shot, labels=labels)
    images, device = support.shape[-3], support.device
    labels = torch.arange(images) % way if labels is None else labels
    is_single = (labels.bincount() == 1).view(way, 1, 1)  # a class with one image is not fitted
    is_fixed, labels = (part.to(device, non_blocking=True) for part in (is_single, labels))
    episode_shape, node_shape = support.shape[:-3], support.shape[-2:]
    support = support.detach().reshape(-1, images, *node_shape)  # (E, K*W, C, N)
    order = _orders(permutations, len(support), fit.steps, images, generator)  # (E, steps, K*W)
    order = order.to(device, non_blocking=True)
    rows = torch.arange(len(support), device=device).unsqueeze(1)
    start = start.reshape(-1, way, *node_shape)  # (E, W, C, N)
    # SGD moves nodes as the head compares them: with the norms base and standard, in their space and in units of the usual length
    # of a node. There, one learning rate fits all encoders, and no channel of a tiny deviation gets huge steps.
    statistics = needed_statistics(settings.norm, settings.statistics, support.shape[-2])
    shift, unit = statistics.unit_shift_and_scale(settings.norm, support) if statistics else (0.0, 1.0)
    moved = ((start - shift) / unit if statistics else start.clone()).requires_grad_()
    optimizer = torch.optim.SGD([moved], fit.lr, MOMENTUM, DAMPENING, fit.weight_decay)

    def prototypes() -> Tensor:
        """Nodes as the encoder gives them, which is what the head takes."""
        return torch.where(is_fixed, start, moved * unit + shift if statistics else moved)

    def step(chosen: Tensor) -> None:
        """One step of SGD on the support images ``chosen (E, b)``."""
        with torch.enable_grad():
            logits = head_logits(prototypes(), support[rows, chosen], settings)  # (E, b, W)
            # The mean over an episode's images and the sum over episodes: each episode gets the gradient it has alone.
            loss = F.cross_entropy(logits.flatten(0, 1), labels[chosen].flatten(), reduction="sum")
            moved.grad = torch.autograd.grad(loss / chosen.shape[1], moved)[0]
        optimizer.step()

    solver, count = SOLVERS[settings.solver], node_shape[1]
    if device.type == "cuda" and (not settings.uses_solver or solver.never_waits(device, count, count, support.dtype)):
        step = GraphedStep(step)  # hundreds of small kernels, launched at once
    for number in range(fit.steps):
        for chosen in order[:, number].split(fit.batch_size, dim=1):
            step(chosen)
    proto = prototypes().detach()
    # Prototypes may be finite and yet too large to be compared with anything.
    is_finite = proto.isfinite().all() and head_logits(proto, support[:, :1], settings).isfinite().all()
    if not bool(is_finite) and bool(support.isfinite().all()):
        cure = "Lower -sfc_lr (squared distances, as in -head proto, need about 0.1), or use -kshot mean"
        raise FitError(f"the prototypes diverged with a learning rate of {lr:g}. {cure}")
    return proto.reshape(*episode_shape, way, *node_shape)


def _orders(permutations: Tensor | None, episodes: int, steps: int, images: int, generator: Draws) -> Tensor:
    """The order of the support images in every pass: ``(E, steps, K*W)``."""
    if permutations is not None:
        return permutations.reshape(-1, steps, images).expand(episodes, -1, -1)
    generators = generator if isinstance(generator, Sequence) else [generator] * episodes
    orders = torch.empty(episodes, steps, images, dtype=torch.long)
    for passes, draws in zip(orders, generators, strict=True):
        for order in passes:
            torch.randperm(images, generator=draws, out=order)
    return orders
