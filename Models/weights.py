"""Checkpoints: the published formats, read with nothing in them executed."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import BEST_WEIGHTS, InputError, first_few, load_plain

# Keys that a checkpoint may have or lack without being of another network: the pre-training classifier, and counters
# that no computation reads.
_IGNORED_KEYS = re.compile(r"^(fc|classifier)\.|\.num_batches_tracked$")


def load_encoder_weights(model: nn.Module, path: str | Path, *, hint: str = "") -> None:
    """Load an encoder from any of the published checkpoint formats.

    Args:
        model: a module whose ``encoder`` is to be filled, or an encoder itself.
        path: a file ``{"params": state_dict}``: keys of the encoder as they are (pre-trained), or behind ``encoder.`` or
            ``module.encoder.`` (meta-trained). A folder stands for the ``max_acc.pth`` in it.
        hint: what to do where there is no such file.

    Raises:
        InputError: no such file, no such format, the weights of another architecture, or weights that no training can
            have left (not finite, negative variances).
    """
    encoder = getattr(model, "encoder", model)
    path = Path(path)
    if path.is_dir():
        path = path / BEST_WEIGHTS
    if not path.is_file():
        raise InputError(f"expected a checkpoint in {path}; there is no such file. {hint}".strip())
    params = _read_params(path)
    given = {re.sub(r"^(module\.)?(encoder\.(module\.)?)?", "", key): value for key, value in params.items()}

    wanted = encoder.state_dict()
    missing = [key for key in wanted if key not in given and not _IGNORED_KEYS.search(key)]
    unexpected = [key for key in given if key not in wanted and not _IGNORED_KEYS.search(key)]
    given = {key: given.get(key, value) for key, value in wanted.items()}
    misshapen = [key for key in wanted if given[key].shape != wanted[key].shape]
    if missing or unexpected or misshapen:
        faults = [f"lacks {first_few(missing)}"] if missing else []
        faults += [f"has unknown {first_few(unexpected)}"] if unexpected else []
        faults += [
            f"has {key} {tuple(given[key].shape)} where {tuple(wanted[key].shape)} is expected" for key in misshapen[:1]
        ]
        raise InputError(f"expected the weights of {type(encoder).__name__} in {path}; it {'; '.join(faults)}")
    for key, value in given.items():
        if not bool(value.isfinite().all()):
            raise InputError(f"expected finite weights in {path}; {key} has entries that are NaN or infinite")
        if key.endswith("running_var") and bool((value < 0).any()):
            raise InputError(f"expected variances of 0 or more in {path}; {key} has negative entries")
    encoder.load_state_dict(given)


def _read_params(path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file."""
    content = load_plain(path, "checkpoint")
    if not isinstance(content, dict) or not isinstance(content.get("params"), dict):
        raise InputError(f'expected {{"params": state_dict}} in {path}; got {_describe(content)}')
    for key, value in content["params"].items():
        if not isinstance(key, str):
            raise InputError(f"expected names as keys in {path}; got {key!r}, {_describe(key)}")
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            kind = f"a {value.layout} tensor" if isinstance(value, torch.Tensor) else _describe(value)
            kind = "a tensor without values" if getattr(getattr(value, "device", None), "type", "") == "meta" else kind
            raise InputError(f"expected dense tensors in {path}; {key} is {kind}")
    return content["params"]


def _describe(content: Any) -> str:
    return (
        f"a dict with the keys {first_few(list(content))}"
        if isinstance(content, dict)
        else f"a {type(content).__name__}"
    )
