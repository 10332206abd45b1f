"""Build a data set from its original source, in the layout that the scripts read.

    python datasets/prepare.py fc100                                    downloads CIFAR-100
    python datasets/prepare.py cub -source CUB_200_2011.tgz
    python datasets/prepare.py miniimagenet                             downloads timm/mini-imagenet from Hugging Face
    python datasets/prepare.py tieredimagenet -source ILSVRC2012_img_train.tar

Sources may be archives or folders; archives are read in place. Images are copied byte for byte unless they are cropped or
resized. The data set is built in ``.<folder>.part`` and appears under its name when it is complete; an interrupted run
resumes. Its ``manifest.json`` records what it was built from.
"""

import io
import json
import os
import shutil
import sys
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from download import download, hub_parquet
from folders import MANIFEST, exclusive, remove_empty, split_counts, tree_hash
from PIL import Image
from recipes import RECIPES
from recipes.common import Plan, Target
from sources import ConcatSource, Parquet, Source, open_source

from dataloader.images import reason
from engine.command_line import make_parser
from engine.loading import progress_bar
from utils import InputError, available_cores, first_few, number_at_least, run_script, status, warn

RECIPE = 1  # to be increased when the same source gives other files
JPEG_QUALITY = 95  # of images that are cropped or resized
STATE = "prepare.json"  # in the unfinished folder: what it is being built from
DOWNLOADS = "downloads"  # in the unfinished folder
HUB = "hf://datasets/"


def prepare(name: str, given: Sequence[str], out: Path, options: dict[str, Any], *, dry_run: bool = False) -> None:
    """Build ``RECIPES[name]`` below ``out``, from the sources given or from its download.

    The options are ``crop`` and ``shorter_side``, None where a data set has no choice, and ``allow_missing``.
    """
    target, work = out / RECIPES[name].folder, out / f".{RECIPES[name].folder}.part"
    if _is_complete(target, options):
        return
    if dry_run:
        _dry_run(name, given, target, work, options)
        return
    with exclusive(target):
        if _is_complete(target, options):  # another process may have built it by now
            return
        work.mkdir(exist_ok=True)
        try:
            plan = _build(name, given, work, options)
        except BaseException:
            remove_empty(work)
            if work.is_dir() and os.listdir(work) == [STATE]:  # nothing to resume from
                shutil.rmtree(work)
            raise
        remove_empty(target)
        work.rename(target)
    print(f"{target} is in place: {_summary(plan)}. Check it: python datasets/verify.py {name}")


def _build(name: str, given: Sequence[str], work: Path, options: dict[str, Any]) -> Plan:
    source = _open(name, given, work)
    state = {"dataset": name, "recipe": RECIPE, "options": options, "source": source.where}
    _resume_or_clear(work, state)
    plan = _plan(name, source, options)
    if plan.faults:
        found = f"{source.where} has {first_few(plan.faults)}"
        if not options["allow_missing"]:
            raise InputError(f"{name} would be incomplete: {found}. Get a complete source, or set -allow_missing")
        warn(f"{name} will be incomplete: {found}")
    for note in plan.notes:
        status(f"note: {note}")
    digests = _write_images(source, plan, work, options["shorter_side"] or 0)
    for path, text in plan.tables.items():
        digests[path] = _write(work / path, text.encode())
    _remove_others(work, digests)
    per_class = {split: Counter(image.label for image in images) for split, images in plan.splits().items()}
    splits = {split: split_counts(counts) for split, counts in per_class.items()}
    record = {**state, "notes": plan.notes, "lacks": plan.faults, "splits": splits, "sha256": tree_hash(digests)}
    _write(work / MANIFEST, json.dumps(record, indent=1).encode())
    (work / STATE).unlink()
    return plan


