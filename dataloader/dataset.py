"""The only Dataset class."""

import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dataloader.catalog import CATALOG, SPLITS
from dataloader.readers import read_split
from dataloader.views import CROP_TO, View
from utils import InputError


class ImageDataset(Dataset):
    """One split of a data set, seen through a view.

    Args:
        name: a key of :data:`dataloader.catalog.CATALOG`.
        split: ``train``, ``val`` or ``test``.
        data_dir: the folder that holds the data sets.
        view: what an image is turned into; see :mod:`dataloader.views`.
        verify: decode every image now, and leave out those that cannot be read, with a warning that names them.

    Attributes:
        paths, labels: one per image; labels count from 0 in the order of ``class_names``, which is sorted.

    Items are asked for by index, or by ``(index, seed)``: then the random draws of the view come from that seed alone, so
    they do not depend on which worker process makes them.

    Raises:
        InputError: something named is not there, or (when an item is asked for) an image cannot be read.
    """

    def __init__(self, name: str, split: str, *, data_dir: str, view: View, verify: bool = False) -> None:
        if name not in CATALOG:
            raise InputError(f"expected -dataset to be one of {', '.join(CATALOG)}; got {name!r}")
        if split not in SPLITS:
            raise InputError(f"expected a split out of {', '.join(SPLITS)}; got {split!r}")
        spec = CATALOG[name]
        self.view = view
        self.paths, self.labels, self.class_names = read_split(spec, data_dir, split)
        if verify:
            self._leave_out_unreadable()
        published = spec.classes.get(split, len(self.class_names))
        if published != len(self.class_names):
            _warn(f"{name} {split} has {len(self.class_names)} classes here; the published split has {published}")
        if spec.large_images and max(_open(self.paths[0]).size) <= CROP_TO:
            _warn(
                f"the images of {name} are {CROP_TO} pixels or less ({self.paths[0]}); the published results need them at "
                "their original size, and shrunk ones cost 8-10 points of accuracy"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[Tensor, int]:
        if not isinstance(item, tuple):
            return self.view(_read(self.paths[item])), self.labels[item]
        index, seed = item
        image = _read(self.paths[index])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.view(image), self.labels[index]

    def _leave_out_unreadable(self) -> None:
        def fault(path: str) -> str | None:
            try:
                _read(path)
            except InputError as error:
                return str(error)
            return None

        with ThreadPoolExecutor() as pool:
            faults = list(pool.map(fault, self.paths))
        for message in filter(None, faults):
            _warn(f"left out: {message}")
        kept = [index for index, message in enumerate(faults) if message is None]
        emptied = set(self.labels) - {self.labels[index] for index in kept}
        if emptied:
            raise InputError(f"no image of class {self.class_names[min(emptied)]} can be read")
        self.paths, self.labels = [self.paths[i] for i in kept], [self.labels[i] for i in kept]


def _open(path: str) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(_unreadable(path, error)) from error


def _read(path: str) -> Image.Image:
    with _open(path) as image:
        try:
            return image.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(_unreadable(path, error)) from error


def _unreadable(path: str, error: Exception) -> str:
    return f"expected an image in {path}; it cannot be read ({error}). Replace it, or leave such files out with -verify_images"


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
