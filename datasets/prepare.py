"""Build a data set from a source that exists, in the layout that the scripts read.

    python datasets/prepare.py fc100                                    downloads CIFAR-100
    python datasets/prepare.py cub -source CUB_200_2011.tgz
    python datasets/prepare.py miniimagenet                             downloads timm/mini-imagenet from Hugging Face
    python datasets/prepare.py tieredimagenet -source ILSVRC2012_img_train.tar

Sources may be archives or folders; archives are read in place. Images are copied byte for byte unless they are cropped or
resized. The data set is built in ``.<folder>.part`` and appears under its name when it is complete; a stopped run
continues where it was. ``manifest.json`` in it says what it was built from.

Exit status: 0 if the data set is in place, 1 if it cannot be built, 2 for bad flags, 130 after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import manifest
from download import Remote, download
from PIL import Image
from sources import CIFAR_PARTS, CifarPickles, Entry, Folder, Several, Source, Zip, hub_parquet, is_image, open_source

from dataloader.catalog import CATALOG, SPLITS
from dataloader.published import miniimagenet_numbers, published_classes, published_images, wnids
from engine.loading import progress_bar
from engine.run import hold_lock
from utils import InputError, available_cores, make_parser, number_at_least, run_script, status, write_json

JPEG_QUALITY = 95  # of what is cropped or resized


class Target(NamedTuple):
    """Where an image goes, relative to the data set, and which part of it."""

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
        plan: says what becomes of the entries of a source; the last argument is whether to crop.
        downloads: file names and where they come from, for who gives no source.
        hub: a repository on Hugging Face and its revision, likewise.
        adapt: makes of a source what ``plan`` expects.
        shorter_side: the size without ``-size``; 0 leaves images as they are; None where there is no choice.
        advice: what to give as a source, where nothing can be downloaded.
    """

    folder: str
    plan: Callable[[Source, list[Entry], bool], Plan]
    downloads: dict[str, Remote] = {}
    hub: tuple[str, str] | None = None
    adapt: Callable[[Source], Source] = lambda source: source
    shorter_side: int | None = None
    advice: str = ""


# --- CIFAR-100 --------------------------------------------------------------------------------------------------------


def _plan_cifar(name: str, source: Source, entries: list[Entry], crop: bool) -> Plan:
    split_of = {label: split for split, labels in published_classes(name).items() for label in labels}
    images = {}
    for entry in entries:
        part, label, file = ("", "", "", *PurePosixPath(entry.name).parts)[-3:]
        if part in CIFAR_PARTS and label in split_of and is_image(file):
            split = split_of[label]
            folder = CATALOG[name].split_folders.get(split, split)
            images[entry.name] = Target(f"{folder}/{label}/{file}", split, label)
    return Plan(images, {}, _missing(name, images.values()), [])


def _adapt_cifar(source: Source) -> Source:
    for entry in source.entries():
        folder, _, file = entry.name.rpartition("/")
        if file == "meta":
            return CifarPickles(source, f"{folder}/" if folder else "")
        if file == "cifar-100-python.tar.gz" and isinstance(source, Folder):
            return _adapt_cifar(open_source(source.path / entry.name))
    return source


# --- CUB --------------------------------------------------------------------------------------------------------------


def _plan_cub(source: Source, entries: list[Entry], crop: bool) -> Plan:
    split_of = {label: split for split, labels in published_classes("cub").items() for label in labels}
    boxes = _cub_boxes(source, entries) if crop and not any(entry.label for entry in entries) else {}
    images = {}
    for entry in entries:
        if entry.label is not None:
            label, file, box = _cub_class(entry, source, split_of), _own_name(entry), entry.box
        else:
            folder, label, file = ("", "", "", *PurePosixPath(entry.name).parts)[-3:]
            if folder == "segmentations" or label not in split_of or not is_image(file):
                continue
            box = boxes.get(f"{label}/{file}")
        if crop and box is None:
            raise InputError(f"expected a bounding box for {entry.name} in {source.where}; it has none (see -no_crop)")
        images[entry.name] = Target(f"images/{label}/{file}", split_of[label], label, box if crop else None)
    return Plan(images, _tables(images.values()), _missing("cub", images.values()), [])


