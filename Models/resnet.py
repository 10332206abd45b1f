"""The encoder: ResNet-12 of the TADAM/FEAT family (DeepEMD paper, section 5.1, "Network")."""

import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

LEAK = 0.1
WIDTHS = (64, 160, 320, 640)


def _conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions beside a 1x1 shortcut; their sum is activated, then halved in height and width.

    ``(B, channels_in, H, W) -> (B, channels_out, H // 2, W // 2)``.
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
        self.downsample = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, kernel_size=1, bias=False), nn.BatchNorm2d(channels_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(self.bn1(self.conv1(x)), LEAK, inplace=True)
        out = F.leaky_relu(self.bn2(self.conv2(out)), LEAK, inplace=True)
        out = self.bn3(self.conv3(out)) + self.downsample(x)
        return F.max_pool2d(F.leaky_relu(out, LEAK, inplace=True), kernel_size=2)


class ResNet12(nn.Module):
    """Images ``(B, 3, H, W)`` to a feature map ``(B, 640, H // 16, W // 16)``; 84 pixels give 5 x 5.

    12,424,320 parameters. H and W must be at least 16.
    """

    out_channels = WIDTHS[-1]

    def __init__(self) -> None:
        super().__init__()
        for number, (before, after) in enumerate(zip((3, *WIDTHS[:-1]), WIDTHS, strict=True), start=1):
            # One block to a layer, kept in a Sequential because the released key names say "layer1.0.".
            self.add_module(f"layer{number}", nn.Sequential(ResidualBlock(before, after)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(images))))
