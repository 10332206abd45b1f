"""Classify your own images by a few examples of each class."""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the script without a traceback

import hashlib
import json
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataloader.arguments import add_data_arguments, pixel_statistics, view_of
from dataloader.catalog import DatasetSpec
from dataloader.dataset import read_image
from dataloader.readers import is_hidden, names_image, read_split
from dataloader.views import VIEWS, View
from engine.arguments import add_run_arguments
from engine.evaluation import ENCODE_BATCH, DivergenceError
from engine.run import fingerprint
from engine.start import choose_device, choose_seed, set_seed
from Models import DeepEMD
from Models.arguments import add_model_arguments, open_model
from Models.heads import takes_solver
from pictures import drawing
from pictures.drawing import FORMATS
from pictures.matches import ViewedImage, check_head, panels_of, view_image
from utils import (
    InputError,
    available_cores,
    check_writable,
    load_plain,
    make_parser,
    named_generator,
    number_at_least,
    run_script,
    save_plain,
    status,
    warn,
)

FORMAT = 2  # of a file of prototypes
# Flags that have to be the same for prototypes and queries: they decide what the nodes of an image are, as do those of
# the view, or what the prototypes were fitted through.
SETTINGS = ("dataset", "deepemd", "image_size", "feature_pyramid", "head", "norm", "temperature")


def build_parser() -> ArgumentParser:

    count = number_at_least(1, int)
    parser = make_parser(__doc__)
    group = parser.add_argument_group("what is classified by what")
    group.add_argument("-support", metavar="DIR", help="examples, as DIR/<class>/<image>; classes may differ in number")
    group.add_argument(
        "-prototypes", metavar="FILE", help="instead of -support: what -save wrote, with the same weights and flags"
    )
    group.add_argument("-query", nargs="+", default=[], metavar="PATH", help="images, or folders of them at any depth")
    group.add_argument(
        "-model_dir",
        help='checkpoint, or its folder, or "none" for random weights '
        "(default: deepemd_trained_model/<dataset>/<deepemd>/max_acc.pth)",
    )
    group = parser.add_argument_group("results")
    group.add_argument(
        "-json", metavar="FILE", help='write a list of results there too; "-" prints it and nothing else'
    )
    group.add_argument("-top", type=count, default=1, help="classes listed for each image, the most probable first")
    group.add_argument("-save", metavar="FILE", help="keep the prototypes, for -prototypes")
    group.add_argument("-picture", metavar="DIR", help="draw there, for each image, the match that decided")
    group.add_argument("-format", choices=FORMATS, default="png", help="of the pictures")
    group.add_argument("-flows", type=count, default=10, help="flows drawn per class, the strongest first")
    add_data_arguments(parser, has_splits=False)
    add_model_arguments(parser, sfc_lr=100.0)
    add_run_arguments(parser, has_folder=False)
    return parser


class Prototypes(NamedTuple):
    """What stands for the classes.

    Attributes:
        nodes: ``(W, C, N)``.
        classes: W names.
        examples: W images that show the classes in pictures.
        files: W names of the files that those were read from.
    """

    nodes: Tensor
    classes: list[str]
    examples: list[ViewedImage]
    files: list[str]


class Answer(NamedTuple):
    """What was found for an image: its classes by falling probability, with the logits that decided."""

    file: str
    ranking: list[tuple[str, float]]
    cost: float | None  # of moving a unit of mass to the best class; None for a head that moves nothing
    logits: Tensor

    def as_json(self, top: int) -> dict[str, Any]:
        (name, probability), *others = self.ranking
        found: dict[str, Any] = {"file": self.file, "class": name, "probability": probability, "cost": self.cost}
        found["runner_up"] = others[0][0] if others else None
        if top > 1:
            found["top"] = [{"class": name, "probability": p} for name, p in self.ranking[:top]]
        return found


# --- Images to nodes --------------------------------------------------------------------------------------------------


