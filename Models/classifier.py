"""The pre-training head (DeepEMD paper, section 4.4, "feature pre-training")."""

import torch.nn as nn
from torch import Tensor

from Models.resnet import ResNet12


class Classifier(nn.Module):
    """ResNet-12 with one linear layer on the globally averaged feature: ``(B, 3, H, W) -> (B, num_classes)``."""

    def __init__(self, encoder: ResNet12, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.fc = nn.Linear(encoder.out_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.encoder(images).mean(dim=(-2, -1)))
