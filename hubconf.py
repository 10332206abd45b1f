"""Entry points for torch.hub, from a clone or from the web::

    model = torch.hub.load(REPO, "deepemd", "RUN_OR_PACKAGE", source="local")
    emd = torch.hub.load(REPO, "emd", source="local")

Each imports what it needs when it is called, so that ``emd`` works with torch and NumPy alone. A project that calls them may
have modules named ``utils`` or ``Models`` of its own.
"""

from __future__ import annotations

import sys as _sys  # a name without an underscore would be an entry point
from collections.abc import Callable as _Callable
from collections.abc import Iterator as _Iterator
from contextlib import contextmanager as _contextmanager
from functools import partial as _partial
from pathlib import Path as _Path
from typing import Any as _Any

dependencies = ["torch", "numpy"]
_NAMES = ("Models", "dataloader", "deepemd", "engine", "pictures", "utils")


@_contextmanager
def _own_modules() -> _Iterator[None]:
    """Within this context these names are our modules; afterwards they are again those of the caller, if it has any.

    Our modules within packages stay in ``sys.modules``: solvers are imported when they are used.
    """
    here = _Path(__file__).resolve().parent

    def named(*, ours: bool) -> dict[str, _Any]:
        found = {name: one for name, one in _sys.modules.items() if name.partition(".")[0] in _NAMES}
        files = {name: _Path(getattr(one, "__file__", None) or "/").resolve() for name, one in found.items()}
        return {name: one for name, one in found.items() if files[name].is_relative_to(here) == ours}

    absent, theirs = [name for name in _NAMES if name not in _sys.modules], named(ours=False)
    for name in theirs:
        del _sys.modules[name]
    kept = _sys.modules.setdefault("_deepemd_of_hub", {})  # torch.hub executes this file for every call
    _sys.modules.update(kept)
    try:
        yield
    finally:
        kept.update(named(ours=True))
        for name in absent:
            _sys.modules.pop(name, None)
        _sys.modules.update(theirs)


@_own_modules()
def deepemd(source: str, *, device: str | None = None, **flags: _Any) -> _Any:
    """A model that classifies images by a few examples of each class: :func:`deepemd.load`."""
    from deepemd import load

    return load(source, device=device, **flags)


@_own_modules()
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


@_own_modules()
def emd(**options: _Any) -> _Callable[..., _Any]:
    """The EMD layer, :func:`Models.emd.emd`: ``(cost, supply, demand) -> value, flow``. Options such as ``solver="simplex"``
    become its defaults.
    """
    from Models.emd import emd as layer

    return _partial(layer, **options) if options else layer
