"""Where weights come from - files, runs, packages, the Hub, a server - and what a package is.

A package is a folder with ``model.safetensors`` and ``config.json``. Nothing in it is executed.
"""

import hashlib
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import BEST_WEIGHTS, RECORD, InputError, file_hash, printable, read_json, status

FORMAT = 1  # of config.json
PACKAGE_WEIGHTS, PACKAGE_CONFIG = "model.safetensors", "config.json"
# The types of what scripts read from config.json, its weights, its data and each of its results.
_ENTRIES = {"flags": dict, "backbone": str, "mean": list, "std": list, "results": list, "weights": dict}
_ENTRIES |= {"head": dict | None, "data": dict | None, "versions": dict | None, "license": str | None}
_WEIGHTS = {"sha256": str, "checkpoint": str | None, "logit_change": float | None}
_DATA = {"set": str | None}
_RESULT = {"flags": dict, "dataset": str, "set": str, "way": int, "shot": int, "episodes": int}
_RESULT |= {"accuracy": int | float, "interval": int | float}
_RANGES = {"mean": (-100, 100), "std": (1e-4, 100)}  # beyond these, no pixels in [0, 1] come out usable
_ALSO_FLAGS = {"backbone": "backbone", "view": "deepemd", "image_size": "image_size"}
STATISTICS = "base_statistics."  # prefix of the keys of the training nodes' mean and deviation
_AGAIN = "Get or export it again"
_REPOSITORY = re.compile(r"hf://([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w./-]*))?")
_LOCAL = re.compile(r"http://(localhost|127\.0\.0\.1|\[::1\])[:/]")


@lru_cache
def locate(source: str) -> Path:
    """The file or folder that ``-model_dir`` names; anything remote is downloaded once, and kept.

    ``hf://owner/name[@revision]`` is a package on the Hugging Face Hub, whose library honours ``HF_ENDPOINT``, ``HF_TOKEN``
    and ``HF_HUB_OFFLINE``; ``https://...#sha256=...`` is a file of weights. Anything else is a path.

    InputError for a name or an address that cannot be used, and for a download that fails.
    """
    if source.startswith("hf://"):
        return _from_hub(source)
    if re.match(r"\w+://", source):
        return _from_server(source)
    return Path(source)


def weights_file(source: str | Path) -> Path:
    """The file of the weights: a folder stands for the ``max_acc.pth`` of a run, or the ``model.safetensors`` of a package."""
    path = locate(str(source))
    if not path.is_dir():
        return path
    is_run = (path / BEST_WEIGHTS).is_file() or not {PACKAGE_WEIGHTS, PACKAGE_CONFIG} & set(os.listdir(path))
    return path / (BEST_WEIGHTS if is_run else PACKAGE_WEIGHTS)


def is_package(weights: Path) -> bool:
    """Whether a file of weights is that of a package, complete or not."""
    return weights.name == PACKAGE_WEIGHTS


def read_config(weights: Path) -> dict[str, Any]:
    """The ``config.json`` of the package whose weights these are; InputError if it is missing, damaged or of another kind."""

    def check(config: Any) -> dict[str, Any]:
        _check_types(config, {"format": int})
        if config["format"] != FORMAT:
            raise ValueError(f"its format is {config['format']!r}; this version reads {FORMAT}")
        _check_types(config, _ENTRIES)
        for name, (low, high) in _RANGES.items():
            values = config[name]
            if len(values) != 3 or not all(type(value) in (int, float) and low <= value <= high for value in values):
                raise ValueError(f"its {name} must be three numbers from {low} to {high}")
        _check_types(config["weights"], _WEIGHTS)
        _check_types(config.get("data") or {}, _DATA)
        for row in config["results"]:
            _check_types(row, _RESULT)
            if not 0 <= row["accuracy"] <= 100:
                raise ValueError("its results have an accuracy that is no percentage")
        if not re.fullmatch("[0-9a-f]{64}", config["weights"]["sha256"]):
            raise ValueError("its weights have no SHA-256")
        # What it says twice must agree; what its flags lack is taken from there.
        described = {flag: config[name] for name, flag in _ALSO_FLAGS.items() if name in config}
        described |= config.get("head") or {}
        for name, value in described.items():
            if config["flags"].setdefault(name, value) != value:
                raise ValueError(f"its flag -{name} contradicts another entry")
        return config

    path = weights.parent / PACKAGE_CONFIG
    if not path.is_file():
        raise InputError(f"{weights.parent} is not a complete package: it has no {PACKAGE_CONFIG}. {_AGAIN}")
    return read_json(path, "the description of a package", check)


def _check_types(part: Any, kinds: dict[str, Any]) -> None:
    for name, kind in kinds.items():
        value = part.get(name) if isinstance(part, dict) else None
        is_no_number = isinstance(value, bool) or isinstance(value, float) and not math.isfinite(value)
        if not isinstance(value, kind) or is_no_number:
            raise TypeError(f"its {name} is missing, or of another type")


