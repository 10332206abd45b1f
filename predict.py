"""Classify your own images by a few examples of each class."""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the script without a traceback

import hashlib
import io
import json
import os
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dataloader.arguments import add_data_arguments, open_base_images, pixel_statistics, view_of
from dataloader.catalog import DatasetSpec
from dataloader.readers import image_files, read_split
from dataloader.views import VIEWS, View
from engine.arguments import add_json_argument, add_run_arguments
from engine.evaluation import encode_images
from engine.run import fingerprint
from engine.start import start
from engine.statistics import prepare_statistics
from engine.weights_flags import adopt_trained_flags, as_words
from Models import DeepEMD
from Models.arguments import add_model_arguments, add_weights_arguments, open_model
from Models.matching import Matching
from Models.statistics import OF_STATISTICS, NodeStatistics
from pictures.canvas import FORMATS, picture_path, save, shorten
from pictures.match import draw_match
from pictures.matches import ViewedImage, check_head, panels_of, view_file
from utils import (
    InputError,
    available_cores,
    check_writable,
    load_plain,
    make_parser,
    named_generator,
    number_at_least,
    printable,
    run_script,
    status,
    warn,
    write_output,
)

FORMAT = 2  # of a file of prototypes
# What has to be the same for prototypes and queries, beside the flags of the view: it decides what nodes and prototypes are.
SETTINGS = (
    *("dataset", "deepemd", "image_size", "feature_pyramid"),
    *("head", "norm", "weights", "weight_power", "temperature"),
)
READ_AHEAD = 32  # images read at once


def build_parser() -> ArgumentParser:
    count = number_at_least(1, int)
    parser = make_parser(__doc__)
    group = parser.add_argument_group("what is classified by what")
    group.add_argument("-support", metavar="DIR", help="examples, as DIR/<class>/<image>; classes may differ in number")
    kept = "instead of -support: a file that -save wrote, with the same weights and flags"
    group.add_argument("-prototypes", metavar="FILE", help=kept)
    group.add_argument("-query", nargs="+", default=[], metavar="PATH", help="images, or folders of them at any depth")
    group = parser.add_argument_group("results")
    add_json_argument(group, "a list of the results")
    group.add_argument("-top", type=count, default=1, help="classes listed for each image, the most probable first")
    group.add_argument("-save", metavar="FILE", help="write the prototypes to FILE, for -prototypes")
    group.add_argument("-picture", metavar="DIR", help="draw the match behind each prediction, in DIR")
    group.add_argument("-format", choices=FORMATS, default="png", help="of the pictures")
    group.add_argument("-flows", type=count, default=10, help="flows drawn per class, the strongest first")
    add_data_arguments(parser, has_splits=False)
    add_weights_arguments(parser)
    add_model_arguments(parser, sfc_lr=100.0)
    add_run_arguments(parser, has_folder=False)
    return parser


class Prototypes(NamedTuple):
    """What the classes are represented by."""

    nodes: Tensor  # (W, C, N)
    classes: list[str]  # W names
    examples: list[ViewedImage]  # W images that show the classes in pictures
    files: list[str]  # the names of their files


class Answer(NamedTuple):
    """What was found for an image: its classes by falling probability."""

    file: str
    ranking: list[tuple[str, float]]
    cost: float | None  # per unit of mass, of the match with the best class; None for a head that moves nothing
    viewed: ViewedImage
    nodes: Tensor  # (C, N)

    def as_json(self, top: int) -> dict[str, Any]:
        (name, probability), *others = self.ranking
        content: dict[str, Any] = {"file": self.file, "class": name, "probability": probability, "cost": self.cost}
        content["runner_up"] = others[0][0] if others else None
        if top > 1:
            content["top"] = [{"class": name, "probability": p} for name, p in self.ranking[:top]]
        return content