def _cub_class(entry: Entry, source: Source, classes: Iterable[str]) -> str:
    """The class by its number: ``001.Black_footed_Albatross``, or 0 for it."""
    label = str(entry.label)
    number = f"{int(label) + 1:03d}" if label.isdigit() else label.partition(".")[0]
    found = next((name for name in classes if name.startswith(number + ".")), None)
    if found is None:
        raise InputError(f"expected a class of CUB in {source.where}; got {label!r}")
    return found


def _cub_boxes(source: Source, entries: list[Entry]) -> dict[str, tuple[float, ...]]:
    """``<class>/<file>`` to left, upper, right, lower, from the tables beside the images."""
    tables = {}
    for table in ("images.txt", "bounding_boxes.txt"):
        names = [entry.name for entry in entries if PurePosixPath(entry.name).name == table]
        if not names:
            raise InputError(f"expected {table} in {source.where}; without it nothing can be cropped (see -no_crop)")
        tables[min(names, key=len)] = table
    rows = {}
    for name, content in source.read(tables):
        rows[tables[name]] = [line.split() for line in content.decode(errors="replace").splitlines() if line.strip()]
    try:
        file_of = dict(rows["images.txt"])
        boxes = {number: tuple(map(float, box)) for number, *box in rows["bounding_boxes.txt"]}
        return {file_of[n]: (x, y, x + width, y + height) for n, (x, y, width, height) in boxes.items()}
    except (ValueError, KeyError) as error:
        raise InputError(
            "expected rows 'id file' in images.txt and 'id x y width height' in bounding_boxes.txt of "
            f"{source.where}; one is different ({error})"
        ) from error


# --- The subsets of ImageNet ------------------------------------------------------------------------------------------

IMAGENET_NAME = re.compile(r"(n\d{8})_(\d+)(?:_n\d{8})?\.JPE?G", re.IGNORECASE)  # Hugging Face doubles the class
MINI_NAME = re.compile(r"(n\d{8})(\d{8})\.JPE?G", re.IGNORECASE)
PER_CLASS = 600  # images in miniImageNet
MOST_PER_CLASS = 1300  # images in ImageNet


class Numbered(NamedTuple):
    """An image of an ImageNet class, with the number in its name, which may be its place in miniImageNet's list."""

    number: int | None
    is_place: bool
    entry: Entry


def _by_class(name: str, source: Source, entries: list[Entry]) -> dict[str, list[Numbered]]:
    """The images of each class that belongs to a data set, by the numbers in their names."""
    wanted = {label for labels in published_classes(name).values() for label in labels}
    found: dict[str, list[Numbered]] = {}
    for entry in entries:
        file = PurePosixPath(entry.name).name
        match, is_place = IMAGENET_NAME.fullmatch(file), False
        if not match:
            match, is_place = MINI_NAME.fullmatch(file), True
        if match:
            wnid = match[1]
        elif entry.label is not None and not file.startswith("ILSVRC2012_"):  # which validation and test images have
            wnid = wnids(name).get(entry.label.lower(), "")
        else:
            continue
        if wnid in wanted:
            number = int(match[2]) if match else None
            found.setdefault(wnid, []).append(Numbered(number, bool(match) and is_place, entry))
    for images in found.values():
        images.sort(key=lambda image: (image.number or 0, image.entry.name))
    return found


