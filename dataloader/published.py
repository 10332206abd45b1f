"""What the published data sets hold: classes, images per class, and how they were chosen, from the tables in ``facts/``.

The catalogue has the folder of a data set; this is its content. Building and checking data both read it.
"""

import csv
from functools import cache
from pathlib import Path

_FACTS = Path(__file__).parent / "facts"
_TABLES = {name: f"{name}_classes.tsv" for name in ("miniimagenet", "tieredimagenet", "fc100", "cifar_fs")}
_TABLES["cub"] = "cub_feat_classes.tsv"
# Images per split where the number per class is not published.
_IMAGES = {"tieredimagenet": {"train": 448_695, "val": 124_261, "test": 206_209}}

# Images that two classes of CIFAR-100 share, byte for byte. Measured by SHA-256 over its 60,000 images as PNG, training and
# test pooled: 26 contents occur twice, 9 of them within aquarium_fish and these 17 in two classes. Three of these pairs span
# two splits of FC100, and 15 span two splits of CIFAR-FS.
_CIFAR_TWINS = {
    ("baby", "girl"): 4,
    ("crab", "spider"): 1,
    ("mouse", "shrew"): 1,
    ("oak_tree", "willow_tree"): 1,
    ("otter", "seal"): 7,
    ("shark", "whale"): 1,
    ("snake", "worm"): 2,
}
_TWINS = {"fc100": _CIFAR_TWINS, "cifar_fs": _CIFAR_TWINS, "miniimagenet": None, "tieredimagenet": None, "cub": None}


def published_twins(name: str) -> dict[tuple[str, str], int] | None:
    """Pair of classes, sorted -> images that both have in the published set; None where nobody has counted them."""
    return _TWINS.get(name, {})


def published_classes(name: str) -> dict[str, dict[str, int | None]]:
    """Split -> class -> number of images (None where it is not published); empty for other data sets.

    Classes are folder names: ``apple`` (CIFAR-100), ``019.Gray_Catbird`` (CUB), ``n01532829`` (ImageNet).
    """
    found: dict[str, dict[str, int | None]] = {}
    for row in _rows(_TABLES[name]) if name in _TABLES else []:
        images = None if name == "tieredimagenet" else int(row.get("images") or 600)
        found.setdefault(row["split"], {})[row["class"]] = images
    return found


def published_images(name: str, split: str) -> int | None:
    """Number of images of a split, None where it is not published."""
    counts = list(published_classes(name).get(split, {}).values())
    return _IMAGES.get(name, {}).get(split) or (sum(counts) if counts and None not in counts else None)


@cache
def wnids(name: str) -> dict[str, str]:
    """Names of ImageNet classes in lower case -> wnid: the wnid itself, all its synonyms, and the first of them."""
    found = {}
    for row in _rows(_TABLES[name]):
        synonyms = row["name"].lower()
        found |= {row["class"]: row["class"], synonyms: row["class"]}
        found.setdefault(synonyms.split(",")[0], row["class"])
    return found


@cache
def miniimagenet_numbers() -> dict[str, tuple[int, ...]]:
    """Class -> its 600 images: 1-based places among its ImageNet training files, sorted by the number after the underscore."""
    return {row["class"]: tuple(map(int, row["images"].split())) for row in _rows("miniimagenet_images.tsv")}


@cache
def _rows(table: str) -> list[dict[str, str]]:
    with open(_FACTS / table, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))
