"""What the rest of the project asks of an encoder."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from Models.choices import check_choice
from utils import InputError

# Of the pixels, in [0, 1], that the published models were trained on.
MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)
IMAGE_SIZE = 84  # pixels along an edge, as published
AMP = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """What a backbone makes of images of one size, which is known before it is built; and what it is used with by default."""

    image_size: int
    edge: int  # cells along an edge of the map
    map_size: int = 0  # as for DeepEMD
    interpolation: str = "bilinear"  # of the images when they are resized


class Encoder(nn.Module, ABC):
    """Images to a feature map. A backbone derives from this class, defines ``summary``, ``out_channels``, ``stride``,
    ``maps`` and ``folded``, and is a row of :data:`Models.backbones.BACKBONES`.

    Args:
        mean, std: what 8-bit images, as pixels in [0, 1], are normalised with. None: those of the published models.
        amp: a key of :data:`AMP`, the number format of the convolutions. The map is float32 in any case.
        checkpoint_activations: in training, keep only the input of each block, and recompute the rest for the gradient.

    ValueError for an unknown ``amp``, or ``mean`` and ``std`` that are not three numbers each.
    """

    summary: str  # for the help text of -backbone
    comes_with_weights = False  # whether it is of use before anything was trained here
    out_channels: int  # C of the map
    stride: int  # pixels along an edge for one cell of the map; also the edge of the smallest image
    weights = "none"  # that it was built with: a file, or what they are called; "none" for random ones
    fixed_size: int | None = None  # the only image size that it takes, if there is one

    def __init__(
        self,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        amp: str = "off",
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        check_choice("amp", amp, AMP)
        self.amp, self.checkpoint_activations = amp, checkpoint_activations
        self.mean, self.std = tuple(mean or MEAN), tuple(std or STD)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std must be three numbers each, std above 0; got {self.mean} and {self.std}")

    @property
    def name(self) -> str:
        """What messages call it."""
        return type(self).__name__

    @classmethod
    def plan(
        cls, model: str = "", *, image_size: int | None = None, layer: int | None = None, weights: str | None = None
    ) -> Plan:
        """What it makes of images of a size, None for its own; InputError for what it cannot have.

        ``model`` is what follows the colon in ``timm:MODEL``; ``layer`` is the one whose map is wanted, None for the last.
        ``weights`` are a file, "hub" for those that were published, "none" for random ones, or None for its own.
        """
        if model:
            raise InputError(f"{cls.__name__} is one network: leave out {':' + model!r}")
        if layer is not None:
            raise InputError(f"-backbone_layer is for timm backbones; {cls.__name__} gives its last map")
        if weights not in (None, "none"):
            advice = "Name a checkpoint with -model_dir (train_meta.py: -pretrain_dir)"
            raise InputError(f"-backbone_weights is for timm backbones, and this is {cls.__name__}. {advice}")
        size = image_size or IMAGE_SIZE
        return Plan(size, size // cls.stride)

    @classmethod
    def build(
        cls,
        model: str = "",
        *,
        image_size: int | None = None,
        layer: int | None = None,
        weights: str | None = None,
        **settings: Any,
    ) -> "Encoder":
        """The encoder that :meth:`plan` is about."""
        cls.plan(model, image_size=image_size, layer=layer, weights=weights)
        return cls(**settings)

    def identity(self) -> dict[str, Any]:
        """What decides its maps, for records: the backbone, and a hash of the weights."""
        digest = hashlib.sha256()
        for key, value in sorted(self.state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return {"backbone": self.name, "weights": digest.hexdigest()}

    def __call__(self, images: Tensor) -> Tensor:
        # Outside of what torch.compile traces, which after an error in it would never compile this function again.
        self.check_images(images)
        return super().__call__(images)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)``, 8-bit pixels or floats that are normalised already, to ``(B, C, h, w)``."""
        images = images if images.is_floating_point() else self.normalize(images)
        if self.amp == "off":
            return self.maps(images)
        # Here, inside the module: the threads of DataParallel do not inherit the number format of an autocast around them.
        with torch.autocast(images.device.type, dtype=AMP[self.amp]):
            return self.maps(images.contiguous(memory_format=torch.channels_last)).float()

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError unless ``images`` are ``(B, 3, H, W)``, large enough, and 8-bit pixels or floats."""
        fixed = self.fixed_size
        fits = images.dim() == 4 and images.shape[1] == 3 and min(images.shape[2:]) >= self.stride
        if not fits or fixed and tuple(images.shape[2:]) != (fixed, fixed):
            shape = f"(B, 3, {fixed}, {fixed})" if fixed else f"(B, 3, H, W), H and W at least {self.stride}"
            raise ValueError(f"images must have the shape {shape}; got {tuple(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images must be 8-bit pixels (torch.uint8) or normalised floats; got {images.dtype}")

    def normalize(self, pixels: Tensor) -> Tensor:
        """8-bit pixels ``(..., 3, H, W)`` to float32: scaled to [0, 1], minus the mean, over the deviation."""
        mean, std = _statistics(self.mean, self.std, pixels.device)
        return pixels.float().div_(255).sub_(mean).div_(std)

    @abstractmethod
    def maps(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C, h, w)``, under autocast unless ``amp`` is off."""

    @abstractmethod
    def folded(self) -> "Encoder":
        """A copy for evaluation that computes the same to float rounding, as fast as it can."""


def checkpointed(layer: nn.Module, images: Tensor) -> Tensor:
    """A layer that keeps its input alone, and computes the rest again for the gradient."""
    # The second pass must not count the batch again.
    return checkpoint(layer, images, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_kept(layer)))


@contextmanager
def _statistics_kept(layer: nn.Module) -> Iterator[None]:
    """Batch norm normalises by the batch, but its running statistics stay as they are."""
    norms = [module for module in layer.modules() if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


class NoEncoder(nn.Module):
    """In place of an encoder, for a model that is given nodes: knows where the model is, and encodes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        raise ValueError("this model has no encoder; give it nodes")

    def folded(self) -> "NoEncoder":
        return self

    def identity(self) -> dict[str, Any]:
        return {}


@lru_cache
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept per device: copying them to a GPU for every batch would wait for it every time. ``(3, 1, 1)`` each.
    return tuple(torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1) for values in (mean, std))
