"""Any network of the timm library as an encoder."""

import copy
import difflib
import inspect
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor, nn

from Models.encoder import Encoder, Plan
from utils import InputError, first_few, load_plain, printable, status

LARGEST_DEFAULT = 224  # pixels: networks made for larger images take these by default
MAP_SIZE = 5  # more than 5 x 5 nodes took longer and were never better
ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")  # names of models whose configuration is not in the library
# Timm's names that dataloader.views has too. For others, such as "random", bicubic is used.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # keys under which checkpoints keep their weights


@dataclass(frozen=True)
class _Network:
    """What is known about a network without its weights."""

    image_size: int  # that it was made for
    patch: int | None  # that an image size must be a multiple of
    is_fixed: bool  # whether it is built for one image size
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: tuple[int, ...]  # of the map of each layer
    strides: tuple[int, ...]


class TimmEncoder(Encoder):
    """A network of timm, images ``(B, 3, S, S)`` to the map ``(B, C, h, w)`` of one of its layers.

    Class and register tokens are dropped, and pixels are normalised as the network was trained.

    Args:
        model: its name, with or without a tag, or ``hf-hub:OWNER/NAME``, or ``local-dir:FOLDER``.
        image_size: pixels along an edge, None for the default of :meth:`plan`; many transformers then accept no other.
        layer: index in ``forward_intermediates``, as in -2; None for the last.
        weights: a file (.pth, .safetensors), "hub" for the published ones, or "none" for random ones.
        amp, checkpoint_activations: as for :class:`Models.encoder.Encoder`.

    InputError if timm is missing, the name unknown, the size or the layer impossible, or the weights not those of this network.
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
        self.network = _create(model, pretrained=weights == "hub", **settings)
        if weights not in ("hub", "none"):
            _load(self.network, self.name, Path(weights))
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
        quick = min(LARGEST_DEFAULT, network.image_size)
        quick = quick - quick % (network.patch or 1) or quick
        sizes = [image_size] if image_size else [quick, network.image_size]  # some networks accept only their own size
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
        # The network was trained with its own mean and std, not those of the data set.
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
    """Raise InputError unless timm knows a network of this name, with its tag; needs no connection."""
    timm = _timm()
    if model.startswith(ELSEWHERE):
        return
    architecture, dot, _ = model.partition(".")
    if not timm.is_model(architecture):
        known, what, words = timm.list_models(), "model", re.findall("[a-z]{3,}[0-9]*", architecture.lower())
        found = {name: sum(word in name for word in words) for name in known}  # in dinov2_vits14, for example
        near = difflib.get_close_matches(architecture.lower(), known, n=3)
        near = near or sorted(filter(found.get, known), key=lambda name: -found[name])
    else:
        try:
            timm.get_pretrained_cfg(model)
            return
        except RuntimeError:
            near, what = timm.list_pretrained(f"{architecture}.*"), "weights"
    advice = f"the nearest: {first_few(near)}" if near else "list them with timm.list_models() in Python"
    raise InputError(f"timm {timm.__version__} has no {what} {model!r}; {advice}")


@lru_cache
def _network(model: str) -> _Network:
    _check_name(model)
    network = _bare(model)
    config = _timm().data.resolve_model_data_config(network)
    own = network.pretrained_cfg
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
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
    )


def _index(model: str, layer: int | None) -> int:
    count = len(_network(model).channels)
    if not -count <= (layer or 0) < count:
        there = f"{count} layers, 0 to {count - 1} or -1 to -{count}"
        raise InputError(f"-backbone_layer {layer}: timm:{model} has {there}")
    return (-1 if layer is None else layer) % count


@lru_cache
def _probe(model: str, size: int, index: int) -> tuple[int, tuple[tuple[str, Any], ...]]:
    """Cells along an edge of the map of a layer, and the arguments of ``forward_intermediates`` that give it.

    InputError for an image size that the network does not accept.
    """
    network = _network(model)
    if network.patch and size % network.patch and network.is_fixed:
        near = size - size % network.patch or network.patch
        sizes = f"multiples of {network.patch}, the size of its patches, such as {near} or {near + network.patch}"
        raise InputError(f"-image_size {size} does not suit timm:{model}, which takes {sizes}")
    for norm in (True, False):  # convolutional networks have no final norm, and some others refuse it
        try:
            bare = _bare(model, **({"img_size": size} if network.is_fixed else {})).eval()
            known = inspect.signature(bare.forward_intermediates).parameters
            options = {"indices": [index], "output_fmt": "NCHW", "intermediates_only": True}
            options |= {name: value for name, value in {"norm": norm, "stop_early": True}.items() if name in known}
            images = torch.zeros(1, 3, size, size, device=next(bare.parameters()).device)
            with torch.no_grad():
                edge = min(bare.forward_intermediates(images, **options)[-1].shape[-2:])
            if edge < 1 or size < network.strides[index]:
                raise ValueError(f"a cell of its map is {network.strides[index]} pixels wide")
            return edge, tuple(options.items())
        except Exception as error:  # each network refuses in its own way
            fault = error.__cause__ or error
    wanted = f"which was made for {network.image_size} ({_first_line(fault)})"
    raise InputError(f"-image_size {size} does not suit timm:{model}, {wanted}") from fault


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _bare(model: str, **settings: Any) -> nn.Module:
    """A network for its shapes alone: on the meta device where timm can build it there. Leaves the random state as it is."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return _create(model, **settings)
        except InputError as error:
            if isinstance(error.__cause__, OSError):  # of the hub, or a folder
                raise
            return _create(model, **settings)


