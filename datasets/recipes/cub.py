"""CUB-200-2011, from the official archive or from parquet files, cropped to the birds."""

from pathlib import PurePosixPath

from download import Remote
from sources import Entry, Source, is_image

from recipes.common import Plan, Recipe, Target, last_parts, parquet_file_name, published_plan, split_of_class
from utils import InputError

URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1"


def plan(source: Source, entries: list[Entry], crop: bool) -> Plan:
    split_of = split_of_class("cub")
    numbered = {label[:3]: label for label in split_of}  # "001": "001.Black_footed_Albatross"
    boxes = _read_boxes(source, entries) if crop and not any(entry.label for entry in entries) else {}
    images = {}
    for entry in entries:
        if entry.label is not None:  # the number, from 0, or the name of the class
            number = f"{int(entry.label) + 1:03d}" if entry.label.isdecimal() else entry.label[:3]
            folder, label, file, box = "", numbered.get(number), parquet_file_name(entry), entry.box
        else:
            folder, label, file = last_parts(entry.name, 3)
            box = boxes.get(f"{label}/{file}")
        if folder == "segmentations" or label not in split_of or not is_image(file):
            continue
        if crop and box is None:
            raise InputError(f"{entry.name} in {source.where} has no bounding box. Build the data set with -no_crop")
        images[entry.name] = Target(f"images/{label}/{file}", split_of[label], label, box if crop else None)
    return published_plan("cub", images, tables=True)


def _read_boxes(source: Source, entries: list[Entry]) -> dict[str, tuple[float, ...]]:
    """``<class>/<file>`` to left, upper, right, lower, from the tables beside the images."""
    wanted = {entry.name for entry in entries if entry.name.endswith(("images.txt", "bounding_boxes.txt"))}
    rows = {}
    for name, content in source.read(wanted):
        lines = content.decode(errors="replace").splitlines()
        rows[PurePosixPath(name).name] = [line.split() for line in lines if line.strip()]
    try:
        file_of = dict(rows["images.txt"])
        boxes = {number: tuple(map(float, box)) for number, *box in rows["bounding_boxes.txt"]}
        return {file_of[n]: (x, y, x + width, y + height) for n, (x, y, width, height) in boxes.items()}
    except (ValueError, KeyError) as error:
        needed = "images.txt needs rows 'id file', bounding_boxes.txt rows 'id x y width height'"
        text = f"cannot read the bounding boxes of {source.where} ({error}): {needed}"
        raise InputError(f"{text}. Get a complete source, or use -no_crop") from error


ARCHIVE = Remote(URL, size=1_150_585_339, digest="md5:97eceeb196236b17998738112f37df78")
RECIPES = {"cub": Recipe("cub", plan, downloads={"CUB_200_2011.tgz": ARCHIVE}, shorter_side=0, crops=True)}
