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
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from dataloader.readers import image_files
from dataloader.views import VIEWS
from deepemd import Answer, Model, Prototypes, add_model_flags
from engine.arguments import add_csv_argument, add_json_argument, check_outputs
from engine.command_line import make_parser
from engine.results import confusion_lines
from engine.run import fingerprint
from engine.start import start
from engine.weights_flags import adopt_trained_flags, as_words
from Models import DeepEMD
from Models.statistics import OF_STATISTICS, NodeStatistics
from pictures.canvas import FORMATS, picture_path, save, shorten
from pictures.matches import ViewedImage, check_head
from utils import (
    InputError,
    load_plain,
    number_at_least,
    number_between,
    printable,
    run_script,
    status,
    write_csv,
    write_output,
)

NONE = "none of the classes"
FORMAT = 2  # of a file of prototypes
# What has to be the same for prototypes and queries, beside the flags of the view: it decides what nodes and prototypes are.
SETTINGS = (
    *("dataset", "backbone", "backbone_layer", "map_size", "deepemd", "image_size", "interpolation"),
    *("feature_pyramid", "head", "norm", "weights", "weight_power", "temperature"),
)


def build_parser() -> ArgumentParser:
    count = number_at_least(1, int)
    parser = make_parser(__doc__)
    group = parser.add_argument_group("what is classified by what")
    group.add_argument("-support", metavar="DIR", help="examples, as DIR/<class>/<image>, any number for each class")
    kept = "instead of -support: a file that -save wrote, with the same weights and flags"
    group.add_argument("-prototypes", metavar="FILE", help=kept)
    group.add_argument("-query", nargs="+", default=[], metavar="PATH", help="images, or folders of them at any depth")
    group = parser.add_argument_group("results")
    add_json_argument(group, "a list of the results")
    add_csv_argument(group, "image, with what -json has")
    group.add_argument("-top", type=count, default=1, help="classes listed for each image, the most probable first")
    least = "least probability of an answer, 0 to 1; below it, the answer is none of the classes. "
    least += "Probabilities compare the classes with each other: they are the softmax of temperature * (1 - cost)"
    group.add_argument("-abstain", type=number_between(0, 1, float), default=0.0, metavar="P", help=least)
    group.add_argument("-save", metavar="FILE", help="write the prototypes to FILE, for -prototypes")
    group.add_argument("-picture", metavar="DIR", help="draw the match behind each prediction, in DIR")
    group.add_argument("-format", choices=FORMATS, default="png", help="of the pictures")
    group.add_argument("-flows", type=count, default=10, help="flows drawn per class, the strongest first")
    add_model_flags(parser)
    return parser


def known_classes(folders: Iterable[str], files: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """The classes of those files that are in a folder which has nothing but a folder of images for each of some classes."""
    known = {}
    for folder in filter(os.path.isdir, folders):
        inside = {file: Path(file).relative_to(folder).parts for file in files if Path(file).is_relative_to(folder)}
        others = [file for file, parts in inside.items() if len(parts) < 2 or parts[0] not in classes]
        if not others:
            known |= {file: parts[0] for file, parts in inside.items()}
        elif len(others) < len(inside):
            place = f"{printable(others[0])} is not in a folder of a class of the examples"
            status(f"no accuracy of the images in {printable(folder)}: {place}")
    return known


def report_accuracy(truths: Sequence[str], found: Sequence[str | None], classes: Sequence[str]) -> list[str]:
    """Lines: how many images of known class were classified correctly, in all and by class, and what others were taken for.

    Images without an answer (None) are counted, and left out.
    """
    none = sum(name is None for name in found)
    if none:
        truths, found = zip(*((one, other) for one, other in zip(truths, found, strict=True) if other), strict=True)
    confusion = Counter(zip(truths, found, strict=True))
    counts = [[confusion[true, predicted] for predicted in classes] for true in classes]
    right = sum(true == predicted for true, predicted in zip(truths, found, strict=True))
    of = f"{right} of {len(truths)} images whose folder names their class"
    of += f"; no answer for {none} others" if none else ""
    return [f"accuracy: {100 * right / len(truths):.2f} % ({of})", *confusion_lines(classes, counts)]


def write_table(listed: Sequence[dict[str, Any]], path: str, top: int) -> None:
    """The list of -json as a table, with two columns for each further class."""
    header = ["file", "class", "probability", "cost", "runner_up"] + ["truth"] * any("truth" in row for row in listed)
    more = [f"{what}_{place}" for place in range(2, top + 1) for what in ("class", "probability")]
    rows = []
    for row in listed:
        others = [value for other in row.get("top", [])[1:] for value in (other["class"], other["probability"])]
        rows.append([*(row.get(name) for name in header), *others])
    write_csv(Path(path), header + more, rows)


def as_json(answer: Answer, top: int, truth: str | None = None) -> dict[str, Any]:
    """An answer as an entry of the list of -json, with the true class where that is known."""
    content = {"file": answer.file, "class": answer.class_name, "probability": answer.probability}
    content |= {"cost": answer.cost, "runner_up": answer.runner_up}
    if answer.class_name is None:
        content["nearest"] = answer.ranking[0][0]
    if truth is not None:
        content["truth"] = truth
    if top > 1:
        content["top"] = [{"class": name, "probability": share} for name, share in answer.ranking[:top]]
    return content


def save_prototypes(
    prototypes: Prototypes, path: str, model: DeepEMD | None = None, *, settings: dict[str, Any], weights: str
) -> None:
    """Write a file for :func:`load_prototypes`, with the statistics of training nodes that the ``model`` uses."""
    content = prototypes._replace(nodes=prototypes.nodes.cpu())._asdict()
    if model and model.statistics_hash:
        content["statistics"] = {name: part.cpu() for name, part in vars(model.settings.statistics).items()}
    content["examples"] = [example._asdict() for example in prototypes.examples]
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content, "settings": settings, "weights": weights}, buffer)
    write_output(Path(path), buffer.getbuffer())