def _create(model: str, *, pretrained: bool = False, **settings: Any) -> nn.Module:
    timm, asks_hub = _timm(), pretrained or model.startswith(("hf-hub:", "hf_hub:"))
    try:
        with _hub_reachable() if asks_hub else nullcontext():
            network = timm.create_model(model, pretrained=pretrained, num_classes=0, **settings)
    except Exception as error:  # of the hub, of timm, or of the network
        advice = "Check the name and the network, or set -backbone_weights to a file, or to none for random weights"
        if model.startswith("local-dir:"):
            advice = "Check the name of the folder, and what is in it"
        elif model.startswith(ELSEWHERE):
            advice = "Check the name and the network, or give a name of timm and set -backbone_weights to a file"
        reason = _first_line(error).partition(". ")[0].rstrip(".")
        raise InputError(f"timm:{model} cannot be opened: {reason}. {advice}") from error
    if not hasattr(network, "forward_intermediates"):
        raise InputError(f"timm:{model} gives no feature maps (forward_intermediates); choose another model")
    return network


@contextmanager
def _hub_reachable() -> Iterator[None]:
    """Set the hub's client offline if the host cannot be resolved: it would retry for a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not before and not getproxies():
        try:
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _checkpoint_activations(network: nn.Module, name: str) -> None:
    if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        why = "has batch norm, whose statistics would count every batch twice"
        raise InputError(f"-checkpoint_activations: {name} {why}. Leave it out")
    try:
        network.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise InputError(f"-checkpoint_activations: {name} cannot recompute its activations. Leave it out") from None


def _load(network: nn.Module, name: str, path: Path) -> None:
    """Load the weights in a file as timm does, resampled for another image size; none may be missing or unknown."""
    given, own = _read(path), network.state_dict()
    # What timm itself does to the files of other libraries, and to the position tables of other image sizes.
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", lambda tensors, _: tensors)
    classifiers = network.pretrained_cfg.get("classifier") or ()
    left_out = tuple(f"{one}." for one in ([classifiers] if isinstance(classifiers, str) else classifiers))
    try:
        tensors = {key: value for key, value in convert(given, network).items() if not key.startswith(left_out)}
        missing, unknown = network.load_state_dict(tensors, strict=False)
        faults = [f"it lacks {first_few(missing)}"] if missing else []
        faults += [f"it has unknown {first_few([printable(key)[:80] for key in unknown])}"] if unknown else []
    except Exception as error:  # each network reports other shapes or names in its own way
        faults = [printable(str(error).strip().splitlines()[-1].strip())[:200] if str(error) else type(error).__name__]
    if not faults:
        return
    shapes = [value.shape for value in given.values()]
    if len(given) - len(own) not in (0, 2) or shapes[: len(own)] != [value.shape for value in own.values()]:
        raise InputError(f"{path} does not hold the weights of {name}: {'; '.join(faults)}")
    network.load_state_dict(dict(zip(own, given.values(), strict=False)))  # 2 more are the classifier's
    status(f"{path} has other names for its tensors than {name}, but the same shapes: they are taken in order")


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name; nothing in it is executed."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            content = load_file(path)
        except SafetensorError as error:
            raise InputError(f"-backbone_weights {path} is damaged, or not a safetensors file ({error})") from error
    else:
        content = load_plain(path, "file of weights")
    if isinstance(content, dict) and "params" in content:
        advice = "name it with -model_dir (train_meta.py: -pretrain_dir)"
        raise InputError(f"-backbone_weights {path} was trained here: {advice}")
    if isinstance(content, dict):
        content = next((content[key] for key in CONTAINERS if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"-backbone_weights {path} holds no weights by name; it holds a {type(content).__name__}")
    clean = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    return _timm().models.clean_state_dict(clean)
