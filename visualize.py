"""Pictures: which regions were matched (episode, pair), the curves of runs (curves), evaluations side by side (compare), which
classes were taken for which (confusion)."""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the script without a traceback

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from dataloader.arguments import add_data_arguments, add_episode_arguments, draw_episodes, open_dataset
from deepemd import Model
from engine.arguments import add_evaluation_arguments, add_run_arguments, add_set_argument, add_test_episode_argument
from engine.command_line import make_parser
from engine.start import start
from engine.weights_flags import adopt_trained_flags
from Models.arguments import add_model_arguments, add_weights_arguments
from pictures import canvas, plots, sheet
from pictures.matches import QUERIES, check_head, choose_queries, match_episode, view_items
from utils import InputError, named_generator, number_at_least, run_script


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, summary: str, run: Callable[[Namespace], None]) -> ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary, formatter_class=parser.formatter_class)
        added.set_defaults(run=run)
        group = added.add_argument_group("pictures")
        out = "folder that the pictures are written to"
        group.add_argument("-out", metavar="DIR", default="checkpoint/pictures", help=out)
        group.add_argument("-format", choices=canvas.FORMATS, default="png", help="of the pictures")
        return added

    def add_matching_arguments(added: ArgumentParser) -> None:
        group = added.add_argument_group("flows")
        strongest = "flows drawn per class, the strongest first"
        group.add_argument("-flows", type=number_at_least(1, int), default=10, help=strongest)
        add_weights_arguments(added)
        add_data_arguments(added)
        add_model_arguments(added, sfc_lr=100.0)
        add_evaluation_arguments(added)
        add_run_arguments(added)

    added = command("episode", "draw an episode that eval.py evaluates with the same flags", draw_episode)
    group = added.add_argument_group("which episode")
    which = "its number, from 0, as in the accuracies of results.json"
    group.add_argument("-episode", type=number_at_least(0, int), default=0, help=which)
    which = f"queries to draw, as in 0,1,2; query i is of class i modulo -way (default: {QUERIES}, wrong ones first)"
    group.add_argument("-queries", type=query_numbers, metavar="NUMBERS", help=which)
    add_set_argument(group)
    add_test_episode_argument(group, "episodes of the evaluation; not all are computed")
    add_episode_arguments(added)
    add_matching_arguments(added)

    added = command("pair", "match two image files and draw the match", draw_pair)
    group = added.add_argument_group("which images")
    group.add_argument("images", nargs=2, metavar="IMAGE", help="image file; the first is drawn as the query")
    add_matching_arguments(added)

    added = command("curves", "draw loss and accuracy of training runs, in one picture", draw_curves)
    added.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its trlog.json")
    what = "compare evaluations, episode by episode if they used the same episodes"
    added = command("compare", what, draw_comparison)
    files = "results.json of eval.py or train_meta.py; the first is the base"
    added.add_argument("files", nargs="+", metavar="FILE", help=files)
    names = "names of the evaluations, as in before,after (default: what distinguishes the paths)"
    added.add_argument("-names", type=lambda text: text.split(","), metavar="NAMES", help=names)
    added = command("confusion", "draw which classes an evaluation took for which", draw_confusion)
    added.add_argument("file", metavar="FILE", help="results.json of eval.py or train_meta.py")
    return parser


def query_numbers(text: str) -> tuple[int, ...]:
    """An argparse type: ``"0,3"`` to ``(0, 3)``."""
    if not re.fullmatch(r"\d{1,8}(,\d{1,8})*", text):
        raise ArgumentTypeError(f"{text!r} is not whole numbers of 0 or more joined by commas, as in 0,1,2")
    return tuple(map(int, text.split(",")))


def output(args: Namespace, stem: str) -> Path:
    """The path of a picture in the folder of -out and -extra_dir, which can be written."""
    return canvas.picture_path(Path(args.out, getattr(args, "extra_dir", "")), stem, args.format)


def open_model(args: Namespace) -> Model:
    """The model for evaluation that the flags describe."""
    check_head(args.head)
    _, device, device_ids = start(args, one_process=True)
    return Model.open(args, device, device_ids)[0]


def draw_episode(args: Namespace) -> None:
    count = args.way * args.query
    if args.episode >= args.test_episode:
        raise InputError(f"there is no -episode {args.episode}: the evaluation has -test_episode {args.test_episode}")
    if args.queries and max(args.queries) >= count:
        raise InputError(f"there is no query {max(args.queries)}: -way times -query are {count}, numbered from 0")
    stem = f"episode-{args.episode}"
    path = output(args, stem)
    model = open_model(args)
    dataset = open_dataset(args, args.set, train=False)
    items = draw_episodes(args, dataset, args.test_episode, seed=args.seed, name=args.set)[args.episode]
    names = [dataset.class_names[dataset.labels[index]] for index, _ in items[: args.way]]
    given = {"device": model.device, "generator": named_generator(args.seed, "sfc", 0, args.episode)}
    viewed, task = view_items(dataset, items), {"way": args.way, "shot": args.shot}
    episode = match_episode(model.network, dataset.view, viewed, **task, **given)
    logits = episode.matching.logits
    hits = sum(found == number % args.way for number, found in enumerate(logits.argmax(1).tolist()))
    where = f"{args.dataset} {args.set}, episode {args.episode}"
    title = f"{where}: {args.way}-way {args.shot}-shot, {hits} of {count} right"
    print(canvas.save(sheet.draw_sheet(episode, names=names, title=title), path))
    for number in args.queries or choose_queries(logits, args.way):
        title = f"{where}, query {number}"
        figure = episode.draw(number, names=names, title=title, flows=args.flows, truth=number % args.way)
        print(canvas.save(figure, output(args, f"{stem}-query-{number}")))
    print(f"{where}: {hits} of {count} queries right ({100 * hits / count:.2f} %)")


def draw_pair(args: Namespace) -> None:
    first, second = map(Path, args.images)
    path = output(args, f"pair-{first.stem[:30]}-{second.stem[:30]}")
    match = open_model(args).match(first, second)
    print(canvas.save(match.draw(title=f"left: {first.name}, right: {second.name}", flows=args.flows), path))
    print(f"logit {match.logit:.4f}, cost of the match {match.cost:.4f}")


def draw_curves(args: Namespace) -> None:
    path, runs = output(args, "curves"), [Path(run) for run in args.runs]
    print(canvas.save(plots.draw_curves(plots.distinct_names(runs), [plots.read_curves(run) for run in runs]), path))


def draw_comparison(args: Namespace) -> None:
    path, files = output(args, "compare"), [Path(file) for file in args.files]
    names = args.names or plots.distinct_names(files)
    if len(names) != len(files):
        raise InputError(f"-names has {len(names)} names for {len(files)} files; give one for each, joined by commas")
    evaluations = plots.compare(names, [plots.read_results(file) for file in files])
    print("\n".join(plots.table(evaluations)))
    print(canvas.save(plots.draw_comparison(evaluations), path))


def draw_confusion(args: Namespace) -> None:
    path = output(args, "confusion")
    confusion = plots.read_confusion(Path(args.file))
    print("\n".join(plots.worst_pairs(confusion)))
    print(canvas.save(plots.draw_confusion(confusion), path))


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if "model_dir" in args:
        adopt_trained_flags(parser, args, argv)
    args.run(args)


if __name__ == "__main__":
    run_script(main)