def _plan_miniimagenet(source: Source, entries: list[Entry], crop: bool) -> Plan:
    # The test split on Hugging Face is of ImageNet's validation images, which miniImageNet has none of.
    entries = [entry for entry in entries if entry.label is None or not entry.name.startswith("test")]
    by_class = _by_class("miniimagenet", source, entries)
    images: dict[str, Target] = {}
    unnamed, other, short = [], [], []
    for split, labels in published_classes("miniimagenet").items():
        for label in labels:
            found, places = by_class.get(label, []), miniimagenet_numbers()[label]
            numbers = [image.number for image in found if image.number is not None]
            if len(numbers) < len(found) or (len(found) <= PER_CLASS and not _may_have(numbers, found, places)):
                (unnamed if len(numbers) < len(found) else other).append(label)
                chosen = [
                    (f"{label}_{_own_name(image.entry).removeprefix(f'{label}_')}", image.entry) for image in found
                ]
            else:
                if found and found[0].is_place:
                    at = {image.number: image.entry for image in found}
                elif len(found) == PER_CLASS:
                    at = {place: image.entry for place, image in zip(sorted(places), found, strict=True)}
                else:
                    at = {place: image.entry for place, image in enumerate(found, 1)}
                    short += [label] if len(found) < MOST_PER_CLASS <= max(places) + 10 else []
                chosen = [(f"{label}{place:08d}.jpg", at[place]) for place in places if place in at]
            images |= {entry.name: Target(f"images/{file}", split, label) for file, entry in chosen}
    notes = []
    if unnamed:
        notes.append(
            f"files without their names in ImageNet: {len(unnamed)} classes. The classes are right; whether these are the "
            "600 images of each that miniImageNet has could not be verified"
        )
    if other:
        notes.append(
            f"names that do not fit miniImageNet's list: {len(other)} classes, as {other[0]}. The classes are right; the "
            "choice of images is another one"
        )
    if short:
        notes.append(
            f"less than {MOST_PER_CLASS} images, which most classes of ImageNet have: {', '.join(short[:5])} (of {len(short)}). "
            "If some were lost from the source, the choice of images in these classes is shifted"
        )
    return Plan(images, _tables(images.values()), _missing("miniimagenet", images.values()), notes)


def _may_have(numbers: list[int], found: list[Numbered], places: Sequence[int]) -> bool:
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


def _plan_tieredimagenet(source: Source, entries: list[Entry], crop: bool) -> Plan:
    by_class = _by_class("tieredimagenet", source, entries)
    images = {}
    for split, labels in published_classes("tieredimagenet").items():
        for label in labels:
            for image in by_class.get(label, []):
                if image.number is None or image.is_place:
                    raise InputError(
                        f"expected images of ImageNet under their names, as in {label}_10026.JPEG; {source.where} has "
                        f"{PurePosixPath(image.entry.name).name}"
                    )
                images[image.entry.name] = Target(f"{split}/{label}/{label}_{image.number}.JPEG", split, label)
    return Plan(images, {}, _missing("tieredimagenet", images.values()), [])


# --- Omniglot ---------------------------------------------------------------------------------------------------------

# One script in one split only. small2 has Greek and Latin too, which are left out there.
OMNIGLOT = {
    "train": ("images_background_small2", ("Japanese_(katakana)", "Sanskrit", "Tagalog")),
    "val": ("images_background_small1", ("Balinese", "Early_Aramaic")),
    "test": ("images_background_small1", ("Greek", "Korean", "Latin")),
}
DRAWINGS = 20  # of each character
CHARACTERS = {"train": 106, "val": 46, "test": 90}


def _plan_omniglot(source: Source, entries: list[Entry], crop: bool) -> Plan:
    place = {(folder, script): split for split, (folder, scripts) in OMNIGLOT.items() for script in scripts}
    images = {}
    for entry in entries:
        folder, script, character, file = ("", "", "", "", *PurePosixPath(entry.name).parts)[-4:]
        split = place.get((folder, script))
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


