"""CUB-200-2011, from the official archive or from parquet files, cropped to the birds."""

from collections.abc import Iterable
from pathlib import PurePosixPath

from download import Remote
from sources import Entry, Source, is_image

from recipes import common
from recipes.common import Plan, Recipe, Target
from utils import InputError

URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1"


def plan(source: Source, entries: list[Entry], crop: bool) -> Plan:
    split_of = common.split_of_class("cub")
    boxes = _read_boxes(source, entries) if crop and not any(entry.label for entry in entries) else {}
    images = {}
    for entry in entries:
        if entry.label is not None:
            label, file, box = _class_by_number(entry, source, split_of), common.parquet_file_name(entry), entry.box
        else:
            folder, label, file = common.last_parts(entry.name, 3)
            if folder == "segmentations" or label not in split_of or not is_image(file):
                continue
            box = boxes.get(f"{label}/{file}")
        if crop and box is None:
            raise InputError(f"{entry.name} in {source.where} has no bounding box. Build the data set with -no_crop")
        images[entry.name] = Target(f"images/{label}/{file}", split_of[label], label, box if crop else None)
    return common.published_plan("cub", images, tables=True)


def _class_by_number(entry: Entry, source: Source, classes: Iterable[str]) -> str:
    """The class of a label ``001.Black_footed_Albatross``, or 0 for it."""
    label = str(entry.label)
    number = f"{int(label) + 1:03d}" if label.isdecimal() else label.partition(".")[0]
    found = next((name for name in classes if name.startswith(number + ".")), None)
    if found is None:
        raise InputError(f"{source.where} has the label {label!r}, which is not a class of CUB")
    return found


def _read_boxes(source: Source, entries: list[Entry]) -> dict[str, tuple[float, ...]]:
    """``<class>/<file>`` to left, upper, right, lower, from the tables beside the images."""
    tables = {}
    for table in ("images.txt", "bounding_boxes.txt"):
        names = [entry.name for entry in entries if PurePosixPath(entry.name).name == table]
        if not names:
            raise InputError(
                f"{source.where} has no {table}, which cropping requires. Get a complete source, or use -no_crop"
            )
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
            f"cannot read the bounding boxes of {source.where} ({error}). images.txt needs rows 'id file', "
            "bounding_boxes.txt rows 'id x y width height'"
        ) from error


RECIPES = {
    "cub": Recipe(
        "cub",
        plan,
        downloads={"CUB_200_2011.tgz": Remote(URL, size=1_150_585_339, digest="md5:97eceeb196236b17998738112f37df78")},
        shorter_side=0,
        crops=True,
    )
}
