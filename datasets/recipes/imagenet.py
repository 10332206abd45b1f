"""miniImageNet and tieredImageNet, from ImageNet's training images in any of their packagings."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from sources import Entry, Source

from dataloader import published
from recipes.common import IMAGENET_NAME, Plan, Recipe, Target, missing_images, parquet_file_name, split_tables
from utils import InputError, first_few

MINI_NAME = re.compile(r"(n\d{8})(\d{8})\.JPE?G", re.IGNORECASE)
PER_CLASS = 600  # images in miniImageNet
MOST_PER_CLASS = 1300  # images in ImageNet


class Numbered(NamedTuple):
    """An image of an ImageNet class, with the number in its name, which may be its place in miniImageNet's list."""

    number: int | None
    is_place: bool
    entry: Entry


def _by_class(name: str, entries: list[Entry]) -> dict[str, list[Numbered]]:
    """The images of each class that belongs to a data set, by the numbers in their names."""
    wanted = {label for labels in published.published_classes(name).values() for label in labels}
    found: dict[str, list[Numbered]] = {}
    for entry in entries:
        file = PurePosixPath(entry.name).name
        match, is_place = IMAGENET_NAME.fullmatch(file), False
        if not match:
            match, is_place = MINI_NAME.fullmatch(file), True
        if match:
            wnid = match[1]
        elif entry.label is not None and not file.startswith("ILSVRC2012_"):  # as validation and test images are named
            wnid = published.wnids(name).get(entry.label.lower(), "")
        else:
            continue
        if wnid in wanted:
            number = int(match[2]) if match else None
            found.setdefault(wnid, []).append(Numbered(number, bool(match) and is_place, entry))
    for images in found.values():
        images.sort(key=lambda image: (image.number or 0, image.entry.name))
    return found


def plan_miniimagenet(source: Source, entries: list[Entry], crop: bool) -> Plan:
    # The test split on Hugging Face is taken from ImageNet's validation images; miniImageNet has none of them.
    entries = [entry for entry in entries if entry.label is None or not entry.name.startswith("test")]
    by_class = _by_class("miniimagenet", entries)
    images: dict[str, Target] = {}
    unnamed, other, short = [], [], []
    for split, labels in published.published_classes("miniimagenet").items():
        for label in labels:
            found, places = by_class.get(label, []), published.miniimagenet_numbers()[label]
            numbers = [image.number for image in found if image.number is not None]
            if len(numbers) < len(found):
                unnamed.append(label)
                chosen = _keep_names(label, found)
            elif len(found) <= PER_CLASS and not _may_be_published(numbers, found, places):
                other.append(label)
                chosen = _keep_names(label, found)
            else:
                chosen = _choose(label, found, places)
                is_counted = len(found) != PER_CLASS and not (found and found[0].is_place)
                if is_counted and len(found) < MOST_PER_CLASS <= max(places) + 10:
                    short.append(label)
            images |= {entry.name: Target(f"images/{file}", split, label) for file, entry in chosen}
    notes = []
    if unnamed:
        notes.append(
            f"{len(unnamed)} classes have files without their ImageNet names. The classes are right; whether these are "
            "miniImageNet's 600 images of each class could not be verified"
        )
    if other:
        notes.append(
            f"{len(other)} classes ({first_few(other)}) have file names that do not fit miniImageNet's list. The classes are "
            "right; the choice of images is another one"
        )
    if short:
        notes.append(
            f"{len(short)} classes ({first_few(short)}) have fewer than the {MOST_PER_CLASS} images of most ImageNet classes. "
            "If the source lost some, the choice of images in these classes is shifted"
        )
    return Plan(images, split_tables(images.values()), missing_images("miniimagenet", images.values()), notes)


def _keep_names(label: str, found: list[Numbered]) -> list[tuple[str, Entry]]:
    names = [parquet_file_name(image.entry).removeprefix(f"{label}_") for image in found]
    return [(f"{label}_{name}", image.entry) for name, image in zip(names, found, strict=True)]


def _choose(label: str, found: list[Numbered], places: Sequence[int]) -> list[tuple[str, Entry]]:
    """File names and entries of miniImageNet's images among those of a class."""
    if found and found[0].is_place:
        numbers = [image.number for image in found]
    else:
        numbers = sorted(places) if len(found) == PER_CLASS else list(range(1, len(found) + 1))
    at = {number: image.entry for number, image in zip(numbers, found, strict=True)}
    return [(f"{label}{place:08d}.jpg", at[place]) for place in places if place in at]


def _may_be_published(numbers: list[int], found: list[Numbered], places: Sequence[int]) -> bool:
    """Whether 600 images may be those at miniImageNet's places, judged by the numbers in their names.

    A place counts the files up to and including its own, so no number is below its place, and from one image to the next
    the number grows at least as much as the place. Other choices of 600 break that somewhere.
    """
    if not found or found[0].is_place:
        return True
    pairs = list(zip(numbers, sorted(places), strict=False))
    return len(found) == PER_CLASS and all(
        number - place >= earlier - before
        for (number, place), (earlier, before) in zip(pairs, [(0, 0), *pairs], strict=False)
    )


def plan_tieredimagenet(source: Source, entries: list[Entry], crop: bool) -> Plan:
    by_class = _by_class("tieredimagenet", entries)
    images = {}
    for split, labels in published.published_classes("tieredimagenet").items():
        for label in labels:
            for image in by_class.get(label, []):
                if image.number is None or image.is_place:
                    raise InputError(
                        f"{source.where} has {PurePosixPath(image.entry.name).name}; tieredImageNet is built from images "
                        f"under their ImageNet names, such as {label}_10026.JPEG"
                    )
                images[image.entry.name] = Target(f"{split}/{label}/{label}_{image.number}.JPEG", split, label)
    return Plan(images, {}, missing_images("tieredimagenet", images.values()), [])


def _no_test_file(name: str) -> bool:
    return not name.startswith("test")


RECIPES = {
    "miniimagenet": Recipe(
        "miniimagenet",
        plan_miniimagenet,
        hub=("timm/mini-imagenet", "bd8779f9d33c061ea6e75fdd3bce4e43dd679060"),
        hub_file=_no_test_file,
        shorter_side=0,
    ),
    "tieredimagenet": Recipe(
        "tiered_imagenet",
        plan_tieredimagenet,
        hub_file=_no_test_file,
        shorter_side=224,
        advice="ILSVRC2012_img_train.tar from image-net.org, Kaggle's archive of ImageNet, or hf://datasets/ILSVRC/imagenet-1k",
    ),
}
