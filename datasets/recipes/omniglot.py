"""Omniglot's small background sets, split by script."""

from collections import Counter

from download import Remote
from sources import Entry, Source, is_image

from recipes.common import Plan, Recipe, Target, last_parts

URL = "https://github.com/brendenlake/omniglot/raw/master/python"
# Each script is in one split only. small2 has Greek and Latin as well, which are left out there.
SCRIPTS = {
    "train": ("images_background_small2", ("Japanese_(katakana)", "Sanskrit", "Tagalog")),
    "val": ("images_background_small1", ("Balinese", "Early_Aramaic")),
    "test": ("images_background_small1", ("Greek", "Korean", "Latin")),
}
DRAWINGS = {"train": 20 * 106, "val": 20 * 46, "test": 20 * 90}  # 20 of each character


def plan(source: Source, entries: list[Entry], crop: bool) -> Plan:
    split_of = {(folder, script): split for split, (folder, scripts) in SCRIPTS.items() for script in scripts}
    images = {}
    for entry in entries:
        folder, script, character, file = last_parts(entry.name, 4)
        split = split_of.get((folder, script))
        if split and is_image(file):
            label = f"{script}_{character}"
            images[entry.name] = Target(f"{split}/{label}/{file}", split, label)
    found = Counter(target.split for target in images.values())
    faults = [f"{found[split]} of {n} {split} drawings" for split, n in DRAWINGS.items() if found[split] != n]
    return Plan(images, {}, faults, [])


ARCHIVES = {f"images_background_small{n}.zip": Remote(f"{URL}/images_background_small{n}.zip") for n in (1, 2)}
RECIPES = {"omniglot": Recipe("omniglot", plan, downloads=ARCHIVES)}
