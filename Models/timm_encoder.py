"""Any network of the timm library as an encoder."""

import copy
import difflib
import inspect
import logging
import socket
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor, nn

from Models.encoder import Encoder, Plan
from utils import InputError, first_few, load_plain, printable, status

LARGEST_DEFAULT = 224  # pixels: networks made for larger images take these by default
MAP_SIZE = 5  # more nodes than 5 x 5 cost time and were never better
ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")  # names that lead to a configuration outside of the library
# What timm calls a resize, by the names of dataloader.views; others, such as "random", are done bicubically.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # of the weights in a checkpoint


@dataclass(frozen=True)
class _Network:
    """What is known of a network without its weights."""

    image_size: int  # that it was made for
    patch: int | None  # that an image size must be a multiple of
    is_fixed: bool  # whether it is built for one image size
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: tuple[int, ...]  # of the map of each layer
    strides: tuple[int, ...]
    classifiers: tuple[str, ...]  # names of the modules that are left out here


class TimmEncoder(Encoder):
    """A network of timm, images ``(B, 3, S, S)`` to the map ``(B, C, h, w)`` of one of its layers.

    Prefix tokens are dropped, and pixels are normalised as the network was trained.

    Args:
        model: its name, with or without a tag, or ``hf-hub:OWNER/NAME``, or ``local-dir:FOLDER``.
        image_size: pixels along an edge, None for those of :meth:`plan`; many transformers then take no other.
        layer: index in ``forward_intermediates``, as in -2; None for the last.
        weights: a file (.pth, .safetensors), "hub" for the published ones, or "none" for random ones.
        amp, checkpoint_activations: as for :class:`Models.encoder.Encoder`.

    InputError if timm is missing, the name unknown, the size or the layer impossible, or the weights those of another network.
    """

    summary = "a network of the timm library, as in timm:vit_small_patch14_dinov2.lvd142m"
    comes_with_weights = True

    def __init__(
        self,
        model: str,
        *,
        image_size: int | None = None,
        layer: int | None = None,
        weights: str = "hub",
        amp: str = "off",
        checkpoint_activations: bool = False,
    ) -> None:
        plan, network = self.plan(model, image_size=image_size, layer=layer, weights=weights), _network(model)
        super().__init__(mean=network.mean, std=network.std, amp=amp, checkpoint_activations=checkpoint_activations)
        self.model, self.layer = model, _index(model, layer)
        self.out_channels, self.stride = network.channels[self.layer], max(1, network.strides[self.layer])
        self.fixed_size = plan.image_size if network.is_fixed else None
        settings = {"img_size": plan.image_size} if network.is_fixed else {}
        self.network = _with_weights(model, weights, settings)
        self.weights = self.name if weights == "hub" else weights
        self.options = dict(_probe(model, plan.image_size, self.layer)[1])
        if checkpoint_activations:
            _checkpoint_activations(self.network, self.name)
        if amp != "off":
            self.to(memory_format=torch.channels_last)

    @property
    def name(self) -> str:
        return f"timm:{self.model}"

    @classmethod
    def plan(
        cls, model: str = "", *, image_size: int | None = None, layer: int | None = None, weights: str | None = None
    ) -> Plan:
        if weights not in (None, "hub", "none") and not Path(weights).is_file():
            raise InputError(f"-backbone_weights {weights}: there is no such file")
        if not model:
            raise InputError("-backbone timm needs a model of the library, as in timm:vit_small_patch14_dinov2.lvd142m")
        network, index = _network(model), _index(model, layer)
        sizes = [image_size] if image_size else _default_sizes(network)
        for size in sizes:
            try:
                edge, _ = _probe(model, size, index)
                break
            except InputError:
                if size == sizes[-1]:
                    raise
        return Plan(size, edge, map_size=min(MAP_SIZE, edge), interpolation=network.interpolation)

    @classmethod
    def build(cls, model: str = "", *, weights: str | None = None, mean: Any = None, std: Any = None, **settings: Any):
        # The statistics of a data set mean nothing to a network that was trained on another.
        return cls(model, weights=weights or "hub", **settings)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "layer": self.layer, "timm": _timm().__version__}

    def maps(self, images: Tensor) -> Tensor:
        return self.network.forward_intermediates(images, **self.options)[-1]

    def folded(self) -> "TimmEncoder":
        return copy.deepcopy(self).eval().requires_grad_(False)


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise InputError(f"-backbone timm:... requires the timm library ({error}): pip install timm") from error
    return timm


