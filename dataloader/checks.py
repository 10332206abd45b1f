"""Whether a data set is the published one: the rules that opening a data set and ``datasets/verify.py`` share.

Opening one applies them to what costs next to nothing: names, counts, and the sizes of a few images.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from dataloader.catalog import DatasetSpec
from dataloader.published import published_classes, published_images
from utils import first_few, printable

SHRUNK_TO = 84  # pixels along the long side; the common archives of small images have squares of this size
SAMPLE = 16
# ImageNet and the boxes of CUB have a few images that are naturally so small; a sample of 16 hardly ever holds two of them.
MOST_SMALL_IN_SAMPLE = 1 / 8

Size = tuple[int, int]


class Difference(NamedTuple):
    """Class names that are only in the published split, and only in this one; sorted."""

    missing: list[str]
    unknown: list[str]

    def __str__(self) -> str:
        parts = {what: first_few(list(map(printable, names))) for what, names in self._asdict().items() if names}
        return "; ".join(f"{what}: {names}" for what, names in parts.items())


def compare_classes(name: str, split: str, found: Iterable[str]) -> Difference:
    """How the classes of a split differ from the published ones, if those are known."""
    published, found = set(published_classes(name).get(split, ())), set(found)
    return Difference(sorted(published - found), sorted(found - published) if published else [])


def compare_counts(name: str, split: str, found: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Class -> (images here, published images) where they differ; classes that only one side has are left out."""
    published = published_classes(name).get(split, {})
    return {
        label: (found[label], images)
        for label, images in published.items()
        if images is not None and label in found and found[label] != images
    }


def is_shrunk(size: Size) -> bool:
    return max(size) <= SHRUNK_TO


def sample(paths: Sequence[str]) -> list[str]:
    """Up to 16 of the paths, spread evenly, and the same ones each time."""
    count = min(SAMPLE, len(paths))
    return [paths[number * len(paths) // count] for number in range(count)]


def opening_warnings(
    name: str, spec: DatasetSpec, split: str, counts: Mapping[str, int], sizes: Mapping[str, Size]
) -> Iterator[str]:
    """What looks wrong about a split from the number of images of each class, and the sizes of a sample of images."""
    full_check = f". For a full check: python datasets/verify.py {name}"
    difference, wrong = compare_classes(name, split, counts), compare_counts(name, split, counts)
    here, published = sum(counts.values()), published_images(name, split)
    if any(difference):
        classes = len(published_classes(name)[split])
        found = f"has {len(counts)} classes; the published split has {classes} ({difference})"
        yield f"{name} {split} {found}{full_check}"
    if wrong:
        label, (few, all_of_it) = next(iter(wrong.items()))
        found = f"{len(wrong)} classes lack images or have too many, first {printable(label)}: {few} of {all_of_it}"
        yield f"{name} {split}: {found}{full_check}"
    elif published not in (None, here) and not any(difference):
        yield f"{name} {split} has {here} images; the published split has {published}{full_check}"

    edge, sampled = spec.pixels, f"{len(sizes)} sampled images of {name} {split}"
    others = [f"{printable(path)}: {w}x{h}" for path, (w, h) in sizes.items() if edge and (w, h) != (edge, edge)]
    small = [printable(path) for path, size in sizes.items() if spec.large_images and is_shrunk(size)]
    if others:
        yield f"{len(others)} of {sampled} are not {edge}x{edge} as published, first {others[0]}{full_check}"
    if len(small) > MOST_SMALL_IN_SAMPLE * len(sizes):
        cost = "the published results need them at their original size, and shrunk ones cost 8-10 points of accuracy"
        yield f"{len(small)} of {sampled} are {SHRUNK_TO} pixels or less (first {small[0]}); {cost}{full_check}"
