"""Entry points for torch.hub, from a clone or from the web::

    model = torch.hub.load(REPO, "deepemd", "RUN_OR_PACKAGE", source="local")
    emd = torch.hub.load(REPO, "emd", source="local")

Each imports what it needs when it is called, so that ``emd`` works with torch and NumPy alone.
"""

from __future__ import annotations

from collections.abc import Callable as _Callable  # a name without an underscore would be an entry point
from functools import partial as _partial
from typing import Any as _Any

dependencies = ["torch", "numpy"]


def deepemd(source: str, *, device: str | None = None, **flags: _Any) -> _Any:
    """A model that classifies images by a few examples of each class: :func:`deepemd.load`."""
    from deepemd import load

    return load(source, device=device, **flags)


def resnet12(pretrained: str | None = None, **settings: _Any) -> _Any:
    """The encoder of the paper, ``(B, 3, H, W)`` to ``(B, 640, H // 16, W // 16)``, with random or given weights.

    ``pretrained`` is a checkpoint, a run, or a package, which brings its mean and deviation of the pixels; settings are those of
    :class:`Models.encoder.Encoder`.
    """
    from Models import ResNet12
    from Models.package import is_package, read_config, weights_file
    from Models.weights import load_encoder_weights

    if pretrained is not None and is_package(path := weights_file(pretrained)):
        settings = {name: read_config(path)[name] for name in ("mean", "std")} | settings
    encoder = ResNet12(**settings)
    if pretrained is not None:
        load_encoder_weights(encoder, pretrained)
    return encoder.eval()


def emd(**options: _Any) -> _Callable[..., _Any]:
    """The EMD layer, :func:`Models.emd.emd`: ``(cost, supply, demand) -> value, flow``. Options such as ``solver="simplex"``
    become its defaults.
    """
    from Models.emd import emd as layer

    return _partial(layer, **options) if options else layer
