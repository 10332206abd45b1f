"""What the rest of the project asks of an encoder."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from Models.choices import check_choice

# Of the pixels, in [0, 1], that the published models were trained on.
MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)
AMP = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Encoder(nn.Module, ABC):
    """Images to a feature map. A backbone derives from this class, defines ``out_channels``, ``stride``, ``maps`` and
    ``folded``, and is a row of :data:`Models.backbones.BACKBONES`.

    Args:
        mean, std: what 8-bit images, as pixels in [0, 1], are normalised with. None: those of the published models.
        amp: a key of :data:`AMP`, the number format of the convolutions. The map is float32 in any case.
        checkpoint_activations: in training, keep only the input of each block, and recompute the rest for the gradient.

    ValueError for an unknown ``amp``, or ``mean`` and ``std`` that are not three numbers each.
    """

    out_channels: int  # C of the map
    stride: int  # pixels along an edge for one cell of the map; also the edge of the smallest image

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
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < self.stride:
            shape = f"(B, 3, H, W), H and W at least {self.stride}"
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


class NoEncoder(nn.Module):
    """In place of an encoder, for a model that is given nodes: knows where the model is, and encodes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        raise ValueError("this model has no encoder; give it nodes")

    def folded(self) -> "NoEncoder":
        return self

    def identity(self) -> None:
        """What tells encoders apart: nothing, as the nodes are data."""


@lru_cache
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept per device: copying them to a GPU for every batch would wait for it every time. ``(3, 1, 1)`` each.
    return tuple(torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1) for values in (mean, std))
