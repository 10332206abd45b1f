"""miniImageNet and tieredImageNet, from ImageNet's training images in any of their packagings."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import PurePosixPath
from typing import NamedTuple

from sources import Entry, Source

from dataloader import published
from recipes.common import IMAGENET_NAME, Plan, Recipe, Target, parquet_file_name, published_plan, split_of_class
from utils import first_few

MINI_NAME = re.compile(r"(n\d{8})(\d{8})\.JPE?G", re.IGNORECASE)
SOURCES = (
    "ILSVRC2012_img_train.tar from image-net.org, Kaggle's archive of ImageNet, or hf://datasets/ILSVRC/imagenet-1k"
)
HUB = "timm/mini-imagenet@bd8779f9d33c061ea6e75fdd3bce4e43dd679060"
PER_CLASS = 600  # images in miniImageNet
MOST_PER_CLASS = 1300  # images in ImageNet


class Numbered(NamedTuple):
    """An image of an ImageNet class."""

    number: int | None  # in its name
    is_place: bool  # the number is its place in miniImageNet's list
    entry: Entry


def _by_class(name: str, entries: list[Entry]) -> dict[str, list[Numbered]]:
    """The images of each class that belongs to a data set, by the numbers in their names."""
    found: dict[str, list[Numbered]] = {label: [] for label in split_of_class(name)}
    for entry in entries:
        file = PurePosixPath(entry.name).name
        place = MINI_NAME.fullmatch(file)
        match = IMAGENET_NAME.fullmatch(file) or place
        if match:
            wnid, number = match[1], int(match[2])
        elif entry.label is not None and not file.startswith("ILSVRC2012_"):  # as validation and test images are named
            wnid, number = published.wnids(name).get(entry.label.lower()), None
        else:
            continue
        if wnid in found:
            found[wnid].append(Numbered(number, bool(place), entry))
    for images in found.values():
        images.sort(key=lambda image: (image.number or 0, image.entry.name))
    return found


def plan_miniimagenet(source: Source, entries: list[Entry], crop: bool) -> Plan:
    # The test split on Hugging Face is taken from ImageNet's validation images; miniImageNet has none of them.
    entries = [entry for entry in entries if entry.label is None or not entry.name.startswith("test")]
    by_class = _by_class("miniimagenet", entries)
    images: dict[str, Target] = {}
    unnamed, other, short = [], [], []
    for label, split in split_of_class("miniimagenet").items():
        found, places = by_class[label], published.miniimagenet_numbers()[label]
        numbers = [image.number for image in found if image.number is not None]
        is_placed = not found or found[0].is_place
        if len(numbers) < len(found):
            unnamed.append(label)
            chosen = _keep_names(label, found)
        elif not is_placed and len(found) <= PER_CLASS and not _may_be_published(numbers, places):
            other.append(label)
            chosen = _keep_names(label, found)
        else:
            if not is_placed and len(found) != PER_CLASS:  # ImageNet's: a place counts the files of the class
                numbers = range(1, len(found) + 1)
                if len(found) < MOST_PER_CLASS <= max(places) + 10:
                    short.append(label)
            elif not is_placed:
                numbers = sorted(places)
            at = {number: image.entry for number, image in zip(numbers, found, strict=True)}
            chosen = {f"{label}{place:08d}.jpg": at[place] for place in places if place in at}
        images |= {entry.name: Target(f"images/{file}", split, label) for file, entry in chosen.items()}
    lost = f"fewer than the usual {MOST_PER_CLASS} images: if the source lost some, the choice of images is shifted"
    explained = (
        (unnamed, "files without their ImageNet names, so whether they are miniImageNet's 600 images is not verified"),
        (other, "file names that do not fit miniImageNet's list: the choice of images is another one"),
        (short, lost),
    )
    notes = [f"{len(labels)} classes ({first_few(labels)}) have {what}" for labels, what in explained if labels]
    return published_plan("miniimagenet", images, tables=True, notes=notes)


def _keep_names(label: str, found: list[Numbered]) -> dict[str, Entry]:
    return {f"{label}_{parquet_file_name(image.entry).removeprefix(f'{label}_')}": image.entry for image in found}


def _may_be_published(numbers: list[int], places: Sequence[int]) -> bool:
    """Whether 600 images may be those at miniImageNet's places, judged by the numbers in their names.

    A place counts the files up to and including its own, so no number is below its place, and from one image to the next
    the number grows at least as much as the place. Other choices of 600 break that somewhere.
    """
    spare = [number - place for number, place in zip(numbers, sorted(places), strict=False)]
    return len(numbers) == PER_CLASS and all(a <= b for a, b in pairwise([0, *spare]))


def plan_tieredimagenet(source: Source, entries: list[Entry], crop: bool) -> Plan:
    by_class = _by_class("tieredimagenet", entries)
    images = {}
    for label, split in split_of_class("tieredimagenet").items():
        for image in by_class[label]:
            if image.number is not None and not image.is_place:
                images[image.entry.name] = Target(f"{split}/{label}/{label}_{image.number}.JPEG", split, label)
    return published_plan("tieredimagenet", images)


RECIPES = {
    "miniimagenet": Recipe("miniimagenet", plan_miniimagenet, hub=HUB, shorter_side=0),
    "tieredimagenet": Recipe("tiered_imagenet", plan_tieredimagenet, shorter_side=224, advice=SOURCES),
}
