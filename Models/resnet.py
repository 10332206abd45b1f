"""The encoder: ResNet-12 of the TADAM/FEAT family (DeepEMD paper, section 5.1, "Network")."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from Models.encoder import Encoder, checkpointed

LEAK = 0.1
WIDTHS = (64, 160, 320, 640)
_conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions beside a 1x1 shortcut: ``(B, channels_in, H, W) -> (B, channels_out, H // 2, W // 2)``.

    The attribute names are the key names of the released checkpoints.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels_in, channels_out)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = _conv3x3(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv3 = _conv3x3(channels_out, channels_out)
        self.bn3 = nn.BatchNorm2d(channels_out)
        shortcut = nn.Conv2d(channels_in, channels_out, kernel_size=1, bias=False)
        self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(self.bn1(self.conv1(x)), LEAK, inplace=True)
        out = F.leaky_relu(self.bn2(self.conv2(out)), LEAK, inplace=True)
        out = self.bn3(self.conv3(out)) + self.downsample(x)
        return F.max_pool2d(F.leaky_relu(out, LEAK, inplace=True), kernel_size=2)


class ResNet12(Encoder):
    """Images ``(B, 3, H, W)`` to a feature map ``(B, 640, H // 16, W // 16)``; 84 pixels give 5 x 5.

    12,424,320 parameters. Settings as for :class:`Models.encoder.Encoder`.
    """

    summary = "the published network"
    out_channels = WIDTHS[-1]
    stride = 16  # every block halves

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for number, (before, after) in enumerate(zip((3, *WIDTHS[:-1]), WIDTHS, strict=True), start=1):
            # One block to a layer, kept in a Sequential because the released key names say "layer1.0.".
            self.add_module(f"layer{number}", nn.Sequential(ResidualBlock(before, after)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
        if self.amp != "off":
            self.to(memory_format=torch.channels_last)  # the layout that tensor cores want

    def maps(self, images: Tensor) -> Tensor:
        keeps_less = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        for layer in self.children():
            images = checkpointed(layer, images) if keeps_less else layer(images)
        return images

    def folded(self) -> "ResNet12":
        """A copy for evaluation: batch norm folded into the convolutions, channels last."""
        encoder = copy.deepcopy(self).eval().requires_grad_(False)
        for (block,) in encoder.children():
            for number in (1, 2, 3):
                conv = fuse_conv_bn_eval(getattr(block, f"conv{number}"), getattr(block, f"bn{number}"))
                setattr(block, f"conv{number}", conv)
                setattr(block, f"bn{number}", nn.Identity())
            block.downsample = nn.Sequential(fuse_conv_bn_eval(block.downsample[0], block.downsample[1]))
        return encoder.to(memory_format=torch.channels_last)
