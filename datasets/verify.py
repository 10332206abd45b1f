"""Check a data set: are the files on disk the published ones, complete, and without leaks between the splits?

    python datasets/verify.py fc100                         the whole of datasets/FC100
    python datasets/verify.py cub -data_dir /data -json -   as JSON on standard output

Every image is decoded and every file hashed. Nothing is changed. The last line is the verdict; the faults before it are
sorted by the harm they do, each with its cure. Notes are informational. The exit status is 0 if the data set is right.
"""

import io
import json
import os
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from folders import MANIFEST, tree_hash

from dataloader.catalog import CATALOG, SPLITS, DatasetSpec
from dataloader.checks import SHRUNK_TO, compare_classes, compare_counts, is_shrunk
from dataloader.images import ImageFacts, decode_image, reason
from dataloader.published import published_classes, published_images, published_twins
from dataloader.readers import MISSING_SPLIT, Problem, find_root, is_hidden, read_split
from engine.command_line import make_parser
from engine.loading import progress_bar
from utils import InputError, available_cores, first_few, printable, run_script, write_output

UNREADABLE = "cannot be read"
# The scripts read omniglot as "-dataset folder -data_dir <data_dir>/omniglot".
OMNIGLOT = replace(CATALOG["folder"], folders=("omniglot",), obtain="python datasets/prepare.py omniglot")
SPECS = {**CATALOG, "omniglot": OMNIGLOT}

IN_PROCESS = 1000  # files that are read faster than worker processes start
CHUNK = 64  # files that a worker process is given at a time

# ImageNet and the boxes of CUB have a few images of 84 pixels or less by nature, well under these shares.
MOST_SMALL, MOST_SMALL_IN_CLASS = 0.01, 0.1
# The images of CUB_200_2011 come from a web site that limited the longer side to 500 pixels: most have exactly that. The
# longer side of a bounding box is spread over all values, and is 500 only where the bird fills the picture.
UNCROPPED_SIDE, MOST_UNCROPPED, FEWEST_TO_JUDGE = 500, 0.5, 5
MOST_TWINS = 0.001  # of all images, where the published number of images in two splits is not known


class FileRecord(NamedTuple):
    """What reading a file has shown."""

    digest: bytes | None = None  # SHA-256; None for a file that cannot be read
    facts: ImageFacts | None = None  # None unless it is an image that decodes
    fault: str | None = None


@dataclass
class Tree:
    """A data set on disk, and what is found about it. Paths are relative to ``root``, with ``/``."""

    name: str
    spec: DatasetSpec
    data_dir: Path
    root: Path
    images: dict[str, tuple[str, str]] = field(default_factory=dict)  # split and class of each image the scripts read
    counts: dict[str, Counter[str]] = field(default_factory=dict)  # split -> class -> images
    others: list[str] = field(default_factory=list)  # the other files, except hidden ones
    records: dict[str, FileRecord] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)  # of the readers
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def again(self) -> str:
        return f"Get the data set again: {self.spec.obtain}"

    def facts(self) -> Iterator[tuple[str, ImageFacts]]:
        """The images that decode."""
        return ((path, self.records[path].facts) for path in self.images if self.records[path].facts)

    def fault(self, what: str, where: Sequence[str], cure: str) -> None:
        """Add one fault for any number of the same."""
        if where:
            self.faults.append(_counted(what, where) + (f". {cure}" if cure else ""))

    def note(self, what: str, where: Sequence[str]) -> None:
        if where:
            self.notes.append(_counted(what, where))


def _counted(what: str, where: Sequence[str]) -> str:
    return f"{what}: {where[0]}" if len(where) == 1 else f"{what}: {len(where)}, first {where[0]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("name", metavar="NAME", choices=SPECS, help=f"one of {', '.join(SPECS)}")
    parser.add_argument(
        "-data_dir", metavar="DIR", default=str(Path(__file__).parent), help="folder that holds the data sets"
    )
    parser.add_argument("-json", metavar="FILE", help="write the full report to this file; - for standard output")
    args = parser.parse_args(argv)
    report = verify(args.name, Path(args.data_dir))
    text = json.dumps(report, indent=1)
    print(text if args.json == "-" else "\n".join(_as_text(report)))
    if args.json not in (None, "-"):
        write_output(Path(args.json), text.encode())
    return 0 if report["right"] else 1


