"""What a recipe is, and what several of them need."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from download import Remote
from sources import Entry, Source

from dataloader import published
from dataloader.catalog import SPLITS

CUB_NAME = re.compile(r"[\w-]+_\d{4}_\d+\.jpg")
IMAGENET_NAME = re.compile(r"(n\d{8})_(\d+)(?:_n\d{8})?\.JPE?G", re.IGNORECASE)  # Hugging Face doubles the class


class Target(NamedTuple):
    """Where an image is written, relative to the data set, and which part of it is kept."""

    path: str
    split: str
    label: str
    crop: tuple[float, ...] | None = None  # left, upper, right, lower, in pixels


class Plan(NamedTuple):
    """What a data set is made of: an image per entry of the source, and tables as text."""

    images: dict[str, Target]
    tables: dict[str, str]
    faults: list[str]  # what the source lacks
    notes: list[str]

    def splits(self) -> dict[str, list[Target]]:
        return {split: [image for image in self.images.values() if image.split == split] for split in SPLITS}


class Recipe(NamedTuple):
    """How one data set is built."""

    folder: str  # of the result
    plan: Callable[[Source, list[Entry], bool], Plan]  # from the entries of a source, and whether to crop
    downloads: dict[str, Remote] = {}  # by file name: what to download when no -source is given
    hub: str = ""  # likewise: a repository on Hugging Face, and after an @ its revision
    adapt: Callable[[Source], Source] = lambda source: source  # turns a source into the one that plan reads
    shorter_side: int | None = None  # without -size; 0 keeps images as they are, None if the size cannot be chosen
    crops: bool = False  # images are cropped unless -no_crop is given
    advice: str = ""  # what to give as -source, for data sets that cannot be downloaded


def last_parts(name: str, count: int) -> tuple[str, ...]:
    """The last parts of a path, empty ones in front where it has fewer."""
    return (*[""] * count, *PurePosixPath(name).parts)[-count:]


def split_of_class(name: str) -> dict[str, str]:
    """Class -> split of a published data set."""
    return {label: split for split, labels in published.published_classes(name).items() for label in labels}


def published_plan(name: str, images: dict[str, Target], *, tables: bool = False, notes: Sequence[str] = ()) -> Plan:
    """The plan of a published data set, with what its images lack, and if asked with ``split/<split>.csv``."""
    plan = Plan(images, {}, _missing_images(name, images), list(notes))
    for split, targets in plan.splits().items() if tables else ():
        rows = sorted((target.label, PurePosixPath(target.path).name) for target in targets)
        plan.tables[f"split/{split}.csv"] = "filename,label\n" + "".join(f"{file},{label}\n" for label, file in rows)
    return plan


def _missing_images(name: str, images: dict[str, Target]) -> list[str]:
    """What differs from the published counts, most harmful first."""
    found = Counter((target.split, target.label) for target in images.values())
    missing, fewer = [], []
    for split, labels in published.published_classes(name).items():
        for label, count in labels.items():
            here = found[split, label]
            if not here:
                missing.append(f"no image of the {split} class {label}")
            elif count not in (None, here):
                fewer.append(f"{here} of {count} images of the {split} class {label}")
    if missing or fewer:
        return missing + fewer
    numbers = Counter(target.split for target in images.values())
    published_numbers = {split: published.published_images(name, split) for split in SPLITS}
    return [f"{numbers[split]} of {n} {split} images" for split, n in published_numbers.items() if numbers[split] != n]


def parquet_file_name(entry: Entry) -> str:
    """A file name for a row of a parquet file: the row's own if it is a published one, otherwise its position."""
    shard, row, base = entry.name.split("/")
    return base if CUB_NAME.fullmatch(base) or IMAGENET_NAME.fullmatch(base) else f"{shard.split('.')[0]}_{row}.jpg"
