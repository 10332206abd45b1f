"""What a recipe is, and what several of them need."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
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


class Recipe(NamedTuple):
    """How one data set is built.

    Attributes:
        folder: of the result.
        plan: turns the entries of a source into a plan; its last argument is whether to crop.
        downloads: files to download when no ``-source`` is given: name -> Remote.
        hub: a repository on Hugging Face and its revision, likewise.
        hub_file: whether a parquet file of a repository on Hugging Face is needed, by its name.
        adapt: turns a source into the one that ``plan`` reads.
        shorter_side: the size without ``-size``; 0 keeps the images as they are; None if the size cannot be chosen.
        crops: images are cropped unless ``-no_crop`` is given.
        advice: what to give as a source, for data sets that cannot be downloaded.
    """

    folder: str
    plan: Callable[[Source, list[Entry], bool], Plan]
    downloads: dict[str, Remote] = {}
    hub: tuple[str, str] | None = None
    hub_file: Callable[[str], bool] = lambda name: True
    adapt: Callable[[Source], Source] = lambda source: source
    shorter_side: int | None = None
    crops: bool = False
    advice: str = ""


def last_parts(name: str, count: int) -> tuple[str, ...]:
    """The last parts of a path, empty ones in front where it has fewer."""
    return (*[""] * count, *PurePosixPath(name).parts)[-count:]


def split_of_class(name: str) -> dict[str, str]:
    """Class -> split of a published data set."""
    return {label: split for split, labels in published.published_classes(name).items() for label in labels}


def missing_images(name: str, targets: Iterable[Target]) -> list[str]:
    """What differs from the published counts, most harmful first."""
    found = Counter((target.split, target.label) for target in targets)
    classes = published.published_classes(name)
    expected = {(split, label): count for split, labels in classes.items() for label, count in labels.items()}
    faults = [f"no image of the {split} class {label}" for split, label in expected if not found[split, label]]
    faults += [
        f"{found[split, label]} of {count} images of the {split} class {label}"
        for (split, label), count in expected.items()
        if count is not None and found[split, label] not in (0, count)
    ]
    for split in SPLITS:
        number = sum(count for (of, _), count in found.items() if of == split)
        if not faults and number != published.published_images(name, split):
            faults.append(f"{number} of {published.published_images(name, split)} {split} images")
    return faults


def split_tables(targets: Iterable[Target]) -> dict[str, str]:
    """``split/<split>.csv``, in the form of the published lists."""
    rows: dict[str, list[str]] = {split: ["filename,label"] for split in SPLITS}
    for target in sorted(targets, key=lambda target: (target.label, target.path)):
        rows[target.split].append(f"{PurePosixPath(target.path).name},{target.label}")
    return {f"split/{split}.csv": "".join(f"{row}\n" for row in lines) for split, lines in rows.items()}


def parquet_file_name(entry: Entry) -> str:
    """A file name for a row of a parquet file: the row's own if it is a published one, otherwise its position."""
    shard, row, base = entry.name.split("/")
    return base if CUB_NAME.fullmatch(base) or IMAGENET_NAME.fullmatch(base) else f"{shard.split('.')[0]}_{row}.jpg"