def verify(name: str, data_dir: Path) -> dict[str, Any]:
    """The report on a data set, as plain values."""
    spec = SPECS[name]
    root = find_root(spec, data_dir)
    if root is None:
        where = " or ".join(str(data_dir / name) for name in spec.folders) if data_dir.is_dir() else data_dir
        verdict = printable(f"{name} is missing: there is no folder {where}. Set -data_dir, or get it: {spec.obtain}")
        return {"dataset": name, "path": None, "right": False, "verdict": verdict, "faults": [verdict], "notes": []}
    tree = Tree(name, spec, data_dir, root)
    _list_images(tree)
    _list_others(tree)
    _read_files(tree)
    for check in CHECKS:
        check(tree)
    return _report(tree)


def _list_images(tree: Tree) -> None:
    """The images that the scripts read, as the scripts list them."""
    for split in SPLITS:
        problems: list[Problem] = []
        try:
            paths, labels, classes = read_split(tree.spec, str(tree.data_dir), split, report=problems.append)
        except InputError as error:
            problems.append(Problem(UNREADABLE, str(error), ""))
        tree.problems += problems
        if any(problem.kind in (UNREADABLE, MISSING_SPLIT) for problem in problems):
            continue
        tree.counts[split] = Counter()
        for path, label in zip(paths, labels, strict=True):
            name, place = Path(path).relative_to(tree.root).as_posix(), (split, classes[label])
            earlier = tree.images.setdefault(name, place)
            if earlier == place:
                tree.counts[split][place[1]] += 1
            else:
                text = f"{name} is in {' '.join(earlier)} and in {' '.join(place)}"
                tree.problems.append(Problem("images in two splits of the tables", text, "Remove the wrong row"))


def _list_others(tree: Tree) -> None:
    """Every other file below the root; with "folder", whose root is the data directory, below the splits."""
    for top in [tree.root / split for split in tree.counts] if tree.spec.folders == (".",) else [tree.root]:
        for folder, folders, files in os.walk(top):
            folders[:] = sorted(name for name in folders if not is_hidden(Path(name)))
            paths = [Path(folder, name).relative_to(tree.root) for name in sorted(files) if not is_hidden(Path(name))]
            tree.others += [path.as_posix() for path in paths if path.as_posix() not in tree.images]


def _read_files(tree: Tree) -> None:
    """Decode and hash the images, and hash the other files if there is a manifest of them; pipes and dead links are faults."""
    files = [path for path in tree.others if path != MANIFEST]
    hashed = files if MANIFEST in tree.others else [path for path in files if not (tree.root / path).is_file()]
    paths = [*tree.images, *hashed]
    known: dict[Any, Any] = {}  # one object for equal facts, however many images have them
    is_small = len(paths) < IN_PROCESS
    read = partial(_read_file, str(tree.root), frozenset(hashed))
    # The pool starts no process before it is used; its processes leave Ctrl-C to this one.
    pool = ProcessPoolExecutor(available_cores(), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    bar = progress_bar(f"reading {tree.name}", total=len(paths))
    try:
        records = map(read, paths) if is_small else pool.map(read, paths, chunksize=CHUNK)
        for path, record in zip(paths, records, strict=True):
            tree.records[path] = record._replace(facts=known.setdefault(record.facts, record.facts))
            bar.update()
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)


def _read_file(root: str, not_images: frozenset[str], name: str) -> FileRecord:
    path = os.path.join(root, name)
    try:
        if not os.path.isfile(path):
            return FileRecord(fault="not a regular file" if os.path.exists(path) else "a broken link")
        content = Path(path).read_bytes()
    except OSError as error:
        return FileRecord(fault=error.strerror)
    digest = sha256(content).digest()
    try:
        return FileRecord(digest, None if name in not_images else decode_image(io.BytesIO(content))[1])
    except Exception as error:  # whatever a broken file makes Pillow raise
        return FileRecord(digest, fault=reason(error))


def check_listing(tree: Tree) -> None:
    """What the readers met, by kind; a script needs only the splits that it reads."""
    kinds: dict[str, list[Problem]] = defaultdict(list)
    for problem in tree.problems:
        kinds[problem.kind].append(problem)
    for kind, problems in kinds.items():
        texts = [problem.text for problem in problems]
        is_optional = kind == MISSING_SPLIT and tree.spec.folders == (".",) and tree.counts
        if problems[0].is_fault and not is_optional:
            tree.fault(kind, texts, problems[0].cure)
        elif kind != "files in class folders that are not images":  # check_strays counts them
            tree.note(kind, texts)


