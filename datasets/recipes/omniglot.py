"""Omniglot's small background sets, split by script."""

from collections import Counter

from download import Remote
from sources import Entry, Source, is_image

from recipes.common import Plan, Recipe, Target, last_parts

# Each script is in one split only. small2 has Greek and Latin as well, which are left out there.
SCRIPTS = {
    "train": ("images_background_small2", ("Japanese_(katakana)", "Sanskrit", "Tagalog")),
    "val": ("images_background_small1", ("Balinese", "Early_Aramaic")),
    "test": ("images_background_small1", ("Greek", "Korean", "Latin")),
}
DRAWINGS = 20  # of each character
CHARACTERS = {"train": 106, "val": 46, "test": 90}


def plan(source: Source, entries: list[Entry], crop: bool) -> Plan:
    split_of = {(folder, script): split for split, (folder, scripts) in SCRIPTS.items() for script in scripts}
    images = {}
    for entry in entries:
        folder, script, character, file = last_parts(entry.name, 4)
        split = split_of.get((folder, script))
        if split and is_image(file):
            label = f"{script}_{character}"
            images[entry.name] = Target(f"{split}/{label}/{file}", split, label)
    per_class = Counter((target.split, target.label) for target in images.values())
    classes = Counter(split for split, _ in per_class)
    faults = [
        f"{classes[split]} of {count} {split} characters"
        for split, count in CHARACTERS.items()
        if classes[split] != count
    ]
    faults += [f"{n} of {DRAWINGS} drawings of {label}" for (_, label), n in per_class.items() if n != DRAWINGS]
    return Plan(images, {}, faults, [])


RECIPES = {
    "omniglot": Recipe(
        "omniglot",
        plan,
        downloads={
            f"{name}.zip": Remote(f"https://github.com/brendenlake/omniglot/raw/master/python/{name}.zip")
            for name in ("images_background_small1", "images_background_small2")
        },
    )
}
