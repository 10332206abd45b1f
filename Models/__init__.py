"""The DeepEMD model: encoder, nodes, optimal transport, structured fully connected layer."""

from Models.classifier import Classifier
from Models.deepemd import DeepEMD
from Models.resnet import ResNet12

__all__ = ["Classifier", "DeepEMD", "ResNet12"]