def check_classes(tree: Tree) -> None:
    for (one, found), (other, found_too) in combinations(tree.counts.items(), 2):
        both = sorted(found.keys() & found_too.keys())
        tree.fault(f"classes both in {one} and in {other}", both, "Leave each class in one split")
    home = {label: split for split, labels in published_classes(tree.name).items() for label in labels}
    for split, found in tree.counts.items():
        missing, unknown = compare_classes(tree.name, split, found)
        strayed = [f"{label} belongs in {home[label]}" for label in unknown if label in home]
        unknown = [label for label in unknown if label not in home]
        tree.fault(f"classes in {split} that belong in another split", strayed, "Move them")
        tree.fault(f"classes missing from {split}", missing, tree.again)
        tree.fault(f"classes in {split} that the published split does not have", unknown, "Rename or remove them")


def check_leaks(tree: Tree) -> None:
    same: dict[bytes, list[str]] = defaultdict(list)
    for path in tree.images:
        if digest := tree.records[path].digest:
            same[digest].append(path)
    across: dict[tuple[str, str], list[str]] = defaultdict(list)  # pair of classes -> images they share
    within = []
    for paths in same.values():
        places = {tree.images[path] for path in paths}
        pairs = {tuple(sorted((a[1], b[1]))) for a, b in combinations(places, 2) if a[0] != b[0]}
        for pair in pairs:
            across[pair].append(" = ".join(paths))
        if len(paths) > 1 and not pairs:
            within.append(" = ".join(paths[:3]))
    published, number = published_twins(tree.name), sum(map(len, across.values()))
    if published is None:  # not counted: a few may be in the published set
        leaks = across if number > MOST_TWINS * len(tree.images) else {}
    else:
        leaks = {pair: found for pair, found in across.items() if len(found) > published.get(pair, 0)}
    where = [text for found in leaks.values() for text in found]
    tree.fault("the same image in two splits", where, "Remove it from one of them, or get the data set again")
    if across and not leaks:
        tree.note(f"images in two splits{', as in the published set' if published else ''}", [str(number)])
    tree.note("images that occur more than once within a split", within)


def check_cropped(tree: Tree) -> None:
    sides: dict[tuple[str, str], list[int]] = defaultdict(list)
    for path, facts in tree.facts() if tree.name == "cub" else ():
        sides[tree.images[path]].append(max(facts.shape[:2]))
    judged = {" ".join(label): found for label, found in sorted(sides.items()) if len(found) >= FEWEST_TO_JUDGE}
    whole = [label for label, found in judged.items() if found.count(UNCROPPED_SIDE) > MOST_UNCROPPED * len(found)]
    cure = "Uncropped images cost 15 points; crop them to their bounding boxes: python datasets/prepare.py cub"
    tree.fault("classes whose images look uncropped, with a longer side of 500 pixels", whole, cure)


def check_resolution(tree: Tree) -> None:
    small = [path for path, facts in tree.facts() if tree.spec.large_images and is_shrunk(facts.shape[:2])]
    images, of_class = Counter(tree.images.values()), Counter(tree.images[path] for path in small)
    classes = sorted(" ".join(label) for label, n in of_class.items() if n > MOST_SMALL_IN_CLASS * images[label])
    if len(small) > MOST_SMALL * len(tree.images) or classes:
        which = f"; classes with many of them: {first_few(classes)}" if classes else ""
        what = f"images of {SHRUNK_TO} pixels or less, where the published ones are larger"
        where = f"{len(small)} of {len(tree.images)}, first {small[0]}{which}"
        tree.fault(what, [where], f"This costs 8-10 points of accuracy; get the original size: {tree.spec.obtain}")
    elif small:
        tree.note(f"images of {SHRUNK_TO} pixels or less, a few of which are natural", [str(len(small))])


def check_pixels(tree: Tree) -> None:
    published = (tree.spec.pixels, tree.spec.pixels, "RGB")
    wrong = [(path, facts.shape) for path, facts in tree.facts() if tree.spec.pixels and facts.shape != published]
    texts = ["{} ({}x{} {})".format(path, *shape) for path, shape in wrong]
    tree.fault("images that are not {}x{} {}".format(*published), texts, tree.again)


def check_images(tree: Tree) -> None:
    broken = [f"{path} ({record.fault})" for path, record in tree.records.items() if record.fault]
    tree.fault("files that cannot be read", broken, "Replace or remove them")


