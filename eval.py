"""Stage 3: the test protocol. Accuracy of a checkpoint over many episodes."""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the script without a traceback

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dataloader import ImageDataset
from dataloader import arguments as data
from dataloader.episode_files import episodes_digest, images_digest, write_episodes
from dataloader.episodes import ListedEpisodes, SeededEpisodes
from dataloader.features import FeatureSet, write_features
from engine import arguments
from engine.command_line import make_parser
from engine.evaluation import encode_dataset
from engine.results import final_test
from engine.run import result_flags
from engine.start import start
from engine.statistics import drawn_images, prepare_statistics
from engine.stopping import stop_request
from engine.weights_flags import adopt_trained_flags, as_words
from Models import DeepEMD
from Models.arguments import add_model_arguments, add_weights_arguments, open_model
from utils import InputError, append_line, run_script, status, write_output


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    group = parser.add_argument_group("test protocol")
    arguments.add_set_argument(group)
    arguments.add_test_episode_argument(group)
    resume = "continue an interrupted evaluation with the same flags, if there is one"
    group.add_argument("-resume", action="store_true", help=resume)
    arguments.add_json_argument(group)
    arguments.add_csv_argument(group, "episode, with its accuracy, loss and classes")
    group = parser.add_argument_group("nodes and episodes in files")
    data.add_features_argument(group)
    written = "write the nodes of the whole split to FILE, for -features, and evaluate them"
    group.add_argument("-features_out", metavar="FILE", help=written)
    data.add_episode_file_arguments(group)
    data.add_data_arguments(parser)
    data.add_episode_arguments(parser)
    add_weights_arguments(parser)
    add_model_arguments(parser, sfc_lr=100.0)
    arguments.add_evaluation_arguments(parser)
    arguments.add_run_arguments(parser)
    return parser


def unusual_flags(parser: ArgumentParser, args: Namespace) -> dict[str, Any]:
    """The flags that affect the result and are not at their default, without those that the line always names."""
    defaults = arguments.defaults_beside(parser, vars(args))
    named = ("dataset", "set", "deepemd", "way", "shot", "test_episode", "model_dir")
    return {name: value for name, value in result_flags(args).items() if value != defaults[name] and name not in named}


def describe_data(
    args: Namespace, dataset: ImageDataset | FeatureSet, episodes: SeededEpisodes | ListedEpisodes
) -> dict[str, Any]:
    """The fingerprint of the data, and what tells whether another evaluation had the same episodes."""
    found = {**dataset.fingerprint(), "order": images_digest(dataset)}
    if args.episodes_in or args.episodes_out:
        found["episodes"] = episodes_digest(episodes)
    return found


def encode_split(
    args: Namespace, model: DeepEMD, dataset: ImageDataset, seeds: Tensor | None, **shared: Any
) -> FeatureSet:
    """The nodes of every image of a split, and of some of the training classes, written to ``-features_out``.

    ``seeds`` are those of the views of the images, if each has one; ``shared`` is for
    :func:`engine.evaluation.encode_dataset`.
    """

    def encode(images: ImageDataset, items: Sequence[Any], title: str) -> Tensor:
        workers = arguments.loader_processes(args)
        return encode_dataset(model, images, items, num_workers=workers, title=title, **shared)

    items = range(len(dataset)) if seeds is None else list(enumerate(seeds.tolist()))
    nodes = encode(dataset, items, f"encoding {args.set}")
    features = FeatureSet(nodes, dataset.labels, dataset.class_names, dataset.relative_paths())
    try:
        train = data.open_dataset(args, "train", train=False)
    except InputError as error:
        status(f"no train_nodes in {args.features_out}: {error}")
    else:
        items = drawn_images(train)
        train_labels = [train.labels[index] for index, _ in items]
        features = replace(features, train_nodes=encode(train, items, "encoding train"), train_labels=train_labels)
    if shared["ranks"].is_first:
        write_features(args.features_out, features)
        status(f"features: {args.features_out}, {features.nodes.dtype}".replace("torch.", ""))
    return features


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.features and args.features_out:
        parser.error("-features are nodes already: leave out -features_out, which writes those of an encoder")
    if "-" in (args.features_out, args.episodes_out):
        parser.error('-features_out and -episodes_out need the name of a file; "-" is for -json')

    ranks, device, device_ids = start(args)
    adopt_trained_flags(parser, args, argv)
    folder = Path("checkpoint", "eval", args.extra_dir)
    if ranks.is_first:  # a file that cannot be written is an error now, not after the evaluation
        append_line(folder / "results.txt")
        arguments.check_outputs(folder / "results.json")
        arguments.check_outputs(args.json, args.csv, args.features_out, args.episodes_out)

    model, weights = open_model(args, device=device, device_ids=device_ids, **data.pixel_statistics(args))
    dataset = data.open_dataset(args, args.set, train=False)
    if args.features_out and dataset.view.is_random and not args.fixed_patches:
        status("-features_out: the patches of an image are drawn once, as with -fixed_patches")
        args.fixed_patches = True
    most = args.test_episode if "test_episode" in parser.given(argv) else None
    episodes = data.choose_episodes(args, dataset, seed=args.seed, name=args.set, most=most)
    found = describe_data(args, dataset, episodes)
    if args.episodes_out and ranks.is_first:
        shape = {"way": args.way, "shot": args.shot, "with_seeds": dataset.view.is_random and not args.fixed_patches}
        write_episodes(args.episodes_out, episodes, dataset, **shape)
    source = {"open_train": partial(data.open_base_images, args, dataset)}
    source |= {"num_workers": arguments.loader_processes(args), "train_nodes": getattr(dataset, "train_nodes", None)}
    prepare_statistics(args, model, weights, device=device, ranks=ranks, **source)

    command = arguments.resume_command("eval.py", argv, args) if ranks.is_first and args.json != "-" else None
    with stop_request(command) as stop:
        settings = {"weights": weights, "data": found, "resume": args.resume, "title": args.set}
        shared = {"device": device, "ranks": ranks, "stop": stop}
        if args.features_out:
            dataset = encode_split(args, model, dataset, episodes.fixed_seeds, **shared)
        evaluator = arguments.make_evaluator(args, dataset, **shared)
        tested, content = final_test(evaluator, model, episodes, args, folder, keep=True, **settings)
    if not ranks.is_first:
        return
    settings = as_words(unusual_flags(parser, args))
    what = f"{args.dataset} {args.set}, {args.deepemd}" if not args.features else f"{args.features}"
    line = f"{what}, {tested}" + (f", with {settings}" if settings else "")
    append_line(folder / "results.txt", f"{line}, {weights}")
    if args.json not in (None, "-"):
        write_output(Path(args.json), json.dumps(content, indent=1).encode())
    print(json.dumps(content) if args.json == "-" else line)


if __name__ == "__main__":
    run_script(main)