def find_record(source: str) -> tuple[Path, dict[str, Any] | None]:
    """The record of the weights of ``-model_dir``: the ``config.json`` of a package, with its flags, or a ``run.json``."""
    weights = weights_file(source)
    if is_package(weights):
        if not weights.is_file():
            raise InputError(f"{weights.parent} is not a complete package: it has no {PACKAGE_WEIGHTS}. {_AGAIN}")
        return weights.parent / PACKAGE_CONFIG, read_config(weights)["flags"]
    return weights.parent / RECORD, None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; of a package, they must be those that its config.json describes.

    InputError if the file is damaged, or not that of the package.
    """
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise InputError(f"reading {path} requires safetensors: pip install safetensors") from error
    content = path.read_bytes()
    if is_package(path):
        found, wanted = hashlib.sha256(content).hexdigest(), read_config(path)["weights"]["sha256"]
        if found != wanted:
            fault = f"{path} is damaged, or not the file of its {PACKAGE_CONFIG}: its SHA-256 is {found}, not {wanted}"
            raise InputError(f"{fault}. Delete it, and get or export it again")
    try:
        return load(content)
    except Exception as error:  # a damaged header can raise anything in the library
        raise InputError(f"{path} is damaged, or not a safetensors file ({printable(str(error))[:150]})") from error


# --- Downloads --------------------------------------------------------------------------------------------------------


def _from_hub(source: str) -> Path:
    found = _REPOSITORY.fullmatch(source)
    if not found or ".." in source:
        form = "Write hf://owner/name, or hf://owner/name@revision"
        raise InputError(f"{printable(source)} is not the name of a package. {form}")
    try:
        from huggingface_hub import hf_hub_download, logging
    except ImportError as error:
        raise InputError(f"{source} requires the Hub's library: pip install huggingface_hub") from error
    logging.set_verbosity_error()  # it retries for half a minute, and reports every attempt
    name, revision = found.groups()
    server = {"endpoint": (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None}
    with _hub_errors(source):
        config = Path(hf_hub_download(name, PACKAGE_CONFIG, revision=revision, **server))
    try:
        # Before weights of another project, which may be large, are downloaded.
        wanted = read_config(config)["weights"]["sha256"]
    except InputError as error:
        raise InputError(f"{source} is not a package that this version reads: {error}") from error
    with _hub_errors(source):
        # From the same commit, which names the folder: the branch may have moved on.
        given = {"revision": config.parent.name, **server}
        if file_hash(hf_hub_download(name, PACKAGE_WEIGHTS, **given)) != wanted:  # damaged in the cache, or on the Hub
            hf_hub_download(name, PACKAGE_WEIGHTS, **given, force_download=True)
    return config.parent


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    """Turn the errors of the Hub's library into one line that says what to do."""
    try:
        yield
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        token = "a private or gated one requires access and HF_TOKEN (hf auth login)"
        if "GatedRepoError" in kinds or "RepositoryNotFoundError" in kinds:
            advice = f"There is no such repository, or this is not allowed to see it: check the name; {token}"
        elif "RevisionNotFoundError" in kinds:
            advice = "It has no such revision: name a branch, a tag or a commit of it"
        elif kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
            why = printable(" ".join(str(error.__cause__ or "").split())).partition(" For more")[0][:150]
            advice = f"It is not in the cache, and the Hub does not give it{f' ({why})' if why else ''}. "
            advice += "Check the connection, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE, and run the command again"
        elif "EntryNotFoundError" in kinds:
            advice = f"It is not a package of export.py: it lacks {PACKAGE_CONFIG} or {PACKAGE_WEIGHTS}"
        else:
            text = printable(" ".join(str(error).split()))[:200]
            advice = f"{type(error).__name__}: {text}. Check the connection, HF_ENDPOINT and HF_TOKEN, and run the command again"
        raise InputError(f"cannot get {source}. {advice}") from error


def _from_server(source: str) -> Path:
    address, _, fragment = source.partition("#")
    digest = fragment.removeprefix("sha256=").lower()
    if not (address.startswith("https://") or _LOCAL.match(address)):
        allowed = "weights are downloaded over https:// or from the Hub (hf://owner/name) alone"
        raise InputError(f"{printable(source)}: {allowed}")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        form = f"{printable(address)}#sha256=<64 digits>"
        raise InputError(f"weights from a server need their SHA-256, as sha256sum prints it: write -model_dir '{form}'")
    suffix = Path(address.partition("?")[0]).suffix[:12] or ".pth"
    path = Path(torch.hub.get_dir(), "checkpoints", f"{digest}{suffix}")
    if path.is_file() and file_hash(path) == digest:
        return path
    status(f"downloading {printable(address)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path), hash_prefix=digest, progress=sys.stderr.isatty())
    except RuntimeError as error:
        raise InputError(
            f"{printable(address)} is not the file of that SHA-256; the download was removed. {error}"
        ) from error
    except (OSError, ValueError, HTTPException) as error:
        advice = "Check the address and the connection, and run the command again"
        raise InputError(f"cannot download {printable(address)} ({printable(str(error))[:200]}). {advice}") from error
    return path