def _adapt_omniglot(source: Source) -> Source:
    """The archives in a folder, where it holds no such images itself."""
    zips = [entry.name for entry in source.entries() if entry.name.endswith(".zip")]
    return Several([Zip(source.path / name) for name in zips]) if zips and isinstance(source, Folder) else source


RECIPES = {
    "miniimagenet": Recipe(
        "miniimagenet",
        _plan_miniimagenet,
        hub=("timm/mini-imagenet", "bd8779f9d33c061ea6e75fdd3bce4e43dd679060"),
        shorter_side=0,
    ),
    "tieredimagenet": Recipe(
        "tiered_imagenet",
        _plan_tieredimagenet,
        shorter_side=224,
        advice="ILSVRC2012_img_train.tar from image-net.org, Kaggle's archive of ImageNet, or hf://datasets/ILSVRC/imagenet-1k",
    ),
    "cub": Recipe(
        "cub",
        _plan_cub,
        downloads={
            "CUB_200_2011.tgz": Remote(
                "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
                size=1_150_585_339,
                digest="md5:97eceeb196236b17998738112f37df78",
            )
        },
        shorter_side=0,
    ),
    **{
        name: Recipe(
            CATALOG[name].folders[0],
            partial(_plan_cifar, name),
            downloads={
                "cifar-100-python.tar.gz": Remote(
                    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
                    digest="md5:eb9058c3a382ffc7106e4002c42a8d85",
                )
            },
            adapt=_adapt_cifar,
        )
        for name in ("fc100", "cifar_fs")
    },
    "omniglot": Recipe(
        "omniglot",
        _plan_omniglot,
        downloads={
            f"{name}.zip": Remote(f"https://github.com/brendenlake/omniglot/raw/master/python/{name}.zip")
            for name in ("images_background_small1", "images_background_small2")
        },
        adapt=_adapt_omniglot,
    ),
}


# --- What recipes have in common --------------------------------------------------------------------------------------


def _missing(name: str, targets: Iterable[Target]) -> list[str]:
    """What differs from the published counts, most harmful first."""
    found = Counter((target.split, target.label) for target in targets)
    published = {(split, label): n for split, labels in published_classes(name).items() for label, n in labels.items()}
    faults = [f"no image of the {split} class {label}" for split, label in published if not found[split, label]]
    faults += [
        f"{found[split, label]} of {n} images of the {split} class {label}"
        for (split, label), n in published.items()
        if n is not None and found[split, label] not in (0, n)
    ]
    for split in SPLITS:
        number = sum(n for (of, _), n in found.items() if of == split)
        if not faults and number != published_images(name, split):
            faults.append(f"{number} of {published_images(name, split)} {split} images")
    return faults


def _tables(targets: Iterable[Target]) -> dict[str, str]:
    """``split/<split>.csv``, as the published lists are."""
    rows: dict[str, list[str]] = {split: ["filename,label"] for split in SPLITS}
    for target in sorted(targets, key=lambda target: (target.label, target.path)):
        rows[target.split].append(f"{PurePosixPath(target.path).name},{target.label}")
    return {f"split/{split}.csv": "".join(f"{row}\n" for row in lines) for split, lines in rows.items()}


CUB_NAME = re.compile(r"[\w-]+_\d{4}_\d+\.jpg")


def _own_name(entry: Entry) -> str:
    """A file name for a row of a parquet file: the one that it gives, if that is telling, or its place."""
    shard, row, base = entry.name.split("/")
    return base if CUB_NAME.fullmatch(base) or IMAGENET_NAME.fullmatch(base) else f"{shard.split('.')[0]}_{row}.jpg"


# --- Building ---------------------------------------------------------------------------------------------------------


