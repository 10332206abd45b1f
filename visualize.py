"""Pictures: which regions were matched (episode, pair), the curves of runs (curves), evaluations side by side (compare)."""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the script without a traceback

import json
import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dataloader.arguments import (
    add_data_arguments,
    add_episode_arguments,
    draw_episodes,
    open_dataset,
    pixel_statistics,
    view_of,
)
from dataloader.dataset import read_image
from engine.arguments import add_evaluation_arguments, add_rank_arguments, add_run_arguments, solver_threads
from engine.distributed import Ranks
from engine.start import choose_device, choose_seed, set_seed
from Models import DeepEMD, arguments
from Models.arguments import add_model_arguments
from Models.emd import set_threads
from pictures import drawing
from pictures.drawing import FORMATS, Run
from pictures.matches import (
    QUERIES,
    WRONG_QUERIES,
    check_head,
    choose_queries,
    match_episode,
    rows_of_sheet,
    view_image,
    view_items,
)
from utils import (
    InputError,
    check_writable,
    make_parser,
    mean_confidence_interval,
    named_generator,
    number_at_least,
    run_script,
)

# What has to be the same in two evaluations, that episode k of one is episode k of the other.
SAME_EPISODES = ("dataset", "set", "way", "shot", "query", "seed", "verify_images")


def build_parser() -> ArgumentParser:

    count = number_at_least(1, int)
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, summary: str) -> ArgumentParser:
        added = commands.add_parser(
            name, help=summary, description=summary, allow_abbrev=False, formatter_class=parser.formatter_class
        )
        group = added.add_argument_group("pictures")
        group.add_argument("-out", metavar="DIR", default="pictures", help="folder that the pictures are written to")
        group.add_argument("-format", choices=FORMATS, default="png", help="of the pictures")
        if name in ("episode", "pair"):
            group.add_argument("-top", type=count, default=10, help="flows drawn per class, the strongest first")
        return added

    def add_matching_arguments(added: ArgumentParser) -> None:
        add_data_arguments(added)
        add_model_arguments(added, sfc_lr=100.0)
        add_evaluation_arguments(added)
        add_rank_arguments(added)
        add_run_arguments(added)

    weights = (
        'checkpoint, or its folder, or "none" for random weights '
        "(default: deepemd_trained_model/<dataset>/<deepemd>/max_acc.pth)"
    )
    added = command("episode", "draw an episode that eval.py evaluates with the same flags")
    group = added.add_argument_group("which episode")
    group.add_argument(
        "-episode",
        type=number_at_least(0, int),
        default=0,
        help="its number, from 0, as in the accuracies of results.json",
    )
    group.add_argument(
        "-queries",
        type=query_numbers,
        metavar="NUMBERS",
        help="queries to draw, from 0, as in 0,1,2; query i is of class i modulo -way "
        f"(default: {QUERIES} of them, up to {WRONG_QUERIES} wrong ones first)",
    )
    group.add_argument("-set", choices=("train", "val", "test"), default="test", help="split to draw from")
    group.add_argument(
        "-test_episode", type=count, default=5000, help="episodes of the evaluation; not all are computed"
    )
    group.add_argument("-model_dir", help=weights)
    add_episode_arguments(added)
    add_matching_arguments(added)

    added = command("pair", "match two image files and draw the match")
    group = added.add_argument_group("which images")
    group.add_argument("images", nargs=2, metavar="IMAGE", help="image file; the first is drawn as the query")
    group.add_argument("-model_dir", help=weights)
    add_matching_arguments(added)

    added = command("curves", "draw loss and accuracy of training runs, in one picture")
    added.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its trlog.json")
    added = command("compare", "compare evaluations, episode by episode where they saw the same episodes")
    added.add_argument(
        "files", nargs="+", metavar="FILE", help="results.json of eval.py or train_meta.py; the first is the base"
    )
    return parser