class Encoder:
    """Image files to nodes, a batch at a time."""

    def __init__(self, model: DeepEMD, view: View, *, seed: int, device: torch.device) -> None:
        self.model, self.view, self.seed, self.device = model, view, seed, device

    def see(self, file: str) -> ViewedImage:
        """Read an image as the network sees it; the random draws of the view depend on its name alone."""

        image = read_image(file, advice="")
        try:
            return view_image(image, self.view, named_generator(self.seed, "predict", Path(file).name).initial_seed())
        except InputError as error:
            raise InputError(f"{file}: {error}") from None

    def __call__(self, files: Iterable[str], *, skip: bool = False) -> Iterator[tuple[list[str], Tensor]]:
        """Batches of files and their nodes ``(B, C, N)``; ``skip`` names files that cannot be read and goes on."""

        def look(file: str) -> Tensor | InputError:
            try:
                return self.see(file).pixels
            except InputError as error:
                return error

        size = max(1, ENCODE_BATCH.get(self.device.type, 8) // self.view.patches)
        files = iter(files)
        with ThreadPoolExecutor(available_cores()) as pool:
            while batch := list(islice(files, size)):
                looked = list(zip(batch, pool.map(look, batch), strict=True))
                for _, fault in looked:
                    if isinstance(fault, InputError):
                        if not skip:
                            raise fault
                        warn(f"left out: {fault}")
                read = [(file, seen) for file, seen in looked if not isinstance(seen, InputError)]
                if not read:
                    continue
                pixels = torch.stack([seen for _, seen in read])
                with torch.no_grad():
                    nodes = self.model.encode(pixels.to(self.device))
                if not bool(nodes.isfinite().all()):
                    raise DivergenceError("the encoder's features are not finite: its weights have diverged")
                yield [file for file, _ in read], nodes


def image_files(paths: Sequence[str]) -> Iterator[str]:
    """The files named, and the images in the folders named, in the order of their names."""

    for path in map(Path, paths):
        if not path.is_dir():
            yield str(path)  # a file that is not there is reported when it is read
            continue
        files = (file for file in path.rglob("*") if file.is_file() and names_image(file))
        found = sorted(file for file in files if not any(map(is_hidden, map(Path, file.relative_to(path).parts))))
        if not found:
            warn(f"left out: -query {path}: expected images in the folder; found none")
        yield from map(str, found)


# --- Prototypes -------------------------------------------------------------------------------------------------------


def fit(model: DeepEMD, encoder: Encoder, folder: str) -> Prototypes:
    """Prototypes from ``folder/<class>/<image>``; a class with one image is that image."""

    if not Path(folder).is_dir():
        raise InputError(f"-support {folder}: expected a folder with one folder of images per class; there is none")
    layout = DatasetSpec("folders", folders=(".",), split_folders={"support": "."}, obtain="put images in DIR/<class>/")
    files, labels, classes = read_split(layout, folder, "support")
    nodes = torch.cat([nodes for _, nodes in encoder(files)])  # (S, C, N)
    label = torch.tensor(labels)
    generator = named_generator(encoder.seed, "sfc", "predict")
    with torch.no_grad():
        proto = model.prototypes(nodes, way=len(classes), labels=label, generator=generator)
        # To show a class by: the example whose nodes are nearest to the prototype's.
        likeness = torch.cosine_similarity(nodes, proto[label.to(nodes.device)], dim=1).mean(1)
    nearest = [
        max(pair for pair in zip(likeness.tolist(), files, labels, strict=True) if pair[2] == k)[1]
        for k in range(len(classes))
    ]
    return Prototypes(proto, classes, [encoder.see(file) for file in nearest], [Path(file).name for file in nearest])


def save(prototypes: Prototypes, path: str, *, settings: dict[str, Any], weights: str) -> None:

    check_writable(Path(path))
    content = prototypes._replace(nodes=prototypes.nodes.cpu())._asdict()
    content["examples"] = [seen._asdict() for seen in prototypes.examples]
    save_plain(Path(path), {"format": FORMAT, **content, "settings": settings, "weights": weights})


def load(path: str, *, settings: dict[str, Any], weights: str) -> Prototypes:
    """Prototypes that :func:`save` wrote.

    Raises:
        InputError: no such file, or made with other weights or settings.
    """

    if not Path(path).is_file():
        raise InputError(f"-prototypes {path}: expected a file that -save wrote; there is none")
    content = load_plain(Path(path), "file of prototypes")
    if not isinstance(content, dict) or content.get("format") != FORMAT or "nodes" not in content:
        raise InputError(f"-prototypes {path}: expected a file that -save wrote; it is another, or of another version")
    if content["weights"] != weights:
        raise InputError(
            f"-prototypes {path}: expected prototypes of these weights ({weights}); they are of {content['weights']}. Give "
            "the same -model_dir, or make them anew with -support and -save"
        )
    made_with = content["settings"]
    told = ", ".join(_as_flag(name, value) for name, value in made_with.items() if settings.get(name) != value)
    if told:
        raise InputError(f"-prototypes {path}: expected the flags that they were made with; give {told}")
    examples = [ViewedImage(**seen) for seen in content["examples"]]
    return Prototypes(content["nodes"], content["classes"], examples, content["files"])


def _as_flag(name: str, value: Any) -> str:
    if value is None or value == ():
        return f"no -{name}"
    return f"-{name} {','.join(map(str, value)) if isinstance(value, tuple) else value}"


# --- Answers ----------------------------------------------------------------------------------------------------------


def answers(model: DeepEMD, encoder: Encoder, prototypes: Prototypes, files: Iterable[str]) -> Iterator[Answer]:
    """An answer per image that can be read; the others are named on standard error."""

    moves = takes_solver(model.head["head"])
    proto = prototypes.nodes.to(encoder.device)
    for names, nodes in encoder(files, skip=True):
        with torch.no_grad():
            logits = model.match(proto, nodes, way=len(proto), shot=1).cpu()  # (B, W)
        for file, row in zip(names, logits, strict=True):
            probability = row.double().softmax(0)
            order = row.argsort(descending=True, stable=True).tolist()
            cost = 1 - float(row[order[0]]) / model.head["temperature"] if moves else None
            yield Answer(file, [(prototypes.classes[k], float(probability[k])) for k in order], cost, row)


def draw(model: DeepEMD, encoder: Encoder, prototypes: Prototypes, answer: Answer, path: Path, *, top: int) -> None:
    """The image beside the class that it was given and the runner-up, with what was moved between them."""

    chosen = [prototypes.classes.index(name) for name, _ in answer.ranking[:2]]
    seen = encoder.see(answer.file)
    with torch.no_grad():
        nodes = model.encode(seen.pixels[None].to(encoder.device))
        proto = prototypes.nodes.to(encoder.device)[chosen]
        matching = model.matching(proto, nodes)
    count = proto.shape[-1]
    panels = [
        panels_of(one, encoder.view, count, model.feature_pyramid)
        for one in (seen, *(prototypes.examples[k] for k in chosen))
    ]
    (name, probability), *_ = answer.ranking
    figure = drawing.draw_match(
        panels[0],
        panels[1:],
        names=[prototypes.classes[k] for k in chosen],
        logits=matching.logits[0].cpu(),
        flow=matching.flow[0].cpu(),
        supply=matching.supply[0].cpu(),
        demand=matching.demand[0].cpu(),
        title=f"{Path(answer.file).name}: {name}, {100 * probability:.1f} %",
        notes=[f"shown by {prototypes.files[k]}" for k in chosen],
        top=top,
    )
    drawing.save(figure, path)


def picture_of(file: str, folder: Path, suffix: str, taken: set[Path]) -> Path:
    """Where the picture of an image goes; images of one name in different folders get different pictures."""

    path = folder / f"{Path(file).stem}.{suffix}"
    if path in taken:
        path = path.with_stem(f"{path.stem}-{hashlib.sha256(str(Path(file).resolve()).encode()).hexdigest()[:6]}")
    taken.add(path)
    return path


class Table:
    """Prints a line per answer, and its further classes below it."""

    def __init__(self, classes: Sequence[str], top: int) -> None:
        self.top, self.width = top, max(len("runner-up"), *map(len, classes))
        print(f"{'class':<{self.width}}  probability    cost  {'runner-up':<{self.width}}  file")

    def add(self, answer: Answer) -> None:
        (name, probability), *others = answer.ranking
        cost = f"{answer.cost:6.3f}" if answer.cost is not None else "     -"
        second = others[0][0] if others else "-"
        print(
            f"{name:<{self.width}}  {100 * probability:9.1f} %  {cost}  {second:<{self.width}}  {answer.file}",
            flush=True,
        )
        for name, probability in others[: self.top - 1]:
            print(f"{name:<{self.width}}  {100 * probability:9.1f} %")


class JsonList:
    """Writes a list as it comes, to a file that appears when it is complete, or to standard output."""

    def __init__(self, path: str) -> None:

        self.path = None if path == "-" else Path(path)
        self.partial = self.path and self.path.with_name(f"{self.path.name}.part")
        self.file = self.partial.open("w", encoding="utf-8") if self.partial else sys.stdout
        self.count = 0

    def add(self, item: dict[str, Any]) -> None:

        self.file.write(("[\n " if not self.count else ",\n ") + json.dumps(item))
        self.count += 1

    def close(self) -> None:
        self.file.write("\n]\n" if self.count else "[]\n")
        self.file.flush()
        if self.partial and self.path:
            self.file.close()
            self.partial.replace(self.path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if bool(args.support) == bool(args.prototypes):
        parser.error("expected -support DIR or -prototypes FILE, one of the two")
    if not (args.query or args.save):
        parser.error("expected -query PATH, or -save FILE to make prototypes alone")
    if args.json and not args.query:
        parser.error("-json lists answers: expected -query PATH with it")

    if args.picture:
        check_head(args.head)
        check_writable(Path(args.picture, "picture"))
    for path in (args.save, args.json if args.json != "-" else None):
        if path:
            check_writable(Path(path))
    device, device_ids = choose_device(args.gpu)
    args.seed = choose_seed(args.seed)
    set_seed(args.seed, deterministic=args.deterministic)
    model, weights = open_model(args, device=device, device_ids=device_ids, **pixel_statistics(args))
    loaded = fingerprint(weights) if weights != "none" else None
    of_view = [name for name in VIEWS[args.deepemd][1] if name != "train"]
    made_with = {
        "settings": {name: getattr(args, name) for name in (*SETTINGS, *of_view)},
        "weights": f"sha256 {loaded['sha256']}" if loaded else f"random weights of seed {args.seed}",
    }

    model = model.folded()
    encoder = Encoder(model, view_of(args, train=False), seed=args.seed, device=device)
    prototypes = load(args.prototypes, **made_with) if args.prototypes else fit(model, encoder, args.support)
    if args.save:
        save(prototypes, args.save, **made_with)
        status(f"prototypes of {len(prototypes.classes)} classes: {args.save}")
    if not args.query:
        return
    table = None if args.json == "-" else Table(prototypes.classes, args.top)
    listing = JsonList(args.json) if args.json else None
    count, pictures = 0, set()
    for answer in answers(model, encoder, prototypes, image_files(args.query)):
        count += 1
        if table:
            table.add(answer)
        if listing:
            listing.add(answer.as_json(args.top))
        if args.picture:
            path = picture_of(answer.file, Path(args.picture), args.format, pictures)
            draw(model, encoder, prototypes, answer, path, top=args.flows)
    if listing:
        listing.close()
    if args.picture:
        status(f"pictures: {args.picture}")
    if not count:
        raise InputError("expected at least one image that can be read; there was none")


if __name__ == "__main__":
    run_script(main)