def prepare(
    name: str,
    given: Sequence[str],
    out: Path,
    *,
    crop: bool = True,
    shorter_side: int | None = None,
    allow_missing: bool = False,
    dry_run: bool = False,
) -> None:
    """Build ``RECIPES[name]`` below ``out``, from the sources given, or else from its download."""
    recipe = RECIPES[name]
    side = recipe.shorter_side if shorter_side is None else shorter_side
    options = {"crop": crop if name == "cub" else None, "shorter_side": side, "allow_missing": allow_missing}
    target = out / recipe.folder
    if _is_complete(name, target, options):
        return
    work = out / f".{recipe.folder}.part"
    if dry_run:
        _dry_run(name, given, target, work, crop=crop, side=side or 0)
        return
    work.mkdir(parents=True, exist_ok=True)
    lock = hold_lock(out / f".{recipe.folder}.lock", "Wait for it to end")
    source = _open(name, given, work)
    state = {"dataset": name, "recipe": manifest.RECIPE, "options": options, "source": source.where}
    _continue_or_clear(work, state)
    plan = _plan(recipe, source, crop)
    _refuse_missing(name, source, plan, allow_missing)
    for note in plan.notes:
        status(f"note: {note}")
    digests = _write_images(source, plan, work, side or 0)
    for path, text in plan.tables.items():
        digests[path] = _write(work / path, text.encode())
    _remove_others(work, digests)
    per_class = Counter((image.split, image.label) for image in plan.images.values())
    splits = {split: {label: n for (of, label), n in sorted(per_class.items()) if of == split} for split in SPLITS}
    write_json(
        work / manifest.NAME,
        {
            **state,
            "notes": plan.notes,
            "lacks": plan.faults,
            "splits": {
                split: {"classes": len(labels), "images": sum(labels.values()), "per_class": labels}
                for split, labels in splits.items()
            },
            "sha256": manifest.tree_hash(digests),
        },
    )
    (work / STATE).unlink()
    if target.is_dir():
        target.rmdir()  # _is_complete has seen that it is empty
    work.rename(target)
    del lock
    (out / f".{recipe.folder}.lock").unlink(missing_ok=True)
    print(f"{target} is in place: {_summary(plan)}. Check it: python datasets/verify.py {name}")


STATE = "prepare.json"  # in the unfinished folder: what it is being built from
DOWNLOADS = "downloads"  # in the unfinished folder


def _is_complete(name: str, target: Path, options: dict[str, Any]) -> bool:
    others = CATALOG[name].folders if name in CATALOG else ()
    for folder in (target, *(target.parent / other for other in others)):
        if not folder.is_dir() or not any(folder.iterdir()):
            continue
        try:
            found = json.loads((folder / manifest.NAME).read_text(encoding="utf-8"))
            earlier = found["options"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"expected no folder {folder}, or one that this script built; remove it to build it anew, or give another -out"
            ) from None
        if earlier != options or found.get("recipe") != manifest.RECIPE:
            raise InputError(
                f"{folder} was built with other options ({_words(earlier)}; now {_words(options)}). Remove it to build it "
                "anew, or give another -out"
            )
        print(
            f"{folder} is complete already, built from {found.get('source')}: nothing to do (remove it to build it anew)"
        )
        return True
    return False


def _words(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)


def _open(name: str, given: Sequence[str], work: Path) -> Source:
    recipe = RECIPES[name]
    scratch = work / DOWNLOADS
    if not given and recipe.hub:
        given = [HUB + "@".join(recipe.hub)]
    if not given and not recipe.downloads:
        raise InputError(f"expected -source for {name}, which cannot be downloaded without an account: {recipe.advice}")
    given = given or [str(download(remote, scratch / file)) for file, remote in recipe.downloads.items()]
    sources: list[Source] = []
    for path in given:
        if path.startswith(HUB):
            repository, _, revision = path.removeprefix(HUB).partition("@")
            # CUB is split by class, so it needs the images of the repository's test split; the ImageNets have no use for it.
            wanted = (lambda file: True) if name == "cub" else (lambda file: not file.startswith("test"))
            sources.append(hub_parquet(repository, revision or "main", wanted, scratch=scratch))
        else:
            sources.append(recipe.adapt(open_source(Path(path))))
    return sources[0] if len(sources) == 1 else Several(sources)


