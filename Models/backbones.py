"""The backbones, by name."""

from Models.encoder import Encoder
from Models.resnet import ResNet12

BACKBONES: dict[str, type[Encoder]] = {"resnet12": ResNet12}