def _is_complete(target: Path, options: dict[str, Any]) -> bool:
    if not target.is_dir() or not any(target.iterdir()):
        return False
    advice = "Remove it to rebuild, or choose another -out"
    try:
        found = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        earlier = dict(found["options"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{target} exists and was not built by this script. {advice}") from None
    if earlier != options or found.get("recipe") != RECIPE:
        before, now = (", ".join(f"{key} {value}" for key, value in all_.items()) for all_ in (earlier, options))
        raise InputError(f"{target} was built with other options ({before}; now {now}). {advice}")
    print(f"{target} is complete, built from {found.get('source')}: nothing to do (remove it to rebuild)")
    return True


def _open(name: str, given: Sequence[str], work: Path) -> Source:
    recipe = RECIPES[name]
    scratch = work / DOWNLOADS
    given = given or [HUB + recipe.hub] * bool(recipe.hub)
    if not given and not recipe.downloads:
        raise InputError(f"{name} cannot be downloaded without an account. Pass -source with {recipe.advice}")
    given = given or [str(download(remote, scratch / file)) for file, remote in recipe.downloads.items()]
    sources = []
    for path in given:
        if path.startswith(HUB):
            repository, _, revision = path.removeprefix(HUB).partition("@")
            sources.append(Parquet(*hub_parquet(repository, revision or "main"), scratch))
        else:
            sources.append(recipe.adapt(open_source(Path(path), recipe.downloads)))
    return ConcatSource(" + ".join(source.where for source in sources), sources)


def _plan(name: str, source: Source, options: dict[str, Any]) -> Plan:
    plan = RECIPES[name].plan(source, source.entries(), bool(options["crop"]))
    twice = [path for path, n in Counter(image.path for image in plan.images.values()).items() if n > 1]
    if twice:
        raise InputError(f"{source.where} has duplicate images: {first_few(twice)}. Pass a source without them")
    if not plan.images:
        raise InputError(f"no image of this data set in {source.where}. Pass the original source, as in -h")
    return plan


def _summary(plan: Plan) -> str:
    splits = plan.splits().values()
    classes = "/".join(str(len({image.label for image in images})) for images in splits)
    return f"{classes} classes, {'/'.join(str(len(images)) for images in splits)} images in train/val/test"


def _dry_run(name: str, given: Sequence[str], target: Path, work: Path, options: dict[str, Any]) -> None:
    if not given and RECIPES[name].downloads:
        for remote in RECIPES[name].downloads.values():
            size = f" ({remote.size / 1e6:.0f} MB)" if remote.size else ""
            print(f"would download {remote.url}{size}, and build {target} from it")
        return
    source = _open(name, given, work)
    plan = _plan(name, source, options)
    size = sum(entry.size for entry in source.entries() if entry.name in plan.images)
    about = f"{'at most' if options['shorter_side'] or options['crop'] else 'about'} {size / 1e6:.0f} MB"
    print(f"would write {target} from {source.where}: {_summary(plan)}, {about}")
    for line in (*plan.notes, *(f"the source has {fault}" for fault in plan.faults[:10])):
        print(line)


def _resume_or_clear(work: Path, state: dict[str, Any]) -> None:
    content = json.dumps(state).encode()
    if (work / STATE).is_file() and (work / STATE).read_bytes() == content:
        status(f"resuming in {work}")
        return
    for path in work.iterdir():  # of another source, or with other options
        if path.name != DOWNLOADS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _write(work / STATE, content)


def _write_images(source: Source, plan: Plan, work: Path, side: int) -> dict[str, str]:
    """Path -> SHA-256 of every image of the plan. Images written by an earlier call are kept."""
    kept = [image.path for image in plan.images.values() if (work / image.path).is_file()]
    digests = {path: sha256((work / path).read_bytes()).hexdigest() for path in kept}
    wanted = {name: image for name, image in plan.images.items() if image.path not in digests}
    faults: list[str] = []
    waiting: deque[tuple[Target, Future[str]]] = deque()

    def collect(most: int) -> None:
        while len(waiting) > most:
            target, future = waiting.popleft()
            try:
                digests[target.path] = future.result()
            except ValueError as error:  # an InputError, or a name that no file can have
                faults.append(str(error))
            bar.update()

    bar = progress_bar(work.name.strip(".").removesuffix(".part"), total=len(plan.images), initial=len(digests))
    with bar, ThreadPoolExecutor(available_cores()) as pool:
        for name, content in source.read(set(wanted)):
            if target := wanted.pop(name, None):  # an archive may hold a name twice
                waiting.append((target, pool.submit(_make, name, content, target, work / target.path, side)))
                collect(4 * available_cores())
        collect(0)
    if wanted:
        faults.append(f"{len(wanted)} images listed in {source.where} could not be read")
    if faults:
        raise InputError(f"{first_few(faults)}. Replace the source and run this again; it resumes in {work}")
    return digests


def _make(name: str, content: bytes, target: Target, path: Path, side: int) -> str:
    """Write one image, and return its SHA-256."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()  # decodes it, so that a damaged image is found now
            made = _cropped(image, target.crop) if target.crop else image
            shrinks = 0 < side < min(made.size)
            if (shrinks or target.crop) and made.mode not in ("RGB", "L"):
                made = made.convert("RGB")
            if shrinks:
                scale = side / min(made.size)
                made = made.resize([max(round(edge * scale), side) for edge in made.size], Image.Resampling.BICUBIC)
            if made is not image:
                buffer = io.BytesIO()
                made.save(buffer, "PNG" if image.format == "PNG" else "JPEG", quality=JPEG_QUALITY, subsampling=0)
                content = buffer.getvalue()
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise InputError(f"{name} is not a readable image ({reason(error)})") from error
    return _write(path, content)


def _cropped(image: Image.Image, box: tuple[float, ...]) -> Image.Image:
    left, upper, right, lower = (round(value) for value in box)
    if not (0 <= left < right <= image.width + 1 and 0 <= upper < lower <= image.height + 1):
        found = f"{left}, {upper}, {right}, {lower} (left, upper, right, lower)"
        raise InputError(f"the bounding box {found} is not within the image's {image.width} x {image.height} pixels")
    return image.crop((left, upper, min(right, image.width), min(lower, image.height)))


def _write(path: Path, content: bytes) -> str:
    """Write a file atomically, without the cost of a sync for each image; return its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(content)
    partial.replace(path)
    return sha256(content).hexdigest()


def _remove_others(work: Path, digests: dict[str, str]) -> None:
    """Remove the downloads, and what a killed process left half written."""
    shutil.rmtree(work / DOWNLOADS, ignore_errors=True)
    kept = {STATE, *digests}
    for path in work.rglob("*"):
        if not path.is_dir() and path.relative_to(work).as_posix() not in kept:
            path.unlink()
    remove_empty(work)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("name", metavar="NAME", choices=RECIPES, help=f"one of {', '.join(RECIPES)}")
    source = "archives, folders or hf://datasets/<repository>[@<revision>] (default: download it, where possible)"
    parser.add_argument("-source", nargs="+", metavar="PATH", help=source)
    parser.add_argument(
        "-out", type=Path, metavar="DIR", default=Path(__file__).parent, help="folder to build the data set in"
    )
    size = "shrink images to this many pixels along their shorter side; 0: do not (default: 224 for tieredimagenet, else 0)"
    parser.add_argument("-size", type=number_at_least(0, int), help=size)
    parser.add_argument("-no_crop", action="store_true", help="cub: do not crop images to the bounding boxes")
    parser.add_argument("-allow_missing", action="store_true", help="build from an incomplete source")
    parser.add_argument("-dry_run", action="store_true", help="print what would be written and its size; write nothing")
    args = parser.parse_args(argv)
    recipe = RECIPES[args.name]
    if args.size is not None and recipe.shorter_side is None:
        parser.error("-size requires one of cub, miniimagenet, tieredimagenet")
    if args.no_crop and not recipe.crops:
        parser.error("-no_crop requires cub")
    options = {
        "crop": not args.no_crop if recipe.crops else None,
        "shorter_side": recipe.shorter_side if args.size is None else args.size,
        "allow_missing": args.allow_missing,
    }
    prepare(args.name, args.source or [], args.out, options, dry_run=args.dry_run)


if __name__ == "__main__":
    run_script(main)