def load_prototypes(path: str, model: DeepEMD | None = None, *, settings: dict[str, Any], weights: str) -> Prototypes:
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
        raise InputError(f"-prototypes {path} is damaged, or not a file of -save ({kind}: {error})") from error
    if made_by != weights:
        advice = "Set the same -model_dir, or make them again with -support and -save"
        raise InputError(f"-prototypes {path}: made with other weights ({made_by}, not {weights}). {advice}")
    if different := {name: value for name, value in made_with.items() if settings.get(name) != value}:
        raise InputError(f"-prototypes {path}: made with other flags; set {as_words(different)}")
    if model and statistics and model.settings.statistics and statistics.sha256 != model.statistics_hash:
        advice = "which are in the file. Leave -statistics out"
        raise InputError(f"-prototypes {path}: made with other statistics, {advice}")
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
    if answer.class_name is None:
        name, second = NONE, name
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
    for name in ("json", "csv"):
        if getattr(args, name) and not args.query:
            parser.error(f"-{name} lists answers and requires -query PATH")
    adopt_trained_flags(parser, args, argv)
    if args.picture:
        check_head(args.head)
        picture_path(Path(args.picture), "picture", args.format)
    check_outputs(args.save, args.csv, args.json)
    _, device, device_ids = start(args, one_process=True)
    brings_statistics = bool(args.prototypes) and not args.statistics
    model, weights = Model.open(args, device, device_ids, needs_statistics=not brings_statistics)
    loaded = fingerprint(weights)
    known = loaded and (loaded["sha256"] or model.network.encoder.identity()["weights"])
    origin = f"sha256 {known}" if known else f"random weights of seed {args.seed}"
    names = [*SETTINGS, *(name for name in VIEWS[args.deepemd][1] if name != "train")]
    made_with = {"settings": {name: getattr(args, name) for name in names}, "weights": origin}
    made_with["model"] = model.network
    prototypes = load_prototypes(args.prototypes, **made_with) if args.prototypes else model.prototypes(args.support)
    if args.save:
        save_prototypes(prototypes, args.save, **made_with)
        status(f"prototypes of {len(prototypes.classes)} classes: {args.save}")
    if not args.query:
        return
    width = max(len(NONE if args.abstain else "runner-up"), *(len(shorten(name, 40)) for name in prototypes.classes))
    if args.json != "-":
        print(f"{'class':{width}}  probability    cost  {'runner-up':{width}}  file")
    files = list(image_files(args.query))
    truth_of = known_classes(args.query, files, prototypes.classes)
    listed, taken = [], set()
    for answer in model.answers(prototypes, files, abstain=args.abstain, skip=True):
        listed.append(as_json(answer, args.top, truth_of.get(answer.file)))
        if args.json != "-":
            print_answer(answer, args.top, width)
        if args.picture:
            figure = model.draw(prototypes, answer, flows=args.flows)
            save(figure, path_for(answer.file, Path(args.picture), args.format, taken))
    pairs = [(row["truth"], row["class"]) for row in listed if "truth" in row]
    if any(found for _, found in pairs) and args.json != "-":
        print("\n" + "\n".join(report_accuracy(*zip(*pairs, strict=True), prototypes.classes)))
    if args.csv:
        write_table(listed, args.csv, args.top)
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