def _check_name(model: str) -> None:
    """Raise InputError unless timm knows a network of this name, with its tag; asks nobody."""
    timm = _timm()
    if model.startswith(ELSEWHERE):
        return
    architecture, dot, _ = model.partition(".")
    if not timm.is_model(architecture):
        known, what = timm.list_models(), "model"
        near = difflib.get_close_matches(architecture, known, n=3) or [name for name in known if architecture in name]
    else:
        try:
            timm.get_pretrained_cfg(model)
            return
        except RuntimeError:
            near, what = timm.list_pretrained(f"{architecture}.*"), "weights"
    advice = (
        f"the nearest: {first_few(near)}"
        if near
        else 'list them with python -c "import timm; print(timm.list_models())"'
    )
    raise InputError(f"timm {timm.__version__} has no {what} {model!r}; {advice}")


@lru_cache
def _network(model: str) -> _Network:
    _check_name(model)
    network = _bare(model)
    config = _timm().data.resolve_model_data_config(network)
    own = network.pretrained_cfg
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    classifiers = own.get("classifier") or ()
    layers = network.feature_info
    return _Network(
        image_size=config["input_size"][-1],
        patch=(patch if isinstance(patch, int) else patch[0]) if patch else None,
        is_fixed=bool(own.get("fixed_input_size")),
        interpolation=config["interpolation"] if config["interpolation"] in INTERPOLATIONS else "bicubic",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        channels=tuple(layer["num_chs"] for layer in layers),
        strides=tuple(layer["reduction"] for layer in layers),
        classifiers=(classifiers,) if isinstance(classifiers, str) else tuple(classifiers),
    )


def _index(model: str, layer: int | None) -> int:
    count = len(_network(model).channels)
    if not -count <= (layer or 0) < count:
        raise InputError(
            f"-backbone_layer {layer}: timm:{model} has {count} layers, 0 to {count - 1} or -1 to -{count}"
        )
    return (-1 if layer is None else layer) % count


def _default_sizes(network: _Network) -> list[int]:
    """Image sizes to try: what is quick enough, else what the network was made for."""
    size = min(LARGEST_DEFAULT, network.image_size)
    return [size - size % (network.patch or 1) or size, network.image_size]


@lru_cache
def _probe(model: str, size: int, index: int) -> tuple[int, tuple[tuple[str, Any], ...]]:
    """Cells along an edge of the map of a layer, and the arguments of ``forward_intermediates`` that give it.

    InputError for images that the network does not take.
    """
    network = _network(model)
    if network.patch and size % network.patch and network.is_fixed:
        near = size - size % network.patch or network.patch
        sizes = f"multiples of {network.patch}, the size of its patches, such as {near} or {near + network.patch}"
        raise InputError(f"-image_size {size} does not suit timm:{model}, which takes {sizes}")
    bare = _bare_of_size(model, size)
    known = inspect.signature(bare.forward_intermediates).parameters
    images = torch.zeros(1, 3, size, size, device=next(bare.parameters()).device)
    for norm in (True, False):  # convolutional networks have no final norm, and some others refuse it
        wanted = {"norm": norm, "stop_early": True}
        options = {"indices": [index], "output_fmt": "NCHW", "intermediates_only": True}
        options |= {name: value for name, value in wanted.items() if name in known}
        try:
            with torch.no_grad():
                edge = min(bare.eval().forward_intermediates(images, **options)[-1].shape[-2:])
            if edge < 1 or size < network.strides[index]:
                raise ValueError(f"a cell of its map is {network.strides[index]} pixels wide")
            return edge, tuple(options.items())
        except Exception as error:  # each network refuses in its own way
            fault = error
    raise _unsuited(model, size, fault) from fault


def _bare_of_size(model: str, size: int) -> nn.Module:
    try:
        return _bare(model, **({"img_size": size} if _network(model).is_fixed else {}))
    except InputError as error:
        raise _unsuited(model, size, error.__cause__ or error) from error


def _unsuited(model: str, size: int, error: BaseException) -> InputError:
    fault = str(error).splitlines()[0] if str(error) else type(error).__name__
    made_for = _network(model).image_size
    return InputError(f"-image_size {size} does not suit timm:{model}, which was made for {made_for} ({fault})")