def check_counts(tree: Tree) -> None:
    for split, found in tree.counts.items():
        differing = compare_counts(tree.name, split, found).items()
        wrong = [f"{label} has {here} of {published}" for label, (here, published) in differing]
        tree.fault(f"classes in {split} with too few or too many images", wrong, tree.again)
        here, published = sum(found.values()), published_images(tree.name, split)
        if published not in (None, here) and not wrong and not any(compare_classes(tree.name, split, found)):
            tree.faults.append(f"{split} has {here} images, the published split {published}. {tree.again}")


def check_manifest(tree: Tree) -> None:
    if MANIFEST not in tree.others:
        return
    path, cure = tree.root / MANIFEST, f"Build it again: {tree.spec.obtain}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name, recorded = content["dataset"], content["sha256"]
    except Exception as error:  # whatever another file makes the lines above raise
        tree.faults.append(f"{path} is not a manifest of prepare.py ({type(error).__name__}: {error}). {cure}")
        return
    digests = {path: record.digest.hex() for path, record in tree.records.items() if record.digest}
    if name != tree.name:
        tree.faults.append(f"{path} is of the data set {name}, not of {tree.name}. {cure}")
    elif tree_hash(digests) != recorded:
        tree.faults.append(f"files were changed, renamed, added or removed since prepare.py wrote {path}. {cure}")


def check_overlap(tree: Tree) -> None:
    other = {"miniimagenet": "tieredimagenet", "tieredimagenet": "miniimagenet"}.get(tree.name)
    if other and find_root(SPECS[other], tree.data_dir):
        shared = published_classes("miniimagenet")["train"].keys() & published_classes("tieredimagenet")["test"].keys()
        tree.notes.append(
            f"{len(shared)} training classes of miniimagenet are test classes of tieredimagenet, which is in the same folder: "
            f"never evaluate an encoder of one on the other ({', '.join(sorted(shared))})"
        )


def check_conversions(tree: Tree) -> None:
    how = "read as they are stored" if tree.spec.is_published else "turned upright"
    transparent = [path for path, facts in tree.facts() if facts.is_transparent]
    turned = [path for path, facts in tree.facts() if facts.is_turned]
    tree.note("images with transparent pixels, which are read as white", transparent)
    tree.note(f"images whose EXIF orientation asks for a turn, which are {how}", turned)


def check_strays(tree: Tree) -> None:
    tables = {f"split/{split}.csv" for split in SPLITS} if tree.spec.layout != "folders" else set()
    tree.note("files that no script reads", [path for path in tree.others if path not in (*tables, MANIFEST)])


CHECKS = (  # the most harmful first
    *(check_listing, check_classes, check_leaks, check_cropped, check_resolution, check_pixels),
    *(check_images, check_counts, check_manifest, check_overlap, check_conversions, check_strays),
)


def _report(tree: Tree) -> dict[str, Any]:
    classes = "/".join(str(len(found)) for found in tree.counts.values())
    right = f"right: {classes} classes, {len(tree.images)} images"
    what = f"not right; faults: {len(tree.faults)}" if tree.faults else right
    sizes, modes = (Counter(facts.shape[part] for _, facts in tree.facts()) for part in (slice(2), 2))
    return {
        "dataset": tree.name,
        "path": str(tree.root),
        "right": not tree.faults,
        "verdict": printable(f"{tree.name} in {tree.root} is {what}"),
        "faults": [printable(fault) for fault in tree.faults],
        "notes": [printable(note) for note in tree.notes],
        "splits": {
            split: {"classes": len(found), "images": sum(found.values()), "per_class": dict(sorted(found.items()))}
            for split, found in tree.counts.items()
        },
        "sizes": {f"{width}x{height}": n for (width, height), n in sizes.most_common()},
        "modes": dict(modes.most_common()),
    }


def _as_text(report: dict[str, Any]) -> list[str]:
    splits = report.get("splits", {}).items()
    lines = [f"{split:5} {found['classes']:5} classes {found['images']:8} images" for split, found in splits]
    for what in ("sizes", "modes"):
        if found := report.get(what):
            lines.append(f"{what}: {first_few([f'{value} ({number})' for value, number in found.items()])}")
    lines += [f"note: {note}" for note in report["notes"]]
    lines += [f"fault: {fault}" for fault in report["faults"] if report["path"]]
    return [*lines, report["verdict"]]


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