HUB = "hf://datasets/"


def _plan(recipe: Recipe, source: Source, crop: bool) -> Plan:
    plan = recipe.plan(source, source.entries(), crop)
    twice = [path for path, n in Counter(image.path for image in plan.images.values()).items() if n > 1]
    if twice:
        raise InputError(
            f"expected each image once in {source.where}; {len(twice)} are there twice, {twice[0]} the first"
        )
    if not plan.images:
        raise InputError(f"expected images of this data set in {source.where}; found none that belong to it")
    return plan


def _refuse_missing(name: str, source: Source, plan: Plan, allow_missing: bool) -> None:
    if not plan.faults:
        return
    more = f", and {len(plan.faults) - 3} more" if len(plan.faults) > 3 else ""
    found = f"{source.where} has {'; '.join(plan.faults[:3])}{more}"
    if not allow_missing:
        raise InputError(
            f"expected all of {name}; {found}. Get a complete source, or take what there is with -allow_missing"
        )
    status(f"warning: {name} will be incomplete: {found}")


def _summary(plan: Plan) -> str:
    per_split = {split: [image for image in plan.images.values() if image.split == split] for split in SPLITS}
    classes = "/".join(str(len({image.label for image in images})) for images in per_split.values())
    return f"{classes} classes, {'/'.join(str(len(images)) for images in per_split.values())} images in train/val/test"


def _dry_run(name: str, given: Sequence[str], target: Path, work: Path, *, crop: bool, side: int) -> None:
    recipe = RECIPES[name]
    if not given and recipe.downloads:
        for remote in recipe.downloads.values():
            size = f" ({remote.size / 1e6:.0f} MB)" if remote.size else ""
            print(f"would download {remote.url}{size}, and build {target} from it")
        return
    source = _open(name, given, work)
    entries = source.entries()
    plan = recipe.plan(source, entries, crop)
    size = sum(entry.size for entry in entries if entry.name in plan.images)
    changed = side or (crop and name == "cub")
    print(
        f"would write {target} from {source.where}: {_summary(plan)}, {'at most ' if changed else 'about '}{size / 1e6:.0f} MB"
    )
    for line in (*plan.notes, *(f"the source has {fault}" for fault in plan.faults[:10])):
        print(line)


