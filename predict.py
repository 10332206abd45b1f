"""Classify your own images by a few examples of each class."""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the script without a traceback

import hashlib
import io
import json
import os
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from dataloader.arguments import add_data_arguments, pixel_statistics, view_of
from dataloader.catalog import DatasetSpec
from dataloader.images import read_image
from dataloader.readers import image_files, read_split
from dataloader.views import VIEWS, View
from engine.arguments import add_json_argument, add_run_arguments
from engine.evaluation import encode_images
from engine.run import fingerprint
from engine.start import start
from engine.weights_flags import adopt_trained_flags, as_words
from Models import DeepEMD
from Models.arguments import add_model_arguments, add_weights_arguments, open_model
from pictures.canvas import FORMATS, picture_path, save, short_names
from pictures.match import draw_match
from pictures.matches import ViewedImage, check_head, panels_of, view_image
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
# Flags that have to be the same for prototypes and queries: they decide what the nodes of an image are, as do those of
# the view, or what the prototypes were fitted through.
SETTINGS = ("dataset", "deepemd", "image_size", "feature_pyramid", "head", "norm", "temperature")
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
    """What the classes are represented by.

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
    """The classes of an image by falling probability."""

    file: str
    ranking: list[tuple[str, float]]
    cost: float | None  # per unit of mass, of the match with the best class; None for a head that moves nothing

    def as_json(self, top: int) -> dict[str, Any]:
        (name, probability), *others = self.ranking
        content: dict[str, Any] = {"file": self.file, "class": name, "probability": probability, "cost": self.cost}
        content["runner_up"] = others[0][0] if others else None
        if top > 1:
            content["top"] = [{"class": name, "probability": p} for name, p in self.ranking[:top]]
        return content


# --- Images -----------------------------------------------------------------------------------------------------------


def view_file(file: str, view: View, seed: int) -> ViewedImage:
    """Read an image as the network sees it; the random draws of the view depend on its name alone."""
    image = read_image(file, advice="")
    try:
        return view_image(image, view, named_generator(seed, "predict", Path(file).name).initial_seed())
    except InputError as error:
        raise InputError(f"{printable(file)}: {error}") from None


def view_files(
    files: Iterable[str], view: View, seed: int, *, skip: bool = False
) -> Iterator[list[tuple[str, ViewedImage]]]:
    """Files and their images, some at a time. With ``skip``, files that cannot be read are named and left out."""

    def read(file: str) -> ViewedImage | InputError:
        try:
            return view_file(file, view, seed)
        except InputError as error:
            return error

    files = iter(files)
    with ThreadPoolExecutor(available_cores()) as pool:
        while batch := list(islice(files, READ_AHEAD)):
            viewed = list(zip(batch, pool.map(read, batch), strict=True))
            for error in (one for _, one in viewed if isinstance(one, InputError)):
                if not skip:
                    raise error
                warn(f"left out: {error}")
            if readable := [(file, one) for file, one in viewed if isinstance(one, ViewedImage)]:
                yield readable


def encode(model: DeepEMD, viewed: Sequence[tuple[str, ViewedImage]], device: torch.device) -> Tensor:
    """The nodes of images, ``(B, C, N)``."""
    return encode_images(model, torch.stack([one.pixels for _, one in viewed]), device=device)


# --- Prototypes -------------------------------------------------------------------------------------------------------


def fit(model: DeepEMD, view: View, folder: str, *, seed: int, device: torch.device) -> Prototypes:
    """Prototypes from ``folder/<class>/<image>``. A class with one image is represented by that image."""
    layout = DatasetSpec("folders", folders=(".",), split_folders={"support": "."}, obtain="")
    advice = "-support needs a folder of images for each class"
    files, labels, classes = read_split(layout, folder, "support", advice=advice)
    nodes = torch.cat([encode(model, batch, device) for batch in view_files(files, view, seed)])  # (S, C, N)
    label = torch.tensor(labels)
    with torch.no_grad():
        generator = named_generator(seed, "sfc", "predict")
        proto = model.prototypes(nodes, way=len(classes), labels=label, generator=generator)
        similarity = torch.cosine_similarity(nodes, proto[label.to(nodes.device)], dim=1).mean(1)
    # A class is shown by the example whose nodes are nearest to those of its prototype.
    by_similarity = sorted(zip(labels, similarity.tolist(), files, strict=True))
    nearest = [{label: file for label, _, file in by_similarity}[k] for k in range(len(classes))]
    examples = [view_file(file, view, seed) for file in nearest]
    return Prototypes(proto, classes, examples, [Path(file).name for file in nearest])


def save_prototypes(prototypes: Prototypes, path: str, *, settings: dict[str, Any], weights: str) -> None:
    content = prototypes._replace(nodes=prototypes.nodes.cpu())._asdict()
    content["examples"] = [example._asdict() for example in prototypes.examples]
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content, "settings": settings, "weights": weights}, buffer)
    write_output(Path(path), buffer.getbuffer())


def load_prototypes(
    path: str, model: DeepEMD, view: View, *, device: torch.device, settings: dict[str, Any], weights: str
) -> Prototypes:
    """Prototypes that :func:`save_prototypes` wrote.

    Raises:
        InputError: no such file, a damaged one, or one made with other weights or settings.
    """
    if not Path(path).is_file():
        raise InputError(f"-prototypes {path}: there is no such file. Write one with -support and -save")
    content = load_plain(Path(path), "file of prototypes")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"-prototypes {path} is not a file that -save wrote, or is of another version")
    try:
        made_with, made_by = dict(content["settings"]), str(content["weights"])
        examples = [ViewedImage(**example) for example in content["examples"]]
        prototypes = Prototypes(content["nodes"], content["classes"], examples, content["files"])
        if made_by != weights:
            raise InputError(
                f"-prototypes {path}: made with other weights ({made_by}, not {weights}). Set the same -model_dir, or make "
                "them again with -support and -save"
            )
        different = {name: value for name, value in made_with.items() if settings.get(name) != value}
        if different:
            raise InputError(f"-prototypes {path}: made with other flags; set {as_words(different)}")
        _check(prototypes, model, view, device)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"-prototypes {path} is damaged ({type(error).__name__}: {error})") from error
    return prototypes


def _check(prototypes: Prototypes, model: DeepEMD, view: View, device: torch.device) -> None:
    """Raise ValueError unless they are what the model and the view make of images."""
    nodes, classes, examples, files = prototypes
    blank = view_image(Image.new("RGB", (1024, 1024)), view, 0)
    wanted = (len(classes), *encode(model, [("", blank)], device).shape[1:])
    if nodes.shape != wanted or not nodes.is_floating_point() or not bool(nodes.isfinite().all()):
        raise ValueError(f"expected finite nodes of shape {wanted}; got {nodes.dtype} of shape {tuple(nodes.shape)}")
    if not len(classes) == len(examples) == len(files) or not all(isinstance(one, str) for one in (*classes, *files)):
        raise ValueError("expected a name, an example and its file for each class")
    for one in examples:
        panels_of(one, view, wanted[2], model.feature_pyramid)
        if one.pixels.shape != blank.pixels.shape or (one.image is None) != (blank.image is None):
            raise ValueError(f"expected examples of shape {tuple(blank.pixels.shape)}; got {tuple(one.pixels.shape)}")


# --- Answers ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answers(
    model: DeepEMD, view: View, prototypes: Prototypes, files: Iterable[str], *, seed: int, device: torch.device
) -> Iterator[tuple[Answer, ViewedImage, Tensor]]:
    """For each image that can be read: the answer, the image, and its nodes ``(C, N)``."""
    proto = prototypes.nodes.to(device)
    for batch in view_files(files, view, seed, skip=True):
        nodes = encode(model, batch, device)
        logits = model.match(proto, nodes, way=len(proto), shot=1).cpu()  # (B, W)
        for (file, viewed), of_image, row in zip(batch, nodes, logits, strict=True):
            probability = row.double().softmax(0)
            order = row.argsort(descending=True, stable=True).tolist()
            cost = 1 - float(row[order[0]]) / model.settings.temperature if model.settings.uses_solver else None
            yield Answer(file, [(prototypes.classes[k], float(probability[k])) for k in order], cost), viewed, of_image


@torch.no_grad()
def draw(
    model: DeepEMD, view: View, prototypes: Prototypes, answer: Answer, viewed: ViewedImage, nodes: Tensor, top: int
) -> Any:
    """The image beside the class that was predicted and the runner-up, with the flows between them."""
    chosen = [prototypes.classes.index(name) for name, _ in answer.ranking[:2]]
    matching = model.matching(prototypes.nodes.to(nodes.device)[chosen], nodes[None])
    images = (viewed, *(prototypes.examples[k] for k in chosen))
    query, *protos = (panels_of(one, view, nodes.shape[-1], model.feature_pyramid) for one in images)
    (name, probability), *_ = answer.ranking
    return draw_match(
        query,
        protos,
        type(matching)(*(part[0].cpu() for part in matching)),
        names=[prototypes.classes[k] for k in chosen],
        title=f"{Path(answer.file).name}: {name}, {100 * probability:.1f} %",
        notes=[f"shown by {prototypes.files[k]}" for k in chosen],
        top=top,
    )


def path_for(file: str, folder: Path, suffix: str, taken: set[Path]) -> Path:
    """Where the picture of an image is written; images of one name in different folders get different pictures."""
    path = picture_path(folder, Path(file).stem, suffix)
    if path in taken:
        path = path.with_stem(f"{path.stem}-{hashlib.sha256(os.fsencode(os.path.abspath(file))).hexdigest()[:6]}")
    taken.add(path)
    return path


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
    folder = Path(args.picture or ".")
    outputs = (args.save, None if args.json == "-" else args.json, args.picture and folder / f"picture.{args.format}")
    for path in filter(None, outputs):
        check_writable(Path(path))

    _, device, device_ids = start(args, one_process=True)
    model, weights = open_model(args, device=device, device_ids=device_ids, **pixel_statistics(args))
    loaded = fingerprint(weights)
    of_view = [name for name in VIEWS[args.deepemd][1] if name != "train"]
    made_with = {
        "settings": {name: getattr(args, name) for name in (*SETTINGS, *of_view)},
        "weights": f"sha256 {loaded['sha256']}" if loaded else f"random weights of seed {args.seed}",
    }
    model, view = model.folded(), view_of(args, train=False)
    if args.prototypes:
        prototypes = load_prototypes(args.prototypes, model, view, device=device, **made_with)
    else:
        prototypes = fit(model, view, args.support, seed=args.seed, device=device)
    if args.save:
        save_prototypes(prototypes, args.save, **made_with)
        status(f"prototypes of {len(prototypes.classes)} classes: {args.save}")
    if not args.query:
        return

    label = dict(
        zip(prototypes.classes, short_names([printable(name) for name in prototypes.classes], 40), strict=True)
    )
    width = max(len("runner-up"), *map(len, label.values()))
    if args.json != "-":
        print(f"{'class':{width}}  probability    cost  {'runner-up':{width}}  file")
    listed, taken = [], set()
    found = answers(model, view, prototypes, image_files(args.query), seed=args.seed, device=device)
    for answer, viewed, nodes in found:
        listed.append(answer.as_json(args.top))
        if args.json != "-":
            cost = "-" if answer.cost is None else f"{answer.cost:.3f}"
            second = label[answer.ranking[1][0]] if len(label) > 1 else "-"
            rows = [(f"{cost:>6}", f"{second:{width}}", printable(answer.file)), *((),) * (args.top - 1)]
            for (name, probability), columns in zip(answer.ranking, rows, strict=False):
                print("  ".join((f"{label[name]:{width}}", f"{100 * probability:9.1f} %", *columns)), flush=True)
        if args.picture:
            path = path_for(answer.file, folder, args.format, taken)
            save(draw(model, view, prototypes, answer, viewed, nodes, args.flows), path)
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
