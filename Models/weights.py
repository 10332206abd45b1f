"""Checkpoints and packages: read without executing anything in them."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from Models.package import STATISTICS, is_package, read_config, read_safetensors, weights_file
from Models.statistics import OF_STATISTICS, NodeStatistics
from utils import InputError, first_few, load_plain, printable

# What published checkpoints put before the keys of an encoder.
_PREFIX = re.compile(r"^(module\.)?(encoder\.(module\.)?)?")
# What a checkpoint may have or lack: the pre-training classifier, and counters that no computation reads.
_CLASSIFIER, _COUNTER = re.compile(r"^(fc|classifier)\."), re.compile(r"\.num_batches_tracked$")
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def load_encoder_weights(model: nn.Module, path: str | Path, *, hint: str = "") -> None:
    """Load an encoder, or the ``encoder`` of a model, from a package or any of the published checkpoint formats.

    A model also takes the statistics of training nodes that a package may have.

    Args:
        path: as for :func:`Models.package.locate`: a file ``{"params": state_dict}`` with keys of the encoder as they are
            (pre-trained), or behind ``encoder.`` or ``module.encoder.`` (meta-trained); the same keys in a safetensors file;
            the folder of a run, or of a package.
        hint: what to do if there is no such file.

    Raises:
        InputError: no such file, another format or architecture, or weights that no training leaves (not of floating-point
            numbers, not finite, negative variances). The model is then unchanged.
    """
    encoder = getattr(model, "encoder", model)
    path = weights_file(path)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}. {hint}".strip())
    wanted, given = encoder.state_dict(), _read_params(path)
    statistics = _take_statistics(path, given)
    missing = [key for key in wanted if key not in given and not _COUNTER.search(key)]
    unknown = sorted(_shown(key) for key in given if key not in wanted)
    misshapen = [key for key in wanted if key in given and given[key].shape != wanted[key].shape]
    if missing or unknown or misshapen:
        name = getattr(encoder, "name", type(encoder).__name__)
        faults = [f"it lacks {first_few(missing)}"] if missing else []
        faults += [f"it has unknown {first_few(unknown)}"] if unknown else []
        faults += [f"{key} is {tuple(given[key].shape)}, not {tuple(wanted[key].shape)}" for key in misshapen[:1]]
        if misshapen and getattr(encoder, "fixed_size", None):
            faults += ["such a network takes images of the -image_size that it was trained with alone"]
        raise InputError(f"{path} does not hold the weights of {name}: {'; '.join(faults)}")
    for key, value in given.items():
        given[key] = value = value.detach().to(wanted[key].dtype)  # in which a large number may be infinite
        is_negative = key.endswith("running_var") and (value < 0).any()
        if is_negative or not value.isfinite().all():
            fault = "negative" if is_negative else "NaN or infinite"
            raise InputError(f"{path} is not the result of a training: {key} has {fault} entries")
    if statistics and model is not encoder:
        model.use_statistics(statistics)
    encoder.load_state_dict(given, strict=False)


def _take_statistics(path: Path, given: dict[str, Tensor]) -> NodeStatistics | None:
    """Move the statistics of training nodes, if there are any, out of what was read."""
    taken = {key.removeprefix(STATISTICS): given.pop(key) for key in list(given) if key.startswith(STATISTICS)}
    norm = read_config(path)["flags"].get("norm") if is_package(path) else None
    if not taken and norm not in OF_STATISTICS:
        return None
    try:
        if taken.keys() != {"mean", "deviation"}:
            raise ValueError(f"a mean and a deviation are needed; there is {' and '.join(taken) or 'neither'}")
        return NodeStatistics(**{name: value.float() for name, value in taken.items()})
    except ValueError as error:
        fault = f"its {STATISTICS[:-1]} cannot be used ({printable(str(error))[:200]})"
        raise InputError(f"{path} is damaged: {fault}") from error


def _read_params(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of weights, by the names that they have in an encoder."""
    content = {"params": read_safetensors(path)} if is_safetensors(path) else load_plain(path, "checkpoint")
    if not isinstance(content, dict) or not isinstance(content.get("params"), dict):
        found = f"{_describe(content)}. Weights of timm are for -backbone_weights"
        raise InputError(f'{path} must contain {{"params": state_dict}}; it contains {found}')
    params: dict[str, Tensor] = {}
    for name, value in content["params"].items():
        key = name if is_package(path) else _PREFIX.sub("", str(name))
        is_counter = bool(_COUNTER.search(key))
        is_good = _is_dense(value) and (value.dtype == torch.int64 if is_counter else value.dtype in _FLOATS)
        if _CLASSIFIER.match(key) and not is_package(path) or is_counter and not is_good:
            continue
        if key in params:
            raise InputError(f"{path} has two entries for {_shown(key)}, behind different prefixes")
        if not is_good:
            what = f"{_shown(key)} is {_describe(value)}"
            raise InputError(f"the weights in {path} must be dense floating-point tensors; {what}")
        params[key] = value
    return params


def is_safetensors(path: Path) -> bool:
    """By its name or, as of a file from a server, its content."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _is_dense(value: Any) -> bool:
    is_strided = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    return is_strided and value.device.type != "meta"


def _describe(content: Any) -> str:
    if isinstance(content, dict):
        return f"a dict with the keys {first_few([_shown(key) for key in content])}"
    if isinstance(content, Tensor):
        return f"a {content.dtype} tensor" if _is_dense(content) else "a sparse, nested or empty tensor"
    return f"a {type(content).__name__}"


def _shown(key: Any) -> str:
    return printable(str(key))[:80]