def query_numbers(text: str) -> tuple[int, ...]:
    """An argparse type: ``"0,3"`` to ``(0, 3)``."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 9 for part in parts):
        raise ArgumentTypeError(f"expected whole numbers of 0 or more joined by commas, as in 0,1,2; got {text!r}")
    return tuple(dict.fromkeys(int(part) for part in parts))


# --- The commands -----------------------------------------------------------------------------------------------------


def open_model(args: Namespace) -> tuple[DeepEMD, torch.device]:
    """The model for evaluation that the flags ask for, and its device."""

    check_head(args.head)
    device, device_ids = choose_device(args.gpu)
    set_threads(solver_threads(args, Ranks()))
    args.seed = choose_seed(args.seed)
    set_seed(args.seed, deterministic=args.deterministic)
    model, _ = arguments.open_model(args, device=device, device_ids=device_ids, **pixel_statistics(args))
    return model.folded(), device


def draw_episode(args: Namespace) -> None:

    if args.episode >= args.test_episode:
        raise InputError(f"-episode {args.episode}: expected a number below -test_episode {args.test_episode}")
    count = args.way * args.query
    if args.queries and max(args.queries) >= count:
        raise InputError(
            f"-queries: expected numbers from 0 to {count - 1} (-way times -query); got {max(args.queries)}"
        )
    stem = Path(args.out, args.extra_dir, f"episode-{args.episode}")
    check_writable(path := stem.with_name(f"{stem.name}.{args.format}"))

    model, device = open_model(args)
    dataset = open_dataset(args, args.set, train=False)
    items = draw_episodes(args, dataset, args.test_episode, seed=args.seed, name=args.set)[args.episode]
    names = [dataset.class_names[dataset.labels[index]] for index, _ in items[: args.way]]
    matched = match_episode(
        model,
        dataset.view,
        view_items(dataset, items),
        way=args.way,
        shot=args.shot,
        device=device,
        generator=named_generator(args.seed, "sfc", 0, args.episode),
    )
    logits = matched.matching.logits
    hits = [found == number % args.way for number, found in enumerate(logits.argmax(1).tolist())]
    where = f"{args.dataset} {args.set}, episode {args.episode}"
    rows = rows_of_sheet(count, args.way)
    shown = f"{count} queries" if len(rows) == count else f"{len(rows)} of {count} queries"
    figure = drawing.draw_episode(
        [[panels[0].pixels for panels in shots] for shots in matched.supports],
        [matched.queries[number][0].pixels for number in rows],
        names=names,
        numbers=rows,
        truths=[number % args.way for number in rows],
        logits=logits[rows],
        title=f"{where}: {args.way}-way {args.shot}-shot, {sum(hits)} of {count} right",
        subtitle=shown,
    )
    print(drawing.save(figure, path))
    for number in args.queries or choose_queries(logits, args.way):
        truth = number % args.way
        figure = matched.draw(number, names=names, title=f"{where}, query {number}", flows=args.top, truth=truth)
        print(drawing.save(figure, stem.with_name(f"{stem.name}-query-{number}.{args.format}")))
    print(f"{where}: {sum(hits)} of {count} queries right ({100 * sum(hits) / count:.2f} %)")


def draw_pair(args: Namespace) -> None:

    paths = [Path(image) for image in args.images]
    path = Path(args.out, args.extra_dir, f"pair-{paths[0].stem}-{paths[1].stem}.{args.format}")
    check_writable(path)
    images = [read_image(image, advice="") for image in args.images]
    model, device = open_model(args)
    view = view_of(args, train=False)
    seeds = [named_generator(args.seed, "pair", number).initial_seed() for number in range(2)]
    query, proto = (view_image(image, view, seed) for image, seed in zip(images, seeds, strict=True))
    matched = match_episode(model, view, [proto, query], way=1, shot=1, device=device)
    title = f"left: {paths[0].name}, right: {paths[1].name}"
    figure = matched.draw(0, names=[""], title=title, flows=args.top, truth=None)
    print(drawing.save(figure, path))
    cost = 1 - float(matched.matching.logits[0, 0]) / args.temperature
    print(f"logit {float(matched.matching.logits[0, 0]):.4f}, cost of the match {cost:.4f}")


def draw_curves(args: Namespace) -> None:

    path = Path(args.out, f"curves.{args.format}")
    check_writable(path)
    paths = [Path(run) for run in args.runs]
    runs = [read_run(path, name) for path, name in zip(paths, distinct_names(paths), strict=True)]
    print(drawing.save(drawing.draw_curves(runs), path))


def read_run(path: Path, name: str) -> Run:
    """The curves of a run folder, or of a ``trlog.json``.

    Raises:
        InputError: there are none, or not as a training script writes them.
    """

    file = path / "trlog.json" if path.is_dir() else path
    content = _read_json(file, "the curves of a run")
    try:
        rows, test = content["epochs"], None
        if "test_acc" in content:
            test = float(content["test_acc"]), float(content["test_interval"])
        if rows:
            columns = ([float(row.get(key, "nan")) for row in rows] for key in ("train_loss", "train_acc", "val_loss"))
            accuracies = ([float(row.get(key, "nan")) for row in rows] for key in ("val_acc", "val_interval"))
            return Run(name, [float(row["epoch"]) for row in rows], *columns, *accuracies, test=test)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"expected the curves of a run in {file}; it has another content ({error!r})") from None
    raise InputError(f"expected the curves of a run in {file}; no epoch of it is finished")


def draw_comparison(args: Namespace) -> None:

    path = Path(args.out, f"compare.{args.format}")
    check_writable(path)
    paths = [Path(file) for file in args.files]
    names = distinct_names(paths)
    evaluations = [read_evaluation(file) for file in paths]
    first = evaluations[0]
    bars = [
        (name, one["accuracies"], *mean_confidence_interval(one["accuracies"]))
        for name, one in zip(names, evaluations, strict=True)
    ]
    differences, remarks = [], [""]
    for name, other in zip(names[1:], evaluations[1:], strict=True):
        reason = why_not_paired(first, other)
        if reason:
            remarks.append(f"not paired: {reason}")
            continue
        pairs = zip(other["accuracies"], first["accuracies"], strict=False)  # the longer one has more episodes behind
        values = [mine - base for mine, base in pairs]
        mean, interval = mean_confidence_interval(values)
        differences.append(drawing.Difference(name, values, mean, interval))
        remarks.append(f"{mean:+.2f} +- {interval:.2f}  ({len(values)} episodes, paired)")
    width = max(len(name) for name in ("evaluation", *names))
    print(f"{'evaluation':{width}}  episodes  accuracy (%)    " + (f"minus {names[0]}" if len(names) > 1 else ""))
    for (name, accuracies, mean, interval), remark in zip(bars, remarks, strict=True):
        print(f"{name:{width}}  {len(accuracies):8}  {f'{mean:.2f} +- {interval:.2f}':14}  {remark}".rstrip())
    print(drawing.save(drawing.draw_comparison(bars, differences, names[0]), path))


def read_evaluation(file: Path) -> dict[str, Any]:
    """``results.json``: at least ``accuracies`` and ``flags``.

    Raises:
        InputError: it is not as eval.py writes it.
    """

    content = _read_json(file, "the results of an evaluation")
    try:
        accuracies, flags = [float(value) for value in content["accuracies"]], dict(content["flags"])
        if accuracies and all(map(math.isfinite, accuracies)):
            return {**content, "accuracies": accuracies, "flags": flags}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"expected the results of an evaluation in {file}; it has another content ({error!r})"
        ) from None
    raise InputError(
        f"expected the results of an evaluation in {file}; it has no accuracies, or some that are not finite"
    )


def why_not_paired(one: dict[str, Any], other: dict[str, Any]) -> str:
    """What keeps episode k of one evaluation from being episode k of the other; empty where nothing does."""
    # The final test of train_meta.py is on the test split, whatever -set validated on.
    flags = [{**e["flags"], **({"set": "test"} if "pretrain_dir" in e["flags"] else {})} for e in (one, other)]
    for name in SAME_EPISODES:
        values = [given.get(name) for given in flags]
        if values[0] != values[1]:
            return f"-{name} {values[1]}, not {values[0]}"
    data = [evaluation.get("data") for evaluation in (one, other)]
    return "other images" if all(data) and data[0] != data[1] else ""


def _read_json(file: Path, what: str) -> Any:

    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise InputError(f"expected {what} in {file}; it cannot be read ({error.strerror})") from None
    except ValueError:
        raise InputError(f"expected {what} in {file}; it is not JSON") from None


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """What tells paths apart: without the folders that all of them begin or end with."""
    rows = [list(path.parts) for path in paths]
    if len(rows) > 1:
        for end in (0, -1):
            while all(len(row) > 1 for row in rows) and len({row[end] for row in rows}) == 1:
                for row in rows:
                    row.pop(end)
    names = [str(Path(*row)) for row in rows]
    return [name if names.count(name) == 1 else f"{name} ({k + 1})" for k, name in enumerate(names)]


COMMANDS = {"episode": draw_episode, "pair": draw_pair, "curves": draw_curves, "compare": draw_comparison}


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    COMMANDS[args.command](args)


if __name__ == "__main__":
    run_script(main)