class Classifier(NamedTuple):
    """A model for evaluation, and the view that it sees images through."""

    model: DeepEMD
    view: View
    seed: int
    device: torch.device

    def read(self, file: str) -> ViewedImage:
        """Read an image as the network sees it; the random draws of the view depend on its name alone."""
        seed = named_generator(self.seed, "predict", Path(file).name).initial_seed()
        return view_file(file, self.view, seed, advice="")

    def read_all(
        self, files: Iterable[str], *, skip: bool = False
    ) -> Iterator[tuple[Sequence[str], Sequence[ViewedImage]]]:
        """Files and their images, some at a time. With ``skip``, files that cannot be read are named and left out."""
        files = iter(files)
        with ThreadPoolExecutor(available_cores()) as pool:
            while batch := list(islice(files, READ_AHEAD)):
                readable = []
                for file, viewed in [(file, pool.submit(self.read, file)) for file in batch]:
                    try:
                        readable.append((file, viewed.result()))
                    except InputError as error:
                        if not skip:
                            raise
                        warn(f"left out: {error}")
                if readable:
                    yield tuple(zip(*readable, strict=True))

    def encode(self, viewed: Sequence[ViewedImage]) -> Tensor:
        """The nodes of images, ``(B, C, N)``."""
        return encode_images(self.model, torch.stack([one.pixels for one in viewed]), device=self.device)

    @torch.no_grad()
    def fit(self, folder: str) -> Prototypes:
        """Prototypes from ``folder/<class>/<image>``. A class with one image is represented by that image."""
        layout = DatasetSpec("folders", folders=(".",), split_folders={"support": "."}, obtain="")
        advice = "-support needs a folder of images for each class"
        files, labels, classes = read_split(layout, folder, "support", advice=advice)
        nodes = torch.cat([self.encode(viewed) for _, viewed in self.read_all(files)])  # (S, C, N)
        label = torch.tensor(labels)
        order = named_generator(self.seed, "sfc", "predict")
        proto = self.model.prototypes(nodes, way=len(classes), labels=label, generator=order)
        similarity = torch.cosine_similarity(nodes, proto[label.to(nodes.device)], dim=1).mean(1)
        # A class is shown by the example whose nodes are nearest to those of its prototype.
        nearest = {label: file for label, _, file in sorted(zip(labels, similarity.tolist(), files, strict=True))}
        shown = [nearest[label] for label in range(len(classes))]
        return Prototypes(proto, classes, [self.read(file) for file in shown], [Path(file).name for file in shown])

    @torch.no_grad()
    def answers(self, prototypes: Prototypes, files: Iterable[str]) -> Iterator[Answer]:
        """An answer for each image that can be read; the others are named on standard error."""
        proto, settings = prototypes.nodes.to(self.device), self.model.settings
        for batch, viewed in self.read_all(files, skip=True):
            nodes = self.encode(viewed)
            logits = self.model.match(proto, nodes, way=len(proto), shot=1).cpu()  # (B, W)
            for file, row, *image in zip(batch, logits, viewed, nodes, strict=True):
                probability = row.double().softmax(0).tolist()
                ranking = [(prototypes.classes[k], probability[k]) for k in row.argsort(descending=True, stable=True)]
                cost = 1 - float(row.max()) / settings.temperature if settings.uses_solver else None
                yield Answer(file, ranking, cost, *image)

    @torch.no_grad()
    def draw(self, prototypes: Prototypes, answer: Answer, flows: int) -> Figure:
        """The image beside the class that was predicted and the runner-up, with the flows between them."""
        chosen = [prototypes.classes.index(name) for name, _ in answer.ranking[:2]]
        matching = self.model.matching(prototypes.nodes.to(self.device)[chosen], answer.nodes[None])
        images = (answer.viewed, *(prototypes.examples[k] for k in chosen))
        given = (self.view, answer.nodes.shape[-1], self.model.feature_pyramid)
        query, *protos = (panels_of(one, *given) for one in images)
        matching = Matching(*(part[0].cpu() for part in matching))
        names = [f"{name}, {100 * probability:.1f} %" for name, probability in answer.ranking[:2]]
        notes = [f"shown by {prototypes.files[k]}" for k in chosen]
        return draw_match(query, protos, matching, names=names, title=Path(answer.file).name, notes=notes, top=flows)


def save_prototypes(
    prototypes: Prototypes, path: str, *, settings: dict[str, Any], weights: str, model: DeepEMD | None = None
) -> None:
    """Write a file for :func:`load_prototypes`, with the statistics of training nodes that the ``model`` uses."""
    content = prototypes._replace(nodes=prototypes.nodes.cpu())._asdict()
    if model and model.statistics_hash:
        content["statistics"] = {name: part.cpu() for name, part in vars(model.settings.statistics).items()}
    content["examples"] = [example._asdict() for example in prototypes.examples]
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content, "settings": settings, "weights": weights}, buffer)
    write_output(Path(path), buffer.getbuffer())


