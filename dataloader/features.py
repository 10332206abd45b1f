"""Nodes in a file, from any encoder: what is evaluated instead of images.

A file of numpy (.npz) has the arrays ``nodes (B, C, N)``, or ``(B, C)`` for one node per image, and ``labels (B,)``, whole
numbers or names of classes; optionally ``class_names``, by label, ``files (B,)``, relative to the split, and ``train_nodes``
and ``train_labels``, images of the training classes. Nothing in it is executed.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dataloader.views import FcnView
from utils import InputError, check_node_count, file_hash, first_few, printable, warn, write_output

REQUIRED = ("nodes", "labels")
ARRAYS = (*REQUIRED, "class_names", "files", "train_nodes", "train_labels")


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Images as their nodes, in place of an :class:`dataloader.dataset.ImageDataset` that an encoder would see."""

    nodes: Tensor  # (B, C, N), float16 or float32
    labels: list[int]  # one per image, from 0 in the order of class_names
    class_names: list[str]
    paths: list[str]  # names of the images, relative to the split; empty where the file has none
    train_nodes: Tensor | None = None  # (B, C, N) of training classes
    train_labels: list[int] | None = None
    sha256: str = ""  # of the file

    view = FcnView(train=False)  # one patch per image, always the same

    def __len__(self) -> int:
        return len(self.labels)

    def relative_paths(self) -> list[str]:
        """The names of the images; InputError where the file has none."""
        if not self.paths:
            raise InputError("-features: the file has no array files, which names the images that episodes consist of")
        return self.paths

    def fingerprint(self) -> dict[str, Any]:
        """Counts, and the hash of the file."""
        return {"classes": len(self.class_names), "images": len(self), "sha256": self.sha256}


def write_features(path: str | Path, features: FeatureSet) -> None:
    """Write the file that :func:`read_features` reads, atomically."""
    arrays = {"nodes": features.nodes.numpy(), "labels": np.array(features.labels)}
    arrays |= {"class_names": np.array(features.class_names), "files": np.array(features.paths)}
    if features.train_nodes is not None:
        arrays |= {"train_nodes": features.train_nodes.numpy(), "train_labels": np.array(features.train_labels)}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_output(Path(path), buffer.getbuffer())


