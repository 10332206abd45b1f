"""Checkpoints: the published formats, read without executing anything in them."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import BEST_WEIGHTS, InputError, first_few, load_plain, printable

# What published checkpoints put before the keys of an encoder.
_PREFIX = re.compile(r"^(module\.)?(encoder\.(module\.)?)?")
# Keys that a checkpoint may have or lack without being of another network: the pre-training classifier, and counters
# that no computation reads.
_CLASSIFIER, _COUNTER = re.compile(r"^(fc|classifier)\."), re.compile(r"\.num_batches_tracked$")
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def load_encoder_weights(model: nn.Module, path: str | Path, *, hint: str = "") -> None:
    """Load an encoder from any of the published checkpoint formats.

    Args:
        model: a module whose ``encoder`` is to be filled, or an encoder itself.
        path: a file ``{"params": state_dict}``: keys of the encoder as they are (pre-trained), or behind ``encoder.`` or
            ``module.encoder.`` (meta-trained). A folder stands for the ``max_acc.pth`` in it.
        hint: what to do if there is no such file.

    Raises:
        InputError: no such file, another format, the weights of another architecture, or weights that no training leaves (of
            other than floating-point numbers, not finite, negative variances). The model is then unchanged.
    """
    encoder = getattr(model, "encoder", model)
    path = Path(path)
    if path.is_dir():
        path = path / BEST_WEIGHTS
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}. {hint}".strip())
    wanted = encoder.state_dict()
    given = _read_params(path, wanted)
    missing = [key for key in wanted if key not in given and not _COUNTER.search(key)]
    unknown = [_shown(key) for key in given if key not in wanted and not _COUNTER.search(key)]
    misshapen = [key for key in wanted if key in given and given[key].shape != wanted[key].shape]
    if missing or unknown or misshapen:
        faults = [f"it lacks {first_few(missing)}"] if missing else []
        faults += [f"it has unknown {first_few(unknown)}"] if unknown else []
        faults += [f"{key} is {tuple(given[key].shape)}, not {tuple(wanted[key].shape)}" for key in misshapen[:1]]
        raise InputError(f"{path} does not hold the weights of {type(encoder).__name__}: {'; '.join(faults)}")
    # In the encoder's own number format, in which a large number may be infinite.
    given = {key: given[key].detach().to(value.dtype) if key in given else value for key, value in wanted.items()}
    for key, value in given.items():
        if not bool(value.isfinite().all()):
            raise InputError(f"{path} is not the result of a training: {key} has NaN or infinite entries")
        if key.endswith("running_var") and bool((value < 0).any()):
            raise InputError(f"{path} is not the result of a training: {key} has negative entries")
    encoder.load_state_dict(given)


def _read_params(path: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in a checkpoint, by the names that they have in an encoder."""
    content = load_plain(path, "checkpoint")
    if not isinstance(content, dict) or not isinstance(content.get("params"), dict):
        raise InputError(f'{path} must contain {{"params": state_dict}}; it contains {_describe(content)}')
    params: dict[str, Tensor] = {}
    for name, value in content["params"].items():
        if not isinstance(name, str):
            raise InputError(f"the names of the weights in {path} must be strings; one is {_describe(name)}")
        key = _PREFIX.sub("", name)
        if _CLASSIFIER.match(key):
            continue
        if key in params:
            raise InputError(f"{path} has two entries for {_shown(key)}, behind different prefixes")
        is_counter = bool(_COUNTER.search(key))
        integers = (wanted[key].dtype,) if key in wanted and not wanted[key].is_floating_point() else ()
        fault = _fault(value, integers or _FLOATS)
        if fault and not is_counter:
            raise InputError(f"the weights in {path} must be dense floating-point tensors; {_shown(key)} is {fault}")
        if not fault and not (is_counter and value.dim()):
            params[key] = value
    return params


def _fault(value: Any, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why this is no dense tensor of one of the types, if it is none."""
    if not isinstance(value, Tensor):
        return _describe(value)
    if value.device.type == "meta":
        return "a tensor without values"
    if value.is_nested or value.layout != torch.strided:
        return "a nested tensor" if value.is_nested else f"a {value.layout} tensor"
    return None if value.dtype in dtypes else f"a {value.dtype} tensor"


def _describe(content: Any) -> str:
    if isinstance(content, dict):
        return f"a dict with the keys {first_few([_shown(key) for key in content])}"
    return f"a {type(content).__name__}"


def _shown(key: Any) -> str:
    return printable(str(key))[:80]
