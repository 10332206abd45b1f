"""The only Dataset class."""

import hashlib
import os
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dataloader import checks
from dataloader.catalog import CATALOG, SPLITS
from dataloader.readers import read_split
from dataloader.views import Box, View
from utils import InputError, available_cores, warn

# Pillow's own warnings would appear in the middle of a progress bar. What matters in them is checked here.
warnings.filterwarnings("ignore", module=r"PIL\.")

_ADVICE = ". Replace it, or skip unreadable files with -verify_images"
_DEEP_MODES = {"I", "I;16", "I;16L", "I;16B", "I;16N", "F"}  # one channel of more than 8 bits
_LARGEST_16_BIT = 2**16 - 1
_warned_of: set[str] = set()  # paths of huge images, so that each is named once per process


class ImageDataset(Dataset):
    """One split of a data set, seen through a view.

    Args:
        name: a key of :data:`dataloader.catalog.CATALOG`.
        split: ``train``, ``val`` or ``test``.
        data_dir: the folder that holds the data sets.
        view: what an image is turned into; see :mod:`dataloader.views`.
        verify: decode every image now, and skip those that cannot be read, with a warning that names them.

    Attributes:
        paths, labels: one per image; labels count from 0 in the order of ``class_names``, which is sorted.

    ``dataset[index]`` is ``(pixels, label)``: uint8 ``(3, S, S)`` or ``(P, 3, S, S)``, and an int. For
    ``dataset[index, seed]`` the random draws of the view come from that seed alone, so they do not depend on which worker
    process makes them.

    Raises:
        InputError: something named is not there, or (when an item is asked for) an image cannot be read.
    """

    def __init__(self, name: str, split: str, *, data_dir: str, view: View, verify: bool = False) -> None:
        if name not in CATALOG:
            raise InputError(f"expected -dataset to be one of {', '.join(CATALOG)}; got {name!r}")
        if split not in SPLITS:
            raise InputError(f"expected the split to be one of {', '.join(SPLITS)}; got {split!r}")
        spec = CATALOG[name]
        self.view = view
        self.paths, self.labels, self.class_names = read_split(spec, data_dir, split)
        if verify:
            self._leave_out_unreadable()
        counts = Counter(self.class_names[label] for label in self.labels)
        looked_at = checks.sample(self.paths) if spec.large_images or spec.pixels else []
        sizes = {path: _size(path) for path in looked_at}
        for message in checks.opening_warnings(name, spec, split, counts, sizes):
            warn(message)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = item if isinstance(item, tuple) else (item, None)
        image = read_image(self.paths[index])
        try:
            boxes = self._boxes(image.size, seed)
        except InputError as error:
            raise InputError(f"{self.paths[index]}: {error}") from None
        return self.view.render(image, boxes), self.labels[index]

    def _boxes(self, size: tuple[int, int], seed: int | None) -> list[Box]:
        if seed is None:
            return self.view.boxes(size)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.view.boxes(size)

    def fingerprint(self) -> dict[str, Any]:
        """Counts, and a hash over the names and sizes of the images: the same for the same data, wherever it lies."""
        with ThreadPoolExecutor(available_cores()) as pool:
            sizes = list(pool.map(os.path.getsize, self.paths))
        digest = hashlib.sha256()
        for path, label, size in zip(self.paths, self.labels, sizes, strict=True):
            digest.update(
                f"{self.class_names[label]}/{os.path.basename(path)} {size}\n".encode(errors="surrogateescape")
            )
        return {"classes": len(self.class_names), "images": len(self), "sha256": digest.hexdigest()}

    def _leave_out_unreadable(self) -> None:
        def fault(path: str) -> str | None:
            try:
                read_image(path, advice="")
            except InputError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(available_cores()) as pool:
            faults = list(pool.map(fault, self.paths))
        for message in filter(None, faults):
            warn(f"left out: {message}")
        kept = [index for index, message in enumerate(faults) if message is None]
        emptied = set(self.labels) - {self.labels[index] for index in kept}
        if emptied:
            raise InputError(f"no image of class {self.class_names[min(emptied)]} can be read")
        self.paths, self.labels = [self.paths[i] for i in kept], [self.labels[i] for i in kept]


# --- Reading one image ------------------------------------------------------------------------------------------------


def _size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # whatever a broken file makes Pillow raise
        raise _unreadable(path, error, _ADVICE) from error


def read_image(path: str, *, content: IO[bytes] | None = None, advice: str = _ADVICE) -> Image.Image:
    """Decode an image to RGB, 8 bits per channel, from its file or from the content of it.

    Raises:
        InputError: it cannot be read; ``advice`` ends the message.
    """
    try:
        with Image.open(content or path) as image:
            _warn_if_huge(path, image.size)
            if image.mode not in _DEEP_MODES:
                return image.convert("RGB")
            values = np.array(image)
    except Exception as error:  # whatever a broken file makes Pillow raise
        raise _unreadable(path, error, advice) from error
    return _to_8_bits(path, values)


def _unreadable(path: str, error: Exception, advice: str) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"expected an image in {path}; it cannot be read ({reason}){advice}")


def _warn_if_huge(path: str, size: tuple[int, int]) -> None:
    pixels = size[0] * size[1]
    if Image.MAX_IMAGE_PIXELS and pixels > Image.MAX_IMAGE_PIXELS and path not in _warned_of:
        _warned_of.add(path)
        warn(f"{path} has {pixels / 1e6:.0f} million pixels, and every use decodes all of them. Shrink it to save time")


def _to_8_bits(path: str, values: np.ndarray) -> Image.Image:
    # Pillow's own conversion would cut every value at 255, so that nearly all pixels become white.
    if values.dtype.kind == "f":
        found = "floats"
    elif values.min() < 0 or values.max() > _LARGEST_16_BIT:
        found = f"{values.min()} to {values.max()}"
    else:
        scaled = (values.astype(np.uint32) + 128) // 257  # to the nearest of 0..255: 65535 = 257 * 255
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    raise InputError(f"expected pixels of 8 or 16 bits in {path}; got {found}. Convert it to 8 bits per channel")
