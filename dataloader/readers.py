"""How a split is stored on disk: one folder per class, or a table of files. A reader returns (paths, labels, class names).

Classes are sorted by name and numbered in that order, so that labels do not depend on the file system. Nothing is decoded
here.
"""

import codecs
import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dataloader.catalog import DatasetSpec
from dataloader.images import IMAGE_SUFFIXES
from utils import InputError, first_few, printable, warn

Listing = tuple[list[str], list[int], list[str]]
Pairs = list[tuple[Path, str]]  # image, class

MISSING_SPLIT = "missing splits"


class Problem(NamedTuple):
    """Something about the files of a split.

    Attributes:
        kind: a heading for several of them.
        text: what was found where.
        cure: what to do about it.
        is_fault: the split cannot be used as it is; otherwise it is worth knowing.
    """

    kind: str
    text: str
    cure: str
    is_fault: bool = True

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
) -> Listing:
    """List one split of a data set.

    Args:
        advice: how to get what is missing, for messages; by default as the data set is obtained.
        report: is told of each problem. Where it returns, reading continues without the files concerned.

    Raises:
        InputError: the data directory, the data set's folder, the split, a class or a file is missing, or cannot be read.
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
        for file in _walk(path, ()):
            (files if names_image(file) and file.is_file() else others).append(file)
        if others:
            warn(_describe_left_out(path, others))
        if not files:
            warn(f"no images in {printable(str(path))}")
        yield from map(str, sorted(files))


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """All but the hidden files below a folder; a link to a folder that it is in is given as a file."""
    try:
        status, entries = folder.stat(), list(folder.iterdir())
    except OSError:
        yield folder
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        yield folder
        return
    for entry in entries:
        if not is_hidden(entry):
            yield from _walk(entry, (*above, here)) if entry.is_dir() else (entry,)


def _describe_left_out(folder: Path, files: Sequence[Path]) -> str:
    kinds = Counter(file.suffix.lower() or ("folders" if file.is_dir() else "no suffix") for file in files)
    listed = first_few([f"{printable(kind)} {count}" for kind, count in sorted(kinds.items())])
    first = printable(str(min(files).relative_to(folder)))
    return f"left out of {printable(str(folder))}: {len(files)} that cannot be read as images ({listed}), first {first}"


# --- One folder per class ---------------------------------------------------------------------------------------------


def _read_folders(spec: DatasetSpec, root: Path, split: str, advice: str, report: Report) -> Pairs:
    """``<split>/<class>/<image>``. Hidden names are ignored."""
    folder = root / spec.split_folders.get(split, split)
    if not folder.is_dir():
        report(Problem(MISSING_SPLIT, f"no {split} classes: there is no folder {printable(str(folder))}", advice))
        return []
    entries = sorted(path for path in folder.iterdir() if not is_hidden(path))
    class_folders = [path for path in entries if path.is_dir()]
    if not class_folders:
        report(Problem("splits without a class", f"no class folders in {printable(str(folder))}", advice))
    pairs, others = [], [path for path in entries if names_image(path) and path.is_file()]
    if others:
        text = (
            f"{len(others)} images in {printable(str(folder))} itself are left out, first {printable(others[0].name)}"
        )
        report(Problem("images outside of class folders", text, "Move them into class folders", is_fault=False))
    others = []
    for class_folder in class_folders:
        entries = sorted(path for path in class_folder.iterdir() if not is_hidden(path))
        images = [path for path in entries if names_image(path)]
        others += [path for path in entries if not names_image(path)]
        if not images:
            found = f", but {_describe_left_out(class_folder, entries)}" if entries else ""
            text = f"no images in {printable(str(class_folder))}{found}"
            report(Problem("class folders without an image", text, "Remove the folder or fill it"))
        pairs += [(path, class_folder.name) for path in images]
    if others:
        report(Problem("files in class folders that are no images", _describe_left_out(folder, others), "", False))
    return pairs


# --- A table of files -------------------------------------------------------------------------------------------------


def _read_csv(spec: DatasetSpec, root: Path, split: str, advice: str, report: Report) -> Pairs:
    """``split/<split>.csv`` with rows ``file,class``, with or without a header; the files are in an image folder.

    For ``csv_by_class`` they are in one folder per class, which ``file`` may or may not name.
    """
    table = root / "split" / f"{split}.csv"
    if not table.is_file():
        report(Problem(MISSING_SPLIT, f"no list of {split} images: there is no file {printable(str(table))}", advice))
        return []
    listings: dict[Path, set[str]] = {}  # one directory listing each, instead of a look-up per file

    def exists(path: Path) -> bool:
        if path.parent not in listings:
            listings[path.parent] = {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
        return path.name in listings[path.parent]

    class_of: dict[Path, str] = {}
    repeated = 0
    for place, file, name in _table_rows(table):
        by_class = [Path(name, file)] if spec.layout == "csv_by_class" else []
        relative = [Path(folder) / path for folder in spec.image_folders for path in (*by_class, Path(file))]
        if any(path.is_absolute() or ".." in path.parts for path in relative):
            text = f"{place}: {_quoted(file)} of class {_quoted(name)} is outside of {printable(str(root))}"
            report(Problem("rows that leave the data set", text, "Correct the row"))
            continue
        candidates = [root / path for path in relative]
        path = next((path for path in candidates if exists(path)), None)
        if path is None:
            text = f"{place}: there is no file {_quoted(str(candidates[0]))}"
            report(Problem("rows without a file", text, "Get the images again, or remove the row"))
        elif path not in class_of:
            class_of[path] = name
        elif class_of[path] == name:
            repeated += 1
        else:
            text = f"{place}: {_quoted(file)} is in two classes, {_quoted(class_of[path])} and {_quoted(name)}"
            report(Problem("images in two rows", text, "Remove the wrong row"))
    if not class_of:
        report(Problem("tables without a row", f"{printable(str(table))} has no rows file,class", advice))
    if repeated:
        text = f"{printable(str(table))}: rows that repeat an earlier one, ignored: {repeated}"
        report(Problem("repeated rows", text, "", is_fault=False))
    return sorted(class_of.items(), key=lambda pair: pair[1])  # stable: within a class the order of the table


def _table_rows(table: Path) -> Iterator[tuple[str, str, str]]:
    """The rows of a table as (its line, file, class), without the header, blank lines and hidden files."""
    rows = csv.reader(io.StringIO(_text(table), newline=""))
    is_first = True
    try:
        for row in rows:
            place = f"{printable(str(table))}, line {rows.line_num}"
            file, name = [field.strip() for field in (*row, "", "")[:2]]
            is_header = is_first and not names_image(Path(file))
            is_first = is_first and not row
            if not row or is_header or is_hidden(Path(file)):
                continue
            if not file or not name:
                raise InputError(f"{place}: a row is file,class; this one is {_quoted(','.join(row))}")
            if not names_image(Path(file)):
                raise InputError(
                    f"{place}: a row begins with the name of an image; {_quoted(file)} does not end as one, as in .jpg"
                )
            yield place, file, name
    except csv.Error as error:
        raise InputError(f"{printable(str(table))}, line {rows.line_num}: cannot be read ({error})") from error


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
    raise InputError(f"{printable(str(table))}, line {line}: {what} is not text in UTF-8. Save the table as UTF-8")


def _quoted(text: str) -> str:
    # One line whatever the text holds, and a short one: an unclosed quote makes a field of the rest of a table.
    return repr(text if len(text) <= 200 else text[:200] + "...")


READERS: dict[str, Callable[[DatasetSpec, Path, str, str, Report], Pairs]] = {
    "folders": _read_folders,
    "csv": _read_csv,
    "csv_by_class": _read_csv,
}
