"""The few ways a split lies on disk. Each reader gives ``(paths, labels, class names)``.

Classes are sorted by name and numbered in that order, so that labels do not depend on the file system. Nothing is
decoded here, but every file named is known to exist when a reader returns.
"""

import csv
from collections.abc import Callable, Iterable
from pathlib import Path

from dataloader.catalog import DatasetSpec
from utils import InputError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif"}

Listing = tuple[list[str], list[int], list[str]]


def read_split(spec: DatasetSpec, data_dir: str, split: str) -> Listing:
    """List one split of a data set.

    Raises:
        InputError: the data directory, the data set's folder, the split, a class or a file is missing.
    """
    data_path = Path(data_dir)
    if not data_path.is_dir():
        raise InputError(f"-data_dir {data_dir}: expected a folder; there is none. {_how_to_get(spec)}")
    root = next((data_path / name for name in spec.folders if (data_path / name).is_dir()), None)
    if root is None:
        expected = " or ".join(str(data_path / name) for name in spec.folders)
        raise InputError(f"expected the data set in {expected}; there is no such folder. {_how_to_get(spec)}")
    pairs = READERS[spec.layout](spec, root, split)
    names = sorted({name for _, name in pairs})
    number = {name: label for label, name in enumerate(names)}
    return [str(path) for path, _ in pairs], [number[name] for _, name in pairs], names


def _how_to_get(spec: DatasetSpec) -> str:
    return f"Give -data_dir the folder that holds the data, or get it: {spec.obtain}"


def _read_folders(spec: DatasetSpec, root: Path, split: str) -> list[tuple[Path, str]]:
    """``<split>/<class>/<image>``. What is no folder beside the classes, or no image in them, is passed over."""
    folder = root / spec.split_folders.get(split, split)
    if not folder.is_dir():
        raise InputError(f"expected the {split} classes in {folder}; there is no such folder. {_how_to_get(spec)}")
    pairs = []
    for class_folder in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        images = sorted(path for path in class_folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise InputError(
                f"expected images in {class_folder}; found none ({', '.join(sorted(IMAGE_SUFFIXES))}). "
                "Remove the folder or fill it"
            )
        pairs += [(path, class_folder.name) for path in images]
    if not pairs:
        raise InputError(f"expected one folder per class in {folder}; it holds none. {_how_to_get(spec)}")
    return pairs


def _read_csv(spec: DatasetSpec, root: Path, split: str) -> list[tuple[Path, str]]:
    """``split/<split>.csv`` with a header, then ``file,class``; the files lie in an image folder."""
    return _find(spec, root, split, lambda file, name: (Path(file),))


def _read_csv_by_class(spec: DatasetSpec, root: Path, split: str) -> list[tuple[Path, str]]:
    """The same, but the files lie in one folder per class, which ``file`` may or may not name."""
    return _find(spec, root, split, lambda file, name: (Path(name, file), Path(file)))


def _find(
    spec: DatasetSpec, root: Path, split: str, spellings: Callable[[str, str], Iterable[Path]]
) -> list[tuple[Path, str]]:
    table = root / "split" / f"{split}.csv"
    if not table.is_file():
        raise InputError(f"expected the list of {split} images in {table}; there is no such file. {_how_to_get(spec)}")
    listings: dict[Path, set[str]] = {}  # one directory listing each, instead of a look-up per file

    def exists(path: Path) -> bool:
        if path.parent not in listings:
            listings[path.parent] = {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
        return path.name in listings[path.parent]

    pairs = []
    with table.open(newline="", encoding="utf-8") as lines:
        rows = csv.reader(lines)
        next(rows, None)  # the header
        for number, row in enumerate(rows, start=2):
            if not row:
                continue
            if len(row) < 2:
                raise InputError(f"{table}, line {number}: expected file,class; got {','.join(row)!r}")
            file, name = row[0].strip(), row[1].strip()
            candidates = [root / folder / path for folder in spec.image_folders for path in spellings(file, name)]
            path = next((path for path in candidates if exists(path)), None)
            if path is None:
                raise InputError(
                    f"{table}, line {number}: expected {file} as {candidates[0]}; there is no such file. "
                    "Fetch the images again, or take the row out"
                )
            pairs.append((path, name))
    if not pairs:
        raise InputError(f"{table}: expected rows file,class behind a header; found none")
    return sorted(pairs, key=lambda pair: pair[1])  # stable: within a class the order of the file


READERS: dict[str, Callable[[DatasetSpec, Path, str], list[tuple[Path, str]]]] = {
    "folders": _read_folders,
    "csv": _read_csv,
    "csv_by_class": _read_csv_by_class,
}