def _bare(model: str, **settings: Any) -> nn.Module:
    """A network without numbers, for its shapes, where timm can build it so; draws nothing from the generator."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return _create(model, pretrained=False, **settings)
        except InputError as error:
            if isinstance(error.__cause__, OSError):  # of the hub, or a folder
                raise
            return _create(model, pretrained=False, **settings)


def _create(model: str, **settings: Any) -> nn.Module:
    timm, asks_hub = _timm(), settings["pretrained"] or model.startswith(("hf-hub:", "hf_hub:"))
    try:
        with _hub_reachable() if asks_hub else nullcontext():
            network = timm.create_model(model, **{"num_classes": 0, **settings})
    except Exception as error:  # of the hub, of timm, or of the network
        fault = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        advice = "Set -backbone_weights to a file, or to none for random weights" if settings["pretrained"] else ""
        if model.startswith(ELSEWHERE):
            is_here = model.startswith("local-dir:")
            advice = "Check the name" + (
                " of the folder"
                if is_here
                else " and the network, or give a name of timm and set -backbone_weights to a file"
            )
        raise InputError(f"timm:{model} cannot be opened: {fault.strip().rstrip('.')}. {advice}".strip(". ")) from error
    if not hasattr(network, "forward_intermediates"):
        raise InputError(f"timm:{model} gives no feature maps (forward_intermediates); choose another model")
    return network


def _hub_reachable() -> Any:
    """A context in which the hub's client does not try for a minute to reach it, if its name cannot be resolved."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    if not offline and not getproxies():
        try:
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        except OSError:
            offline = True
    return mock.patch.object(constants, "HF_HUB_OFFLINE", offline)


def _checkpoint_activations(network: nn.Module, name: str) -> None:
    if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        why = "has batch norm, whose statistics would count every batch twice"
        raise InputError(f"-checkpoint_activations: {name} {why}. Leave it out")
    try:
        network.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise InputError(f"-checkpoint_activations: {name} cannot recompute its activations. Leave it out") from None


def _with_weights(model: str, weights: str, settings: dict[str, Any]) -> nn.Module:
    if weights == "none":
        return _create(model, pretrained=False, **settings)
    if weights == "hub":
        return _create(model, pretrained=True, **settings)
    given = _read(Path(weights))
    try:
        return _load(model, given, weights, settings)
    except InputError:
        renamed = _by_order(model, given)
        if renamed is None:
            raise
    network = _load(model, renamed, weights, settings)
    status(f"{weights} has other names for its tensors than timm:{model}, but the same shapes: they are taken in order")
    return network


def _load(model: str, given: dict[str, Tensor], path: str, settings: dict[str, Any]) -> nn.Module:
    """The network with weights that timm reads, resampled for another image size; all of them, and no others."""
    found, real = [], nn.Module.load_state_dict
    tensors = {key: value for key, value in given.items() if not _of(key, _network(model).classifiers)}

    def recorded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found.append(real(self, *args, **kwargs))
        return found[-1]

    # timm logs what a file lacks, and goes on.
    quiet = mock.patch.object(logging.getLogger("timm.models._builder"), "disabled", True)
    overlay = {"source": "", "file": None, "state_dict": tensors}
    try:
        with quiet, mock.patch.object(nn.Module, "load_state_dict", recorded):
            network = _timm().create_model(
                model, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **settings
            )
    except Exception as error:  # whatever the network says of other shapes or names
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise InputError(f"{path} does not hold the weights of timm:{model}: {printable(lines[-1])[:200]}") from error
    network.pretrained_cfg.pop("state_dict", None)
    counted = {key for key, _ in network.named_parameters()}
    missing = [key for result in found for key in result.missing_keys if key in counted or "running_" in key]
    unknown = [key for result in found for key in result.unexpected_keys]
    if missing or unknown or not found:
        faults = [f"it lacks {first_few(missing)}"] if missing else []
        faults += [f"it has unknown {first_few([printable(key)[:80] for key in unknown])}"] if unknown else []
        raise InputError(f"{path} does not hold the weights of timm:{model}: {'; '.join(faults)}")
    return network


def _of(key: str, modules: tuple[str, ...]) -> bool:
    return any(key.startswith(f"{module}.") for module in modules)


def _by_order(model: str, given: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors under the names of timm, if they are as many and of the same shapes in the same order; else None."""
    for classes in ({}, {"num_classes": 0}):
        own = _timm().get_pretrained_cfg(model) if not model.startswith(ELSEWHERE) else None
        wanted = _bare(model, **({"num_classes": own.num_classes} if own and not classes else {})).state_dict()
        if [value.shape for value in wanted.values()] == [value.shape for value in given.values()]:
            return dict(zip(wanted, given.values(), strict=True))
    return None


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name; nothing in it is executed."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            content = load_file(path)
        except SafetensorError as error:
            raise InputError(f"-backbone_weights {path} is no safetensors file, or damaged ({error})") from error
    else:
        content = load_plain(path, "file of weights")
    if isinstance(content, dict) and "params" in content:
        raise InputError(
            f"-backbone_weights {path} was trained here: name it with -model_dir (train_meta.py: -pretrain_dir)"
        )
    if isinstance(content, dict):
        content = next((content[key] for key in CONTAINERS if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"-backbone_weights {path} holds no weights by name; it holds a {type(content).__name__}")
    clean = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    return _timm().models.clean_state_dict(clean)
