"""Stage 3: the test protocol. Accuracy of a checkpoint over many episodes."""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the script without a traceback

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dataloader import arguments as data
from engine import arguments
from engine.results import final_test
from engine.run import result_flags
from engine.start import start
from engine.statistics import prepare_statistics
from engine.stopping import stop_request
from engine.weights_flags import adopt_trained_flags, as_words
from Models.arguments import add_model_arguments, add_weights_arguments, open_model
from utils import append_line, check_writable, make_parser, run_script, write_output


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    group = parser.add_argument_group("test protocol")
    arguments.add_set_argument(group)
    arguments.add_test_episode_argument(group)
    resume = "continue an interrupted evaluation with the same flags, if there is one"
    group.add_argument("-resume", action="store_true", help=resume)
    arguments.add_json_argument(group)
    data.add_data_arguments(parser)
    data.add_episode_arguments(parser)
    add_weights_arguments(parser)
    add_model_arguments(parser, sfc_lr=100.0)
    arguments.add_evaluation_arguments(parser)
    arguments.add_run_arguments(parser)
    return parser


def unusual_flags(parser: ArgumentParser, args: Namespace) -> dict[str, Any]:
    """The flags that affect the result and are not at their default, without those that the line always names."""
    defaults = result_flags(parser.parse_args([]))
    named = ("dataset", "set", "deepemd", "way", "shot", "test_episode", "model_dir")
    return {name: value for name, value in result_flags(args).items() if value != defaults[name] and name not in named}


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)

    ranks, device, device_ids = start(args)
    adopt_trained_flags(parser, args, argv)
    folder = Path("checkpoint", "eval", args.extra_dir)
    if ranks.is_first:  # a file that cannot be written is an error now, not after the evaluation
        append_line(folder / "results.txt")
        for path in (folder / "results.json", args.json):
            if path not in (None, "-"):
                check_writable(Path(path))

    model, weights = open_model(args, device=device, device_ids=device_ids, **data.pixel_statistics(args))
    dataset = data.open_dataset(args, args.set, train=False)
    episodes = data.draw_episodes(args, dataset, args.test_episode, seed=args.seed, name=args.set)
    source = {"open_train": partial(data.open_base_images, args), "num_workers": arguments.loader_processes(args)}
    prepare_statistics(args, model, weights, device=device, ranks=ranks, **source)

    command = arguments.resume_command("eval.py", argv, args) if ranks.is_first and args.json != "-" else None
    with stop_request(command) as stop:
        evaluator = arguments.make_evaluator(args, dataset, device=device, ranks=ranks, stop=stop)
        settings = {"weights": weights, "data": dataset.fingerprint(), "resume": args.resume, "title": args.set}
        tested, content = final_test(evaluator, model, episodes, args, folder, keep=True, **settings)
    if not ranks.is_first:
        return
    settings = as_words(unusual_flags(parser, args))
    line = f"{args.dataset} {args.set}, {args.deepemd}, {tested}" + (f", with {settings}" if settings else "")
    append_line(folder / "results.txt", f"{line}, {weights}")
    if args.json not in (None, "-"):
        write_output(Path(args.json), json.dumps(content, indent=1).encode())
    print(json.dumps(content) if args.json == "-" else line)


if __name__ == "__main__":
    run_script(main)