def read_features(path: str | Path, *, map_size: int = 0) -> FeatureSet:
    """The content of a file of nodes; InputError, which names the array at fault, if it cannot be used.

    With ``map_size``, nodes are the cells of a square map, row by row, which is pooled to ``map_size`` cells along an edge.
    """
    try:
        return _parse(_read_arrays(Path(path)), file_hash(path), map_size)
    except InputError as error:
        raise InputError(f"-features {printable(str(path))}: {error}") from None


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    example = "np.savez(FILE, nodes=..., labels=...)"
    try:
        archive = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"there is no such file. Write one with -features_out, or with {example}") from None
    except OSError as error:
        raise InputError(f"it cannot be read ({error.strerror or error})") from error
    except Exception as error:  # numpy can raise anything for another kind of file
        raise InputError(f"it is damaged, or not an .npz file of numpy. Write it with {example}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise InputError(f"it is a single array, not an .npz file of named arrays. Write it with {example}")
    with archive:
        if missing := [name for name in REQUIRED if name not in archive.files]:
            there = first_few([printable(name) for name in archive.files])
            raise InputError(f"there is no array {missing[0]}; there are: {there}. Write it with {example}")
        return {name: _read_array(archive, name) for name in ARRAYS if name in archive.files}


def _read_array(archive: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    try:
        return np.asarray(archive[name])
    except Exception as error:
        if "allow_pickle" in str(error):
            needed = "numbers" if "nodes" in name else "numbers or text" if "labels" in name else "text (dtype=str)"
            raise InputError(f"{name} is an array of Python objects, which are not read. Save it as {needed}") from None
        raise InputError(f"{name} cannot be read, or is damaged ({printable(str(error))})") from error


def _parse(arrays: dict[str, np.ndarray], sha256: str, map_size: int) -> FeatureSet:
    nodes = _nodes(arrays, "nodes", map_size)
    check_node_count(nodes.shape[-1])
    labels = _labels(arrays, "labels", len(nodes), "nodes")
    found, numbers = np.unique(labels, return_inverse=True)
    paths = _text(arrays, "files")
    if "files" in arrays and len(paths) != len(nodes):
        raise InputError(f"files has {len(paths)} names for the {len(nodes)} images of nodes")
    train_nodes, train_labels = None, None
    if "train_nodes" in arrays:
        train_nodes = _nodes(arrays, "train_nodes", map_size)
        if train_nodes.shape[1] != nodes.shape[1]:
            raise InputError(f"train_nodes has {train_nodes.shape[1]} channels; nodes has {nodes.shape[1]}")
        if "train_labels" in arrays:
            of_train = _labels(arrays, "train_labels", len(train_nodes), "train_nodes")
            train_labels = np.unique(of_train, return_inverse=True)[1].tolist()
    elif "train_labels" in arrays:
        raise InputError("train_labels requires train_nodes, which is not there")
    names = _class_names(arrays, found)
    return FeatureSet(nodes, numbers.tolist(), names, paths, train_nodes, train_labels, sha256)


def _nodes(arrays: dict[str, np.ndarray], name: str, map_size: int) -> Tensor:
    """``(B, C, N)``, float16 or float32 in native byte order, all finite; pooled if there is a ``map_size``."""
    nodes = arrays[name]
    if nodes.dtype.kind != "f":
        raise InputError(f"{name} must hold floating-point numbers; its type is {nodes.dtype}")
    if nodes.ndim not in (2, 3) or not nodes.size:
        flat = ". Flatten maps with nodes.reshape(images, C, -1)" if nodes.ndim == 4 else ""
        raise InputError(f"{name} must have the shape (images, C, N), or (images, C); its shape is {nodes.shape}{flat}")
    if name == "nodes" and nodes.shape[1] < math.prod(nodes.shape[2:]):
        found = f"nodes has {nodes.shape[2]} nodes of {nodes.shape[1]} channels for an image"
        warn(f"{found}. If it is the other way round, write nodes.transpose(0, 2, 1)")
    with np.errstate(over="ignore"):  # found below
        nodes = nodes.astype(np.float16 if nodes.dtype.itemsize == 2 else np.float32, order="C", copy=False)
    broken = next((number for number, image in enumerate(nodes) if not np.isfinite(image).all()), None)
    if broken is not None:
        raise InputError(f"{name} has values that are not finite in {nodes.dtype}, first in image {broken}")
    nodes = torch.from_numpy(nodes.reshape(*nodes.shape[:2], -1))
    if not map_size:
        return nodes
    edge = math.isqrt(nodes.shape[-1])
    if edge**2 != nodes.shape[-1] or map_size > edge:
        found = f"{name} has {nodes.shape[-1]} nodes an image; class tokens must be left out"
        raise InputError(f"-map_size {map_size} needs the cells of a square map of that size or more: {found}")
    pooled = [F.adaptive_avg_pool2d(part.float().unflatten(-1, (edge, edge)), map_size) for part in nodes.split(64)]
    return torch.cat(pooled).flatten(2)


def _labels(arrays: dict[str, np.ndarray], name: str, images: int, of: str) -> np.ndarray:
    labels = arrays[name]
    if labels.dtype.kind not in "iuUS":
        raise InputError(f"{name} must hold whole numbers, or the names of classes; its type is {labels.dtype}")
    if labels.shape != (images,):
        needed = f"({images},), one for each image of {of}"
        raise InputError(f"{name} must have the shape {needed}; its shape is {labels.shape}")
    return np.array(_text(arrays, name)) if labels.dtype.kind in "US" else labels


def _text(arrays: dict[str, np.ndarray], name: str) -> list[str]:
    """An array of text as a list; empty where there is none."""
    if name not in arrays:
        return []
    if arrays[name].dtype.kind not in "US" or arrays[name].ndim != 1:
        found = f"its type is {arrays[name].dtype}, its shape {arrays[name].shape}"
        raise InputError(f"{name} must be a list of text; {found}")
    return [one.decode(errors="surrogateescape") if isinstance(one, bytes) else one for one in arrays[name].tolist()]


def _class_names(arrays: dict[str, np.ndarray], labels: np.ndarray) -> list[str]:
    """The names of labels: the labels themselves where there are none."""
    if "class_names" not in arrays:
        return [str(label) for label in labels.tolist()]
    if labels.dtype.kind == "U":
        raise InputError("labels are names of classes, so that class_names has no meaning: leave it out")
    names, (lowest, *_, highest) = _text(arrays, "class_names"), [labels[0], *labels]
    if lowest < 0 or highest >= len(names):
        needed = f"the labels are {lowest} to {highest}. It needs a name for each number from 0 to the largest label"
        raise InputError(f"class_names has {len(names)} names, and {needed}")
    used = [names[label] for label in labels.tolist()]
    if twice := sorted({name for name in used if used.count(name) > 1}):
        raise InputError(f"class_names has {printable(twice[0])!r} for two labels; give each class a name of its own")
    return used
