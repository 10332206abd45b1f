"""Conv-64F, the four-layer network of the first few-shot papers."""

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from Models.encoder import Encoder, checkpointed

WIDTH = 64


def _block(channels: int) -> nn.Sequential:
    """``(B, channels, H, W)`` to ``(B, 64, H // 2, W // 2)``."""
    conv = nn.Conv2d(channels, WIDTH, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True), nn.MaxPool2d(2))


class Conv4(Encoder):
    """Images ``(B, 3, H, W)`` to a feature map ``(B, 64, H // 16, W // 16)``; 84 pixels give 5 x 5.

    112,320 parameters. Settings as for :class:`Models.encoder.Encoder`.
    """

    summary = "Conv-64F, four layers of 64 channels"
    out_channels = WIDTH
    stride = 16  # every block halves

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.blocks = nn.Sequential(_block(3), *(_block(WIDTH) for _ in range(3)))

    def maps(self, images: Tensor) -> Tensor:
        keeps_less = self.checkpoint_activations and self.training
        for block in self.blocks:
            images = checkpointed(block, images) if keeps_less else block(images)
        return images

    def folded(self) -> "Conv4":
        """A copy for evaluation: batch norm folded into the convolutions."""
        encoder = copy.deepcopy(self).eval().requires_grad_(False)
        for block in encoder.blocks:
            block[0], block[1] = fuse_conv_bn_eval(block[0], block[1]), nn.Identity()
        return encoder
