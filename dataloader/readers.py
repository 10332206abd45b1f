"""The few ways a split lies on disk. Each reader gives ``(paths, labels, class names)``.

Classes are sorted by name and numbered in that order, so that labels do not depend on the file system. Nothing is
decoded here, but every file named is known to exist when a reader returns.
"""

import codecs
import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from dataloader.catalog import DatasetSpec
from utils import InputError, warn

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif"}

Listing = tuple[list[str], list[int], list[str]]


def read_split(spec: DatasetSpec, data_dir: str, split: str) -> Listing:
    """List one split of a data set.

    Raises:
        InputError: the data directory, the data set's folder, the split, a class or a file is missing, or cannot be read.
    """
    try:
        pairs = _read_split(spec, Path(data_dir), split)
    except OSError as error:
        raise InputError(
            f"expected to read {error.filename or data_dir}; it cannot be read ({error.strerror or error}). "
            "Check its permissions"
        ) from error
    names = sorted({name for _, name in pairs})
    number = {name: label for label, name in enumerate(names)}
    return [str(path) for path, _ in pairs], [number[name] for _, name in pairs], names


def _read_split(spec: DatasetSpec, data_path: Path, split: str) -> list[tuple[Path, str]]:
    if not data_path.is_dir():
        raise InputError(f"-data_dir {data_path}: expected a folder; there is none. {_how_to_get(spec)}")
    root = next((data_path / name for name in spec.folders if (data_path / name).is_dir()), None)
    if root is None:
        expected = " or ".join(str(data_path / name) for name in spec.folders)
        raise InputError(f"expected the data set in {expected}; there is no such folder. {_how_to_get(spec)}")
    return READERS[spec.layout](spec, root, split)


def _how_to_get(spec: DatasetSpec) -> str:
    return f"Give -data_dir the folder that holds the data, or get it: {spec.obtain}"


def names_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def is_hidden(path: Path) -> bool:
    # macOS leaves a "._name.jpg" beside each "name.jpg" it copies.
    return path.name.startswith(".")


# --- One folder per class ---------------------------------------------------------------------------------------------


def _read_folders(spec: DatasetSpec, root: Path, split: str) -> list[tuple[Path, str]]:
    """``<split>/<class>/<image>``. Files beside the classes, files other than images, and hidden names are ignored."""
    folder = root / spec.split_folders.get(split, split)
    if not folder.is_dir():
        raise InputError(f"expected the {split} classes in {folder}; there is no such folder. {_how_to_get(spec)}")
    pairs = []
    for class_folder in sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path)):
        images = sorted(path for path in class_folder.iterdir() if names_image(path) and not is_hidden(path))
        if not images:
            raise InputError(
                f"expected images in {class_folder}; found none ({', '.join(sorted(IMAGE_SUFFIXES))}). "
                "Remove the folder or fill it"
            )
        pairs += [(path, class_folder.name) for path in images]
    if not pairs:
        raise InputError(f"expected one folder per class in {folder}; it holds none. {_how_to_get(spec)}")
    return pairs


# --- A table of files -------------------------------------------------------------------------------------------------


def row_paths(spec: DatasetSpec, file: str, name: str) -> list[Path]:
    """Where the image of a row may lie below the folder of the data set, the usual place first."""
    by_class = [Path(name, file)] if spec.layout == "csv_by_class" else []
    return [Path(folder) / path for folder in spec.image_folders for path in (*by_class, Path(file))]


def _read_csv(spec: DatasetSpec, root: Path, split: str) -> list[tuple[Path, str]]:
    """``split/<split>.csv`` with rows ``file,class``, with or without a header; the files lie in an image folder.

    For ``csv_by_class`` they lie in one folder per class, which ``file`` may or may not name.
    """
    table = root / "split" / f"{split}.csv"
    if not table.is_file():
        raise InputError(f"expected the list of {split} images in {table}; there is no such file. {_how_to_get(spec)}")
    listings: dict[Path, set[str]] = {}  # one directory listing each, instead of a look-up per file

    def exists(path: Path) -> bool:
        if path.parent not in listings:
            listings[path.parent] = {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
        return path.name in listings[path.parent]

    class_of: dict[Path, str] = {}
    repeated = 0
    for place, file, name in table_rows(table):
        relative = row_paths(spec, file, name)
        if any(path.is_absolute() or ".." in path.parts for path in relative):
            raise InputError(f"{place}: expected a file below {root}; got {_quoted(file)} of class {_quoted(name)}")
        candidates = [root / path for path in relative]
        path = next((path for path in candidates if exists(path)), None)
        if path is None:
            raise InputError(
                f"{place}: expected {_quoted(file)} as {_quoted(str(candidates[0]))}; there is no such file. "
                "Fetch the images again, or remove the row"
            )
        earlier = class_of.get(path)
        if earlier is None:
            class_of[path] = name
        elif earlier == name:
            repeated += 1
        else:
            raise InputError(
                f"{place}: expected one class for {_quoted(file)}; got {_quoted(earlier)} and {_quoted(name)}. "
                "Remove one of the rows"
            )
    if not class_of:
        raise InputError(f"{table}: expected rows file,class; found none")
    if repeated:
        warn(f"{table}: rows that repeat an earlier one, ignored: {repeated}")
    return sorted(class_of.items(), key=lambda pair: pair[1])  # stable: within a class the order of the table


def table_rows(table: Path) -> Iterator[tuple[str, str, str]]:
    """The rows of a table as (where it stands, file, class), without the header, blank lines and hidden files."""
    rows = csv.reader(io.StringIO(_text(table), newline=""))
    is_first = True
    try:
        for row in rows:
            place = f"{table}, line {rows.line_num}"
            file, name = [field.strip() for field in (*row, "", "")[:2]]
            is_header = is_first and not names_image(Path(file))
            is_first = is_first and not row
            if not row or is_header or is_hidden(Path(file)):
                continue
            if not file or not name:
                raise InputError(f"{place}: expected file,class; got {_quoted(','.join(row))}")
            if not names_image(Path(file)):
                raise InputError(
                    f"{place}: expected the name of an image ({', '.join(sorted(IMAGE_SUFFIXES))}); got {_quoted(file)}"
                )
            yield place, file, name
    except csv.Error as error:
        place = f"{table}, line {rows.line_num}"
        raise InputError(f"{place}: expected rows file,class; it cannot be read ({error})") from error


def _text(table: Path) -> str:
    content = table.read_bytes().removeprefix(codecs.BOM_UTF8)
    fault, what = content.find(b"\0"), "a NUL byte"
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        fault, what = error.start, f"the byte 0x{content[error.start]:02x}"
    if fault < 0:
        return text
    line = len(content[: fault + 1].splitlines())
    raise InputError(f"{table}, line {line}: expected text in UTF-8; got {what}. Save the table as UTF-8")


def _quoted(text: str) -> str:
    # One line whatever the text holds, and a short one: an unclosed quote makes a field of the rest of a table.
    return repr(text if len(text) <= 200 else text[:200] + "...")


READERS: dict[str, Callable[[DatasetSpec, Path, str], list[tuple[Path, str]]]] = {
    "folders": _read_folders,
    "csv": _read_csv,
    "csv_by_class": _read_csv,
}
