"""The backbones, by name."""

import difflib
from typing import Any

from Models.conv4 import Conv4
from Models.encoder import Encoder, Plan
from Models.resnet import ResNet12
from Models.timm_encoder import TimmEncoder
from utils import InputError

BACKBONES: dict[str, type[Encoder]] = {"resnet12": ResNet12, "conv4": Conv4, "timm": TimmEncoder}


def backbone_class(text: str) -> tuple[type[Encoder], str]:
    """``NAME`` or ``NAME:MODEL`` to the class and the model; InputError for an unknown name."""
    name, _, model = text.partition(":")
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, n=1) or list(BACKBONES)
        hint = "" if model else f". A model of the timm library is timm:{name}"
        raise InputError(f"unknown backbone {name!r}; choose {' or '.join(near)}{hint}")
    return BACKBONES[name], model


def plan_backbone(text: str, **wanted: Any) -> Plan:
    """What a backbone makes of images: :meth:`Models.encoder.Encoder.plan` of the one that is named."""
    backbone, model = backbone_class(text)
    return backbone.plan(model, **wanted)


def make_encoder(text: str, **settings: Any) -> Encoder:
    """The encoder that is named: :meth:`Models.encoder.Encoder.build`."""
    backbone, model = backbone_class(text)
    return backbone.build(model, **settings)
