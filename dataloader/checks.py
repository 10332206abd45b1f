"""Whether a data set is the published one: the rules that opening a data set and ``datasets/verify.py`` share.

Opening one applies them to what costs next to nothing: names, counts, and the headers of a few images.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dataloader.catalog import DatasetSpec
from dataloader.published import published_classes, published_images
from utils import first_few, printable

SHRUNK_TO = 84  # pixels along the long side; the common archives of small images have squares of this size
SAMPLE = 16
# ImageNet and the boxes of CUB have a few images that small by nature; a sample of 16 holds two of them hardly ever.
MOST_SMALL_IN_SAMPLE = 1 / 8

Size = tuple[int, int]


class Difference(NamedTuple):
    """Class names that are only in the published split, and only in this one; sorted."""

    missing: list[str]
    unknown: list[str]

    def __str__(self) -> str:
        parts = {"missing": self.missing, "unknown": self.unknown}
        return "; ".join(
            f"{what}: {first_few([printable(name) for name in names])}" for what, names in parts.items() if names
        )


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
) -> list[str]:
    """What looks wrong about a split from the number of images of each class, and the sizes of a sample of images."""
    found = [
        *_about_classes(name, split, counts),
        *_about_counts(name, split, counts),
        *_about_sizes(name, spec, split, sizes),
    ]
    return [f"{message}. For a full check: python datasets/verify.py {name}" for message in found]


def _about_classes(name: str, split: str, counts: Mapping[str, int]) -> list[str]:
    difference = compare_classes(name, split, counts)
    if not any(difference):
        return []
    published = len(published_classes(name)[split])
    return [f"{name} {split} has {len(counts)} classes; the published split has {published} ({difference})"]


def _about_counts(name: str, split: str, counts: Mapping[str, int]) -> list[str]:
    wrong = compare_counts(name, split, counts)
    if wrong:
        label, (here, published) = next(iter(wrong.items()))
        return [
            f"{name} {split}: {len(wrong)} classes lack images or have too many, first {printable(label)}: {here} of {published}"
        ]
    here, published = sum(counts.values()), published_images(name, split)
    if published in (None, here) or any(compare_classes(name, split, counts)):
        return []
    return [f"{name} {split} has {here} images; the published split has {published}"]


def _about_sizes(name: str, spec: DatasetSpec, split: str, sizes: Mapping[str, Size]) -> list[str]:
    wrong = [path for path, size in sizes.items() if spec.pixels and size != (spec.pixels, spec.pixels)]
    if wrong:
        size = "{}x{}".format(*sizes[wrong[0]])
        return [
            f"{len(wrong)} of {len(sizes)} sampled images of {name} {split} are not {spec.pixels}x{spec.pixels} as "
            f"published, first {printable(wrong[0])}: {size}"
        ]
    small = [path for path, size in sizes.items() if spec.large_images and is_shrunk(size)]
    if len(small) <= MOST_SMALL_IN_SAMPLE * len(sizes):
        return []
    return [
        f"{len(small)} of {len(sizes)} sampled images of {name} {split} are {SHRUNK_TO} pixels or less (first "
        f"{printable(small[0])}); the published results need them at their original size, and shrunk ones cost 8-10 points of "
        "accuracy"
    ]
