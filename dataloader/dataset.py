"""The only Dataset class."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from dataloader import checks
from dataloader.catalog import CATALOG
from dataloader.images import read_image
from dataloader.readers import find_root, read_split
from dataloader.views import View
from utils import InputError, available_cores, printable, warn


class ImageDataset(Dataset):
    """One split of a data set, seen through a view.

    ``name`` is a key of :data:`dataloader.catalog.CATALOG`, and ``data_dir`` holds the data sets. ``verify`` decodes every
    image now, and skips those that cannot be read, with a warning that names them. ``paths`` and ``labels`` have one entry
    per image; labels count from 0 in the order of ``class_names``, which is sorted.

    ``dataset[index]`` is ``(pixels, label)``: uint8 ``(3, S, S)`` or ``(P, 3, S, S)``, and an int. For
    ``dataset[index, seed]`` the random draws of the view come from that seed alone. InputError if something named is
    missing, or an image that is asked for cannot be read.
    """

    def __init__(self, name: str, split: str, *, data_dir: str, view: View, verify: bool = False) -> None:
        if name not in CATALOG:
            raise InputError(f"no data set {name!r}; choose one of {', '.join(CATALOG)}")
        spec = CATALOG[name]
        self.view, self.upright = view, not spec.is_published
        advice = f"Set -data_dir to the folder that holds the data, or get it: {spec.obtain}"
        self.paths, self.labels, self.class_names = read_split(spec, data_dir, split, advice=advice)
        root = find_root(spec, Path(data_dir))
        bases = [spec.split_folders.get(split, split)] if spec.layout == "folders" else spec.image_folders[::-1]
        self._bases = [f"{Path(root, base)}{os.sep}" for base in bases]
        if verify:
            self._leave_out_unreadable()
        counts = Counter(self.class_names[label] for label in self.labels)
        sample = checks.sample(self.paths) if spec.is_published else []
        sizes = {path: read_image(path, upright=False).size for path in sample}
        for message in checks.opening_warnings(name, spec, split, counts, sizes):
            warn(message)

    @classmethod
    def of_files(cls, paths: Sequence[str], *, view: View) -> "ImageDataset":
        """Images of one class without a name."""
        dataset = cls.__new__(cls)
        dataset.view, dataset.upright, dataset.class_names = view, True, [""]
        dataset.paths, dataset.labels = list(paths), [0] * len(paths)
        return dataset

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = item if isinstance(item, tuple) else (item, None)
        image = read_image(self.paths[index], upright=self.upright)
        try:
            boxes = self.view.boxes(image.size) if seed is None else self.view.seeded_boxes(image.size, seed)
        except InputError as error:
            raise InputError(f"{printable(self.paths[index])}: {error}") from None
        return self.view.render(image, boxes), self.labels[index]

    def relative_paths(self) -> list[str]:
        """The files of the images, relative to the folder of the split; of a split with a table, to that of the images."""
        return [next(path[len(base) :] for base in self._bases if path.startswith(base)) for path in self.paths]

    def fingerprint(self) -> dict[str, Any]:
        """Counts, and a hash over the names and sizes of the images: the same for the same data, in any folder."""
        with ThreadPoolExecutor(available_cores()) as pool:
            sizes = list(pool.map(os.path.getsize, self.paths))
        digest = hashlib.sha256()
        for path, label, size in zip(self.paths, self.labels, sizes, strict=True):
            line = f"{self.class_names[label]}/{os.path.basename(path)} {size}\n"
            digest.update(line.encode(errors="surrogateescape"))
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
            raise InputError(f"no image of class {printable(self.class_names[min(emptied)])} can be read")
        self.paths, self.labels = [self.paths[i] for i in kept], [self.labels[i] for i in kept]
