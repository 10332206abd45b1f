"""How a split is stored on disk: one folder per class, or a table of files. A reader returns (paths, labels, class names).

Classes are sorted by name and numbered in that order, so that labels do not depend on the file system. Nothing is decoded
here.
"""

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from dataloader.catalog import DatasetSpec
from dataloader.images import IMAGE_SUFFIXES
from utils import InputError, first_few, printable, warn

Pairs = list[tuple[Path, str]]  # image, class

MISSING_SPLIT = "missing splits"


class Problem(NamedTuple):
    """Something about the files of a split."""

    kind: str  # a heading for several of them
    text: str  # what was found where
    cure: str  # what to do about it
    is_fault: bool = True  # the split cannot be used as it is; otherwise it is worth knowing

    def __str__(self) -> str:
        return f"{self.text}. {self.cure}" if self.cure else self.text


Report = Callable[[Problem], None]


def refuse(problem: Problem) -> None:
    """Raise InputError for a fault, and warn of anything else."""
    if problem.is_fault:
        raise InputError(str(problem))
    warn(str(problem))


def read_split(
    spec: DatasetSpec, data_dir: str, split: str, *, advice: str | None = None, report: Report = refuse
) -> tuple[list[str], list[int], list[str]]:
    """List one split of a data set; InputError if something is missing, or cannot be read.

    ``report`` is called with each problem; where it returns, reading continues without the files concerned. ``advice`` is
    for messages: how to get what is missing.
    """
    advice = advice or f"To get it: {spec.obtain}"
    try:
        if not Path(data_dir).is_dir():
            raise InputError(f"there is no folder {printable(str(data_dir))}. {advice}")
        root = find_root(spec, Path(data_dir))
        if root is None:
            expected = " or ".join(printable(str(Path(data_dir, name))) for name in spec.folders)
            raise InputError(f"no data set in {expected}: there is no such folder. {advice}")
        pairs = READERS[spec.layout](spec, root, split, advice, report)
    except OSError as error:
        path = printable(str(error.filename or data_dir))
        raise InputError(f"{path} cannot be read ({error.strerror or error}). Check its permissions") from error
    names = sorted({name for _, name in pairs})
    number = {name: label for label, name in enumerate(names)}
    return [str(path) for path, _ in pairs], [number[name] for _, name in pairs], names


def find_root(spec: DatasetSpec, data_path: Path) -> Path | None:
    """The folder of a data set: the first of its spellings that exists."""
    return next((data_path / name for name in spec.folders if (data_path / name).is_dir()), None)


def names_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def is_hidden(path: Path) -> bool:
    # macOS leaves a "._name.jpg" beside each "name.jpg" it copies; Windows hides the two others.
    return path.name.startswith(".") or path.name.lower() in ("thumbs.db", "desktop.ini")


def image_files(paths: Sequence[str]) -> Iterator[str]:
    """The files named, and the images at any depth of the folders named, sorted by path within each.

    Linked folders are followed. Hidden files and folders are skipped; a warning counts what else was left out.
    """
    for path in map(Path, paths):
        if not path.is_dir():
            yield str(path)  # a file that is missing is reported when it is read
            continue
        files, others = [], []
        for file in _walk(path):
            (files if names_image(file) and file.is_file() else others).append(file)
        if others:
            warn(_describe_left_out(path, others))
        if not files:
            warn(f"no images in {printable(str(path))}")
        yield from map(str, sorted(files))


def _walk(top: Path) -> Iterator[Path]:
    """The files below a folder except hidden ones, and the folders that cannot be listed."""
    closed: list[OSError] = []
    seen = set()  # so that a link to a folder that it is in ends there
    for folder, folders, files in os.walk(top, followlinks=True, onerror=closed.append):
        seen.add(os.path.realpath(folder))
        yield from (Path(folder, name) for name in files if not is_hidden(Path(name)))
        shown = [name for name in folders if not is_hidden(Path(name))]
        folders[:] = [name for name in shown if os.path.realpath(os.path.join(folder, name)) not in seen]
    yield from (Path(error.filename) for error in closed)


def _describe_left_out(folder: Path, files: Sequence[Path]) -> str:
    kinds = Counter(file.suffix.lower() or ("folders" if file.is_dir() else "no suffix") for file in files)
    listed = first_few([f"{printable(kind)} {count}" for kind, count in sorted(kinds.items())], "other kinds")
    first = printable(str(min(files).relative_to(folder)))
    return f"left out of {printable(str(folder))}: {len(files)} that cannot be read as images ({listed}), first {first}"