def load_prototypes(path: str, *, settings: dict[str, Any], weights: str, model: DeepEMD | None = None) -> Prototypes:
    """What :func:`save_prototypes` wrote, whose statistics of training nodes the ``model`` then uses.

    InputError for no file, a damaged one, or one of other weights, settings or statistics.
    """
    if not Path(path).is_file():
        raise InputError(f"-prototypes {path}: there is no such file. Write one with -support and -save")
    content = load_plain(Path(path), "file of prototypes")
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, not {FORMAT}")
        examples = [ViewedImage(**example) for example in content["examples"]]
        prototypes = Prototypes(content["nodes"], content["classes"], examples, content["files"])
        if len(set(map(len, prototypes))) > 1:
            raise ValueError("its parts are of different lengths")
        made_with, made_by = dict(content["settings"]), content["weights"]
        statistics = NodeStatistics(**content["statistics"]) if made_with.get("norm") in OF_STATISTICS else None
    except (KeyError, TypeError, ValueError, IndexError) as error:
        kind = type(error).__name__
        raise InputError(f"-prototypes {path} is damaged, or no file of -save ({kind}: {error})") from error
    if made_by != weights:
        advice = "Set the same -model_dir, or make them again with -support and -save"
        raise InputError(f"-prototypes {path}: made with other weights ({made_by}, not {weights}). {advice}")
    if different := {name: value for name, value in made_with.items() if settings.get(name) != value}:
        raise InputError(f"-prototypes {path}: made with other flags; set {as_words(different)}")
    if model and statistics and model.settings.statistics and statistics.sha256 != model.statistics_hash:
        raise InputError(
            f"-prototypes {path}: made with other statistics, which are in the file. Leave -statistics out"
        )
    if model and statistics:
        model.use_statistics(statistics)
    return prototypes


def path_for(file: str, folder: Path, suffix: str, taken: set[Path]) -> Path:
    """Where the picture of an image is written; images of one name in different folders get different pictures."""
    path = picture_path(folder, Path(file).stem, suffix)
    if path in taken:
        path = path.with_stem(f"{path.stem}-{hashlib.sha256(os.fsencode(os.path.abspath(file))).hexdigest()[:6]}")
    taken.add(path)
    return path


def print_answer(answer: Answer, top: int, width: int) -> None:
    """A line of the table, and one for each further class."""
    (name, probability), *others = [(shorten(name, 40), 100 * share) for name, share in answer.ranking]
    cost = "-" if answer.cost is None else f"{answer.cost:.3f}"
    second = others[0][0] if others else "-"
    lines = [f"{name:{width}}  {probability:9.1f} %  {cost:>6}  {second:{width}}  {printable(answer.file)}"]
    lines += [f"{name:{width}}  {probability:9.1f} %" for name, probability in others[: top - 1]]
    print("\n".join(lines), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if bool(args.support) == bool(args.prototypes):
        parser.error("give either -support DIR or -prototypes FILE")
    if not (args.query or args.save):
        parser.error("give -query PATH, or -save FILE to make prototypes alone")
    if args.json and not args.query:
        parser.error("-json lists answers and requires -query PATH")
    adopt_trained_flags(parser, args, argv)
    if args.picture:
        check_head(args.head)
        picture_path(Path(args.picture), "picture", args.format)
    for path in filter(None, (args.save, args.json if args.json != "-" else None)):
        check_writable(Path(path))
    _, device, device_ids = start(args, one_process=True)
    model, weights = open_model(args, device=device, device_ids=device_ids, **pixel_statistics(args))
    loaded = fingerprint(weights)
    origin = f"sha256 {loaded['sha256']}" if loaded else f"random weights of seed {args.seed}"
    names = [*SETTINGS, *(name for name in VIEWS[args.deepemd][1] if name != "train")]
    made_with = {"settings": {name: getattr(args, name) for name in names}, "weights": origin}
    if args.statistics or not args.prototypes:
        source = {"open_train": partial(open_base_images, args), "num_workers": 0}
        prepare_statistics(args, model, weights, device=device, **source)
    model = model.folded()
    classifier = Classifier(model, view_of(args, train=False), args.seed, device)
    made_with["model"] = model
    prototypes = load_prototypes(args.prototypes, **made_with) if args.prototypes else classifier.fit(args.support)
    if args.save:
        save_prototypes(prototypes, args.save, **made_with)
        status(f"prototypes of {len(prototypes.classes)} classes: {args.save}")
    if not args.query:
        return
    width = max(len("runner-up"), *(len(shorten(name, 40)) for name in prototypes.classes))
    if args.json != "-":
        print(f"{'class':{width}}  probability    cost  {'runner-up':{width}}  file")
    listed, taken = [], set()
    for answer in classifier.answers(prototypes, image_files(args.query)):
        listed.append(answer.as_json(args.top))
        if args.json != "-":
            print_answer(answer, args.top, width)
        if args.picture:
            figure = classifier.draw(prototypes, answer, args.flows)
            save(figure, path_for(answer.file, Path(args.picture), args.format, taken))
    if args.json == "-":
        print(json.dumps(listed, indent=1))
    elif args.json:
        write_output(Path(args.json), (json.dumps(listed, indent=1) + "\n").encode())
    if args.picture:
        status(f"pictures: {args.picture}")
    if not listed:
        raise InputError("none of the images of -query can be read")


if __name__ == "__main__":
    run_script(main)