def _continue_or_clear(work: Path, state: dict[str, Any]) -> None:
    try:
        earlier = json.loads((work / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = None
    if earlier == state:
        status(f"continuing in {work}")
        return
    for path in work.iterdir():  # of another source, or with other options
        if path.name != DOWNLOADS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(work / STATE, state)


def _write_images(source: Source, plan: Plan, work: Path, side: int) -> dict[str, str]:
    """Path -> SHA-256 of all images of the plan; those that an earlier call wrote are kept."""
    digests: dict[str, str] = {}
    wanted = set()
    for name, target in plan.images.items():
        path = work / target.path
        if path.is_file():
            digests[target.path] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            wanted.add(name)
    faults = []
    waiting: deque[tuple[Target, Future[str]]] = deque()

    def collect() -> None:
        target, future = waiting.popleft()
        try:
            digests[target.path] = future.result()
        except InputError as error:
            faults.append(str(error))
        bar.update()

    bar = progress_bar(work.name.strip(".").removesuffix(".part"), total=len(plan.images), initial=len(digests))
    with bar, ThreadPoolExecutor(available_cores()) as pool:
        for name, content in source.read(wanted):
            target = plan.images[name]
            waiting.append((target, pool.submit(_make, name, content, target, work / target.path, side)))
            if len(waiting) >= 4 * available_cores():
                collect()
        while waiting:
            collect()
    lost = len(plan.images) - len(digests) - len(faults)
    if lost:
        faults.append(f"{lost} images are listed in {source.where} and could not be read")
    if faults:
        more = f" (and {len(faults) - 1} more like it)" if len(faults) > 1 else ""
        raise InputError(f"{faults[0]}{more}. Replace the source; what could be read is kept in {work}")
    return digests


def _make(name: str, content: bytes, target: Target, path: Path, side: int) -> str:
    """Write one image, and return its SHA-256."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()  # so that what is broken is found now
            made = _shrunk(_cropped(image, target.crop), side)
            if made is not image:
                buffer = io.BytesIO()
                made = made if made.mode in ("RGB", "L") else made.convert("RGB")
                made.save(buffer, "PNG" if image.format == "PNG" else "JPEG", quality=JPEG_QUALITY, subsampling=0)
                content = buffer.getvalue()
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # whatever a broken file makes Pillow raise
        reason = re.sub(" <.*>", "", str(error)) or type(error).__name__
        raise InputError(f"expected an image in {name}; it cannot be read ({reason})") from error
    return _write(path, content)


def _cropped(image: Image.Image, box: tuple[float, ...] | None) -> Image.Image:
    if box is None:
        return image
    left, upper, right, lower = (round(value) for value in box)
    if not (0 <= left < right <= image.width + 1 and 0 <= upper < lower <= image.height + 1):
        raise InputError(
            f"expected a bounding box within {image.width} x {image.height} pixels, as left, upper, right, lower; "
            f"got {left}, {upper}, {right}, {lower}"
        )
    return image.crop((left, upper, min(right, image.width), min(lower, image.height)))


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    if not side or min(image.size) <= side:
        return image
    scale = side / min(image.size)
    image = image if image.mode in ("RGB", "L") else image.convert("RGB")
    return image.resize([max(round(edge * scale), side) for edge in image.size], Image.Resampling.BICUBIC)


def _write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(content)
    os.replace(partial, path)  # under its name a file is whole
    return hashlib.sha256(content).hexdigest()


def _remove_others(work: Path, digests: dict[str, str]) -> None:
    """Downloads, and what a killed process left half written."""
    shutil.rmtree(work / DOWNLOADS, ignore_errors=True)
    for path in sorted(work.rglob("*"), reverse=True):
        if path.is_dir():
            with contextlib.suppress(OSError):
                path.rmdir()  # if it is empty
        elif path.name != STATE and path.relative_to(work).as_posix() not in digests:
            path.unlink()


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("name", metavar="NAME", choices=RECIPES, help=f"one of {', '.join(RECIPES)}")
    parser.add_argument(
        "-source",
        nargs="+",
        default=[],
        metavar="PATH",
        help="archives or folders, or hf://datasets/<repository>[@<revision>] (default: a download, where there is one)",
    )
    parser.add_argument("-out", type=Path, default=Path(__file__).parent, help="folder of data sets to build it in")
    parser.add_argument(
        "-size",
        type=number_at_least(0, int),
        help="shrink images to this many pixels along their shorter side; 0 leaves them as they are (default: 224 for "
        "tieredimagenet, else 0)",
    )
    parser.add_argument("-no_crop", action="store_true", help="cub: do not crop to the bounding boxes")
    parser.add_argument("-allow_missing", action="store_true", help="build it from an incomplete source")
    parser.add_argument(
        "-dry_run", action="store_true", help="say what would be written and how much, and write nothing"
    )
    args = parser.parse_args(argv)
    if args.size is not None and RECIPES[args.name].shorter_side is None:
        parser.error(
            f"-size goes with {', '.join(name for name, recipe in RECIPES.items() if recipe.shorter_side is not None)}"
        )
    if args.no_crop and args.name != "cub":
        parser.error("-no_crop goes with cub")
    prepare(
        args.name,
        args.source,
        args.out,
        crop=not args.no_crop,
        shorter_side=args.size,
        allow_missing=args.allow_missing,
        dry_run=args.dry_run,
    )


if __name__ == "__main__":
    run_script(main)
