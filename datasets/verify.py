"""Check a data set: is what lies on disk what was published, whole, and without leaks between the splits?

    python datasets/verify.py fc100                         the whole of datasets/FC100
    python datasets/verify.py cub -data_dir /data -json -   as JSON on standard output

Every image is decoded, every file hashed. Nothing is changed. The last line is the verdict; before it stand the faults,
most harmful first, each with its cure. Notes are worth knowing and no faults.

Exit status: 0 if the data set is right, 1 if it is not, 2 for bad flags, 130 after Ctrl-C.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import manifest
from PIL import Image
from tqdm import tqdm

from dataloader.catalog import CATALOG, SPLITS, DatasetSpec
from dataloader.checks import SHRUNK_TO, compare_classes, compare_counts, is_shrunk
from dataloader.dataset import read_image
from dataloader.published import published_classes, published_images, published_twins
from dataloader.readers import is_hidden, names_image, row_paths, table_rows
from utils import InputError, available_cores, check_writable, file_hash, first_few, make_parser, run_script, write_json

# The scripts read omniglot as "-dataset folder -data_dir <data_dir>/omniglot".
SPECS = {
    **CATALOG,
    "omniglot": replace(CATALOG["folder"], folders=("omniglot",), obtain="python datasets/prepare.py omniglot"),
}
# Names that other projects give to the same things, without their capitals, dashes and underscores.
OTHER_NAMES = {
    "cub": {"cub2002011", "cub200", "cubirds"},
    "tieredimagenet": {"tiered"},
    "miniimagenet": {"mini"},
    "train": {"metatrain", "base", "training"},
    "val": {"metaval", "valid", "metavalid", "validation", "metavalidation"},
    "test": {"metatest", "novel", "testing"},
}

IN_PROCESS = 1000  # files that are looked at faster than worker processes start
CHUNK = 64  # files that a worker process is given at a time

# ImageNet and the boxes of CUB have a few images of 84 pixels or less by nature, well under these shares.
MOST_SMALL, MOST_SMALL_IN_CLASS = 0.01, 0.1
# The images of CUB_200_2011 come from a web site that limited the longer side to 500 pixels: most have exactly that. The
# longer side of a bounding box is spread over all values, and is 500 only where the bird fills the picture.
UNCROPPED_SIDE, MOST_UNCROPPED, FEWEST_TO_JUDGE = 500, 0.5, 5
MOST_TWINS = 0.001  # of all images, where the published number of images in two splits is not known

SIZE_BINS = (32, 64, 84, 128, 256, 400, 500, 700, 1000)
FEW_SIZES = 5  # are listed one by one


class Look(NamedTuple):
    """What reading a file has shown."""

    digest: bytes | None = None  # SHA-256; None for a file that cannot be read
    shape: tuple[int, int, str] | None = None  # width, height, colour mode; None unless it is an image that decodes
    fault: str | None = None


class Finding(NamedTuple):
    text: str
    is_fault: bool = True


@dataclass
class Tree:
    """A data set as it lies on disk. Paths are relative to ``root``, with ``/``."""

    name: str
    spec: DatasetSpec
    data_dir: Path
    root: Path
    splits: dict[str, str] = field(default_factory=dict)  # the folder or the table of each split that is there
    files: set[str] = field(default_factory=set)  # all but the hidden ones
    folders: list[str] = field(default_factory=list)
    images: dict[str, tuple[str, str]] = field(default_factory=dict)  # split and class of each image the scripts read
    looks: dict[str, Look] = field(default_factory=dict)
    problems: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # met on the way, by kind

    def counts(self) -> dict[str, Counter[str]]:
        """Split -> class -> number of images."""
        found = {split: Counter() for split in self.splits}
        for split, label in self.images.values():
            found[split][label] += 1
        return found

    def shapes(self) -> Iterator[tuple[str, tuple[int, int, str]]]:
        """The images that decode."""
        return ((path, look.shape) for path, look in self.looks.items() if look.shape)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the data set that the flags name; returns the exit status."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("name", metavar="NAME", choices=SPECS, help=f"one of {', '.join(SPECS)}")
    parser.add_argument("-data_dir", default=str(Path(__file__).parent), help="folder that holds the data sets")
    parser.add_argument("-json", metavar="FILE", help="write all that was found to this file; - for standard output")
    args = parser.parse_args(argv)
    if args.json not in (None, "-"):
        check_writable(Path(args.json))
    report = verify(args.name, Path(args.data_dir))
    if args.json == "-":
        print(json.dumps(report, indent=1))
    else:
        print("\n".join(_as_text(report)))
        if args.json:
            write_json(Path(args.json), report)
    return 0 if report["right"] else 1


def verify(name: str, data_dir: Path) -> dict[str, Any]:
    """All that can be said about a data set, as plain values."""
    spec = SPECS[name]
    root, misspelled = _find_root(name, spec, data_dir)
    if root is None:
        where = " or ".join(str(data_dir / folder) for folder in spec.folders)
        what = "it is not there" if data_dir.is_dir() else f"there is no folder {data_dir}"
        verdict = _one_line(f"{name}: expected it in {where}; {what}. Get it: {spec.obtain}")
        return {"dataset": name, "path": None, "right": False, "verdict": verdict, "faults": [verdict], "notes": []}
    tree = Tree(name, spec, data_dir, root)
    _find_splits(tree)
    tree.problems["misspelled"] += misspelled  # last: cured from the inside, the paths of the next line still hold
    _list_files(tree)
    (_assign_folders if spec.layout == "folders" else _assign_rows)(tree)
    _look_at_files(tree)
    findings = [finding for check in CHECKS for finding in check(tree)]
    return _report(tree, findings)


# --- What lies where --------------------------------------------------------------------------------------------------


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _spelled_otherwise(parent: Path, key: str, wanted: str, *, suffix: str = "") -> Path | None:
    """A folder, or with a suffix a file, whose name is another spelling of ``wanted``."""
    names = OTHER_NAMES.get(key, set()) | {_plain(wanted), _plain(key)}
    try:
        entries = sorted(parent.iterdir())
    except OSError:  # the walk over all files reports it
        return None
    for entry in entries:
        if entry.is_file() if suffix else entry.is_dir():
            name = entry.name.removesuffix(suffix)
            if not is_hidden(entry) and entry.name.endswith(suffix) and _plain(name) in names:
                return entry
    return None


def _rename(source: Path, target: Path) -> str:
    return f"{source} is spelled in a way that the scripts do not read. Rename it: {shlex.join(['mv', str(source), str(target)])}"


def _find_root(name: str, spec: DatasetSpec, data_dir: Path) -> tuple[Path | None, list[str]]:
    """The folder of the data set, and what is wrong with its name."""
    for folder in spec.folders:
        if (data_dir / folder).is_dir():
            return data_dir / folder, []
    root = _spelled_otherwise(data_dir, name, spec.folders[0])
    if root is None:
        return None, []
    if name == "cub" and (root / "bounding_boxes.txt").is_file():
        cure = f"python datasets/prepare.py cub -source {shlex.quote(str(root))}"
        return root, [
            f"{root} is the original CUB_200_2011, neither cropped nor split. Build the data set from it: {cure}"
        ]
    return root, [_rename(root, data_dir / spec.folders[0])]


def _find_splits(tree: Tree) -> None:
    is_table = tree.spec.layout != "folders"
    parent, suffix = (tree.root / "split", ".csv") if is_table else (tree.root, "")
    if is_table and not parent.is_dir() and (tree.root / "splits").is_dir():
        parent = tree.root / "splits"
    for split in SPLITS:
        wanted = parent / (tree.spec.split_folders.get(split, split) + suffix)
        found = wanted if (wanted.is_file() if is_table else wanted.is_dir()) else None
        if found is None:
            found = _spelled_otherwise(parent, split, wanted.stem, suffix=suffix)
            tree.problems["misspelled" if found else "no split"].append(
                _rename(found, wanted) if found else str(wanted)
            )
        if found:
            tree.splits[split] = found.relative_to(tree.root).as_posix()
    if is_table and parent.name != "split":
        tree.problems["misspelled"].append(_rename(parent, tree.root / "split"))


def _list_files(tree: Tree) -> None:
    """All files and folders below the root; of the layout "folder", whose root is the data directory, below the splits."""
    tops = list(tree.splits.values()) if tree.spec.folders == (".",) else [""]
    waiting = [(top, ()) for top in tops]
    while waiting:
        folder, above = waiting.pop()
        path = tree.root / folder
        try:
            status = path.stat()
            entries = list(os.scandir(path))
        except OSError as error:
            tree.problems["unreadable"].append(f"{path} ({error.strerror})")
            continue
        here = (status.st_dev, status.st_ino)
        if here in above:
            tree.problems["broken"].append(f"{path} (a link to a folder that it lies in)")
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if is_hidden(Path(entry.name)):
                continue
            try:
                if entry.is_dir():
                    tree.folders.append(name)
                    waiting.append((name, (*above, here)))
                elif entry.is_file():
                    tree.files.add(name)
                else:
                    what = "a link that leads nowhere" if entry.is_symlink() else "neither a file nor a folder"
                    tree.problems["broken"].append(f"{entry.path} ({what})")
            except OSError as error:
                tree.problems["unreadable"].append(f"{entry.path} ({error.strerror})")


def _assign_folders(tree: Tree) -> None:
    split_of = {folder: split for split, folder in tree.splits.items()}
    filled: set[str] = set()
    places: dict[tuple[str, str], tuple[str, str]] = {}  # one object for each, however many images it has
    for path in sorted(tree.files):
        folder, _, rest = path.partition("/")
        if folder in split_of and names_image(Path(path)):
            if rest.count("/") == 1:
                label = rest.partition("/")[0]
                place = split_of[folder], label
                tree.images[path] = places.setdefault(place, place)
                filled.add(f"{folder}/{label}")
            else:
                tree.problems["misplaced"].append(path)
    for path in sorted(tree.folders):
        folder, _, rest = path.partition("/")
        if folder in split_of and rest and "/" not in rest and path not in filled:
            tree.problems["empty"].append(path)
        if names_image(Path(path)) and rest.count("/") != 0:
            tree.problems["broken"].append(f"{tree.root / path} (a folder with the name of an image)")


def _assign_rows(tree: Tree) -> None:
    for split, table in tree.splits.items():
        try:
            for place, file, label in table_rows(tree.root / table):
                _assign_row(tree, split, place, file, label)
        except InputError as error:
            tree.problems["table"].append(str(error))
        except OSError as error:
            tree.problems["table"].append(
                f"{tree.root / table} cannot be read ({error.strerror}). Check its permissions"
            )
    for path in tree.folders:
        if names_image(Path(path)):
            tree.problems["broken"].append(f"{tree.root / path} (a folder with the name of an image)")


def _assign_row(tree: Tree, split: str, place: str, file: str, label: str) -> None:
    path = next((p for p in map(Path.as_posix, row_paths(tree.spec, file, label)) if p in tree.files), None)
    if path is None:
        tree.problems["no file"].append(f"{place}: {file}")
    elif tree.images.setdefault(path, (split, label)) != (split, label):
        earlier = " ".join(tree.images[path])
        tree.problems["two rows"].append(f"{place}: {file} is in {split} {label}, and in {earlier}")


# --- Reading every file -----------------------------------------------------------------------------------------------


def _look_at_files(tree: Tree) -> None:
    """Decode and hash the images; with a manifest to hold them against, hash the other files too."""
    others = tree.files - tree.images.keys() - {manifest.NAME} if manifest.NAME in tree.files else set()
    paths = [*tree.images, *sorted(others)]
    shapes: dict[Any, Any] = {}  # one object for each shape, however many images have it
    bar = tqdm(
        desc=f"reading {tree.name}",
        total=len(paths),
        unit="file",
        leave=False,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        disable=not sys.stderr.isatty() and len(paths) < IN_PROCESS,
    )
    look = partial(_look, str(tree.root), frozenset(others))
    with bar, _mapping(len(paths)) as map_all:
        for path, seen in zip(paths, map_all(look, paths), strict=True):
            tree.looks[path] = seen._replace(shape=shapes.setdefault(seen.shape, seen.shape))
            bar.update()


@contextmanager
def _mapping(count: int) -> Iterator[Callable[..., Iterable[Look]]]:
    """A ``map`` over worker processes, or over none where there is little to do."""
    workers = available_cores()
    if workers == 1 or count < IN_PROCESS:
        yield map
        return
    pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        yield partial(pool.map, chunksize=CHUNK)
    finally:
        pool.shutdown(cancel_futures=True)


def _look(root: str, not_images: frozenset[str], name: str) -> Look:
    path = os.path.join(root, name)
    try:
        if name in not_images:
            return Look(bytes.fromhex(file_hash(path)))
        content = Path(path).read_bytes()
    except OSError as error:
        return Look(fault=f"it cannot be read ({error.strerror})")
    digest = hashlib.sha256(content).digest()
    try:
        with Image.open(io.BytesIO(content)) as image:
            shape = (*image.size, image.mode)
        read_image(path, content=io.BytesIO(content), advice="")
        return Look(digest, shape)
    except Exception as error:  # whatever a broken file makes Pillow raise
        cause = error.__cause__ or error
        reason = re.sub(r" <_io\.BytesIO[^>]*>", "", str(cause)).replace(f" in {path}", "")
        return Look(digest, fault=reason or type(cause).__name__)


# --- Checks -----------------------------------------------------------------------------------------------------------


def _many(what: str, where: Sequence[str], cure: str) -> Iterator[Finding]:
    """One fault for any number of the same."""
    if where:
        first = f": {where[0]}" if len(where) == 1 else f": {len(where)}, first {where[0]}"
        yield Finding(f"{what}{first}. {cure}")


def check_places(tree: Tree) -> Iterator[Finding]:
    yield from map(Finding, tree.problems["misspelled"])
    missing = tree.problems["no split"]
    if tree.name == "folder" and tree.splits:  # a script needs only those that it reads
        if missing:
            yield Finding(f"there is no {first_few(missing)}; scripts that read it will say so", is_fault=False)
    else:
        yield from _many("missing, with a whole split", missing, f"Get the data set again: {tree.spec.obtain}")


def check_reading(tree: Tree) -> Iterator[Finding]:
    yield from map(Finding, tree.problems["table"])
    yield from _many("cannot be read", tree.problems["unreadable"], "Check the permissions")
    yield from _many("no file where one should be", tree.problems["broken"], "Put the file there, or remove the entry")


def check_classes(tree: Tree) -> Iterator[Finding]:
    counts = tree.counts()
    for one, other in combinations(counts, 2):
        both = sorted(counts[one].keys() & counts[other].keys())
        yield from _many(
            f"classes both in {one} and in {other}", both, "Each class belongs in one split; remove the other"
        )
    home = {label: split for split, labels in published_classes(tree.name).items() for label in labels}
    for split, found in counts.items():
        missing, unknown = compare_classes(tree.name, split, found)
        strayed = [f"{label} belongs in {home[label]}" for label in unknown if label in home]
        yield from _many(f"classes in {split} that belong in another split", strayed, "Move them")
        unknown = [label for label in unknown if label not in home]
        yield from _many(f"classes missing from {split}", missing, f"Get the data set again: {tree.spec.obtain}")
        yield from _many(f"classes in {split} that the published split does not have", unknown, "Rename or remove them")


def check_leaks(tree: Tree) -> Iterator[Finding]:
    yield from _many("images in two rows", tree.problems["two rows"], "Remove the wrong row")
    across: dict[tuple[str, str], list[list[str]]] = defaultdict(list)  # pair of classes -> images they share
    within = []
    for paths in _same_content(tree):
        places = sorted({tree.images[path] for path in paths})
        pairs = {tuple(sorted((a[1], b[1]))) for a, b in combinations(places, 2) if a[0] != b[0]}
        for pair in pairs:
            across[pair].append(paths)
        if not pairs:
            within.append(paths)
    published = published_twins(tree.name)
    number = sum(map(len, across.values()))
    if published is None:  # not counted: a few may be in the published set
        leaks = across if number > MOST_TWINS * len(tree.images) else {}
    else:
        leaks = {pair: same for pair, same in across.items() if len(same) > published.get(pair, 0)}
    where = [" = ".join(paths) for same in leaks.values() for paths in same]
    yield from _many("the same image in two splits", where, "Remove it from one of them, or get the data set again")
    if across and not leaks:
        known = ", as in the published set" if published else ""
        yield Finding(f"images that lie in two splits{known}: {number}", is_fault=False)
    if within:
        first = " = ".join(within[0][:3])
        yield Finding(f"images that occur more than once within a split: {len(within)}, first {first}", is_fault=False)


def _same_content(tree: Tree) -> list[list[str]]:
    """The paths of images that have the same bytes, in groups of two or more."""
    first: dict[bytes, str] = {}
    groups: dict[bytes, list[str]] = {}
    for path in tree.images:
        digest = tree.looks[path].digest
        if digest is not None and first.setdefault(digest, path) != path:
            groups.setdefault(digest, [first[digest]]).append(path)
    return list(groups.values())


def check_images(tree: Tree) -> Iterator[Finding]:
    broken = [f"{path} ({look.fault})" for path, look in tree.looks.items() if look.fault]
    yield from _many(
        "images that cannot be decoded", broken, f"Replace them, or get the data set again: {tree.spec.obtain}"
    )


def check_rows(tree: Tree) -> Iterator[Finding]:
    yield from _many("rows without a file", tree.problems["no file"], f"Get the images again: {tree.spec.obtain}")
    if tree.spec.layout == "folders" or tree.problems["table"] or tree.problems["no split"]:
        return
    idle = sorted(path for path in tree.files - tree.images.keys() if names_image(Path(path)))
    if len(tree.images) < sum(published_images(tree.name, split) or 0 for split in SPLITS):
        yield from _many("images without a row in a table", idle, f"Get the tables again: {tree.spec.obtain}")
    elif idle:
        yield Finding(
            f"images that no table names, which changes nothing: {len(idle)}, first {idle[0]}", is_fault=False
        )


def check_counts(tree: Tree) -> Iterator[Finding]:
    cure = f"Get the data set again: {tree.spec.obtain}"
    for split, found in tree.counts().items():
        wrong = [
            f"{label} has {here} of {published}"
            for label, (here, published) in compare_counts(tree.name, split, found).items()
        ]
        yield from _many(f"classes in {split} with too few or too many images", wrong, cure)
        here, published = sum(found.values()), published_images(tree.name, split)
        if published not in (None, here) and not wrong and not any(compare_classes(tree.name, split, found)):
            yield Finding(f"{split} has {here} images, the published split {published}. {cure}")
    yield from _many(
        "class folders without an image", tree.problems["empty"], "Fill or remove them; no script reads past them"
    )
    yield from _many(
        "images where no script looks",
        tree.problems["misplaced"],
        "They belong in <split>/<class>/; move or remove them",
    )


def check_resolution(tree: Tree) -> Iterator[Finding]:
    if not tree.spec.large_images:
        return
    small = [path for path, shape in tree.shapes() if is_shrunk(shape[:2])]
    images, of_class = Counter(tree.images.values()), Counter(tree.images[path] for path in small)
    classes = sorted(label for label, number in of_class.items() if number > MOST_SMALL_IN_CLASS * images[label])
    if len(small) > MOST_SMALL * len(tree.images) or classes:
        which = f"; classes with many of them: {first_few([' '.join(label) for label in classes])}" if classes else ""
        yield Finding(
            f"images of {SHRUNK_TO} pixels or less, where the published ones are larger: {len(small)} of {len(tree.images)}, "
            f"first {small[0]}{which}. This costs 8-10 points of accuracy; get the original size: {tree.spec.obtain}"
        )
    elif small:
        yield Finding(f"images of {SHRUNK_TO} pixels or less, a few of which are natural: {len(small)}", is_fault=False)


def check_cropped(tree: Tree) -> Iterator[Finding]:
    if tree.name != "cub":
        return
    sides: dict[tuple[str, str], list[int]] = defaultdict(list)
    for path, shape in tree.shapes():
        sides[tree.images[path]].append(max(shape[:2]))
    whole = [
        " ".join(label)
        for label, found in sorted(sides.items())
        if len(found) >= FEWEST_TO_JUDGE and found.count(UNCROPPED_SIDE) > MOST_UNCROPPED * len(found)
    ]
    cure = "Uncropped images cost 15 points; crop them to their bounding boxes: python datasets/prepare.py cub"
    yield from _many("classes whose images look uncropped, with a longer side of 500 pixels", whole, cure)


def check_pixels(tree: Tree) -> Iterator[Finding]:
    if edge := tree.spec.pixels:
        wrong = [
            f"{path} ({shape[0]}x{shape[1]} {shape[2]})"
            for path, shape in tree.shapes()
            if shape != (edge, edge, "RGB")
        ]
        yield from _many(f"images that are not {edge}x{edge} RGB", wrong, f"Get the data set again: {tree.spec.obtain}")


def check_manifest(tree: Tree) -> Iterator[Finding]:
    if manifest.NAME not in tree.files:
        return
    path = tree.root / manifest.NAME
    again = f"Build it again: {tree.spec.obtain}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        recorded = {split: Counter(entry["per_class"]) for split, entry in content["splits"].items()}
        name, whole = content["dataset"], content["sha256"]
    except Exception as error:  # whatever a file that is no manifest makes the lines above raise
        yield Finding(f"{path} is no manifest of prepare.py ({type(error).__name__}: {error}). {again}")
        return
    if name != tree.name:
        yield Finding(f"{path} is of the data set {name}, not of {tree.name}. {again}")
        return
    counts = tree.counts()
    differing = [
        f"{split} {label} has {counts.get(split, {}).get(label, 0)} images, not {recorded.get(split, {}).get(label, 0)}"
        for split in SPLITS
        for label in sorted(counts.get(split, {}).keys() | recorded.get(split, {}).keys())
        if counts.get(split, {}).get(label, 0) != recorded.get(split, {}).get(label, 0)
    ]
    yield from _many("counts differ from those in manifest.json", differing, again)
    digests = {path: look.digest.hex() for path, look in tree.looks.items() if look.digest}
    if not differing and manifest.tree_hash(digests) != whole:
        yield Finding(f"files were changed, renamed, added or removed since prepare.py wrote {path}. {again}")


def check_strays(tree: Tree) -> Iterator[Finding]:
    tables = set(tree.splits.values())
    strays = sorted(path for path in tree.files - {manifest.NAME} - tables if not names_image(Path(path)))
    if strays:
        yield Finding(f"files that no script reads: {len(strays)}, first {strays[0]}", is_fault=False)


def check_overlap(tree: Tree) -> Iterator[Finding]:
    other = {"miniimagenet": "tieredimagenet", "tieredimagenet": "miniimagenet"}.get(tree.name)
    if other and any((tree.data_dir / folder).is_dir() for folder in SPECS[other].folders):
        shared = published_classes("miniimagenet")["train"].keys() & published_classes("tieredimagenet")["test"].keys()
        yield Finding(
            f"{len(shared)} training classes of miniimagenet are test classes of tieredimagenet, which lies beside it: "
            f"never evaluate an encoder of one on the other ({', '.join(sorted(shared))})",
            is_fault=False,
        )


CHECKS: tuple[Callable[[Tree], Iterator[Finding]], ...] = (  # the most harmful first
    check_places,
    check_reading,
    check_classes,
    check_leaks,
    check_cropped,
    check_resolution,
    check_pixels,
    check_images,
    check_rows,
    check_counts,
    check_manifest,
    check_overlap,
    check_strays,
)


# --- The report -------------------------------------------------------------------------------------------------------


def _report(tree: Tree, findings: Sequence[Finding]) -> dict[str, Any]:
    faults = [_one_line(finding.text) for finding in findings if finding.is_fault]
    counts = tree.counts()
    if not tree.images and not faults:
        faults = [_one_line(f"{tree.root} holds no images. Get the data set: {tree.spec.obtain}")]
    classes = "/".join(str(len(counts[split])) for split in counts)
    what = (
        f"is right: {classes} classes, {len(tree.images)} images"
        if not faults
        else f"is not right; faults: {len(faults)}"
    )
    return {
        "dataset": tree.name,
        "path": str(tree.root),
        "right": not faults,
        "verdict": _one_line(f"{tree.name} in {tree.root} {what}"),
        "faults": faults,
        "notes": [_one_line(finding.text) for finding in findings if not finding.is_fault],
        "splits": {
            split: {"classes": len(found), "images": sum(found.values()), "per_class": dict(sorted(found.items()))}
            for split, found in counts.items()
        },
        "sizes": _histogram(Counter(shape[:2] for _, shape in tree.shapes())),
        "modes": dict(Counter(shape[2] for _, shape in tree.shapes()).most_common()),
    }


def _histogram(sizes: Counter[tuple[int, int]]) -> dict[str, int]:
    """The sizes themselves where they are few, else ranges of the longer side, each with the number of images."""
    if len(sizes) <= FEW_SIZES:
        return {f"{width}x{height}": number for (width, height), number in sizes.most_common()}
    edges = (0, *SIZE_BINS)
    found = {f"{low + 1}-{high}": 0 for low, high in zip(edges, SIZE_BINS, strict=False)} | {f"{SIZE_BINS[-1] + 1}-": 0}
    ranges = list(found)
    for (width, height), number in sizes.items():
        found[ranges[sum(max(width, height) > edge for edge in SIZE_BINS)]] += number
    return {span: number for span, number in found.items() if number}


def _as_text(report: dict[str, Any]) -> list[str]:
    lines = []
    for split, found in report.get("splits", {}).items():
        lines.append(f"{split:5} {found['classes']:5} classes {found['images']:8} images")
    most = max(report.get("sizes", {}).values(), default=0)
    for size, number in report.get("sizes", {}).items():
        lines.append(f"{size:>9} px {number:8}  {'#' * -(-30 * number // most)}")
    if report.get("modes"):
        lines.append("colour modes: " + ", ".join(f"{mode} {number}" for mode, number in report["modes"].items()))
    lines += [f"note: {note}" for note in report["notes"]]
    if report["path"] is not None:
        lines += [f"fault: {fault}" for fault in report["faults"]]
    return [*lines, report["verdict"]]


def _one_line(text: str) -> str:
    return " ".join(text.split()).encode(errors="backslashreplace").decode()


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
