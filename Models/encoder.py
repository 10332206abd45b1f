"""What the rest of the project asks of an encoder."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

AMP = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Encoder(nn.Module, ABC):
    """Images to a feature map. A backbone derives from this class and says ``out_channels``, ``maps`` and ``folded``.

    Args:
        amp: a key of :data:`AMP`, the number format of the convolutions. The map that comes out is in float32 all the same.

    Raises:
        ValueError: ``amp`` is no key of :data:`AMP`.
    """

    out_channels: int  # C of the map

    def __init__(self, *, amp: str = "off") -> None:
        super().__init__()
        if amp not in AMP:
            raise ValueError(f"expected amp to be one of {', '.join(AMP)}; got {amp!r}")
        self.amp = amp

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C, h, w)``."""
        if self.amp == "off":
            return self.maps(images)
        # Here, inside the module: the threads of DataParallel do not inherit the number format of an autocast around them.
        with torch.autocast(images.device.type, dtype=AMP[self.amp]):
            return self.maps(images.contiguous(memory_format=torch.channels_last)).float()

    @abstractmethod
    def maps(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C, h, w)``, under autocast where ``amp`` says so."""

    @abstractmethod
    def folded(self) -> "Encoder":
        """A copy for evaluation that computes the same to float rounding, as fast as it can."""