def _read_folders(spec: DatasetSpec, root: Path, split: str, advice: str, report: Report) -> Pairs:
    """``<split>/<class>/<image>``. Hidden names are ignored; folders, pipes and dead links are not images."""
    folder = root / spec.split_folders.get(split, split)
    if not folder.is_dir():
        report(Problem(MISSING_SPLIT, f"no {split} classes: there is no folder {printable(str(folder))}", advice))
        return []
    entries = _entries(folder)
    if not any(path.is_dir() for path in entries):
        report(Problem("splits without a class", f"no class folders in {printable(str(folder))}", advice))
    if beside := [path for path in entries if names_image(path) and path.is_file()]:
        where = f"{printable(str(folder))} itself are left out, first {printable(beside[0].name)}"
        text, cure = f"{len(beside)} images in {where}", "Move them into class folders"
        report(Problem("images outside of class folders", text, cure, is_fault=False))
    pairs, others = [], []
    for class_folder in filter(Path.is_dir, entries):
        inside = _entries(class_folder)
        images = [path for path in inside if names_image(path) and path.is_file()]
        others += {*inside} - {*images}
        if not images:
            found = f", but {_describe_left_out(class_folder, inside)}" if inside else ""
            text = f"no images in {printable(str(class_folder))}{found}"
            report(Problem("class folders without an image", text, "Remove the folder or fill it"))
        pairs += [(path, class_folder.name) for path in images]
    if others:
        text = _describe_left_out(folder, others)
        report(Problem("files in class folders that are not images", text, "", is_fault=False))
    return pairs


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not is_hidden(path))


def _read_csv(spec: DatasetSpec, root: Path, split: str, advice: str, report: Report) -> Pairs:
    """``split/<split>.csv`` with rows ``file,class``, with or without a header; the files are in an image folder.

    For ``csv_by_class`` they are in one folder per class, which ``file`` may or may not name.
    """
    table = root / "split" / f"{split}.csv"
    if not table.is_file():
        report(Problem(MISSING_SPLIT, f"no list of {split} images: there is no file {printable(str(table))}", advice))
        return []

    @cache  # one listing of a folder, instead of a look-up per file
    def names_in(folder: Path) -> set[str]:
        entries = os.scandir(folder) if folder.is_dir() else ()
        return {entry.name for entry in entries if entry.is_file(follow_symlinks=False) or os.path.isfile(entry)}

    class_of: dict[Path, str] = {}
    for place, file, name in _table_rows(table):
        by_class = [Path(name, file)] if spec.layout == "csv_by_class" else []
        relative = [Path(folder) / path for folder in spec.image_folders for path in (*by_class, Path(file))]
        if any(path.is_absolute() or ".." in path.parts for path in relative):
            text = f"{place}: {_quoted(file)} of class {_quoted(name)} is outside of {printable(str(root))}"
            report(Problem("rows that leave the data set", text, "Correct the row"))
            continue
        candidates = [root / path for path in relative]
        path = next((path for path in candidates if path.name in names_in(path.parent)), None)
        if path is None:
            text = f"{place}: there is no file {_quoted(str(candidates[0]))}"
            report(Problem("rows without a file", text, "Get the images again, or remove the row"))
        elif class_of.setdefault(path, name) != name:
            text = f"{place}: {_quoted(file)} is in two classes, {_quoted(class_of[path])} and {_quoted(name)}"
            report(Problem("images in two rows", text, "Remove the wrong row"))
    if not class_of:
        report(Problem("tables without a row", f"{printable(str(table))} has no rows file,class", advice))
    return sorted(class_of.items(), key=lambda pair: pair[1])  # stable: within a class the order of the table


def _table_rows(table: Path) -> Iterator[tuple[str, str, str]]:
    """The rows of a table as (its line, file, class), without the header, blank lines and hidden files."""
    where = printable(str(table))
    try:
        text = table.read_bytes().decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""))
        rows = [(f"{where}, line {reader.line_num}", row) for row in reader if row]
    except UnicodeDecodeError as error:
        line, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        text = f"{where}, line {line}: the byte 0x{byte:02x} is not text in UTF-8. Save the table as UTF-8"
        raise InputError(text) from error
    except csv.Error as error:
        raise InputError(f"{where}, line {reader.line_num}: cannot be read ({error})") from error
    for number, (place, row) in enumerate(rows):
        file, name = [field.strip() for field in (*row, "")[:2]]
        is_header = number == 0 and not names_image(Path(file))
        if is_header or is_hidden(Path(file)):
            continue
        if not file or not name:
            raise InputError(f"{place}: a row is file,class; this one is {_quoted(','.join(row))}")
        if not names_image(Path(file)):
            text = f"a row begins with the name of an image; {_quoted(file)} does not end as one, as in .jpg"
            raise InputError(f"{place}: {text}")
        yield place, file, name


def _quoted(text: str) -> str:
    # Always one short line: an unclosed quote turns the rest of a table into one field.
    return repr(text if len(text) <= 200 else text[:200] + "...")


READERS: dict[str, Callable[..., Pairs]] = {"folders": _read_folders, "csv": _read_csv, "csv_by_class": _read_csv}
