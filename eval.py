"""Stage 3: the test protocol. Accuracy of a checkpoint over many episodes."""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the script without a traceback

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from dataloader.arguments import (
    add_data_arguments,
    add_episode_arguments,
    draw_episodes,
    open_dataset,
    pixel_statistics,
)
from engine import arguments
from engine.arguments import add_evaluation_arguments, add_rank_arguments, add_run_arguments
from engine.evaluation import Recorder
from engine.run import deciding, fingerprint, results
from engine.start import start
from engine.stopping import stop_request
from Models.arguments import add_model_arguments, open_model
from Models.emd import set_threads
from utils import append_line, check_writable, duration, make_parser, number_at_least, run_script, write_json


def build_parser() -> ArgumentParser:

    parser = make_parser(__doc__)
    group = parser.add_argument_group("test protocol")
    group.add_argument("-set", choices=("train", "val", "test"), default="test", help="split to draw from")
    group.add_argument(
        "-test_episode",
        type=number_at_least(1, int),
        default=5000,
        help="episodes; the paper takes 5000 for 1-shot, 600 for 5-shot",
    )
    group.add_argument(
        "-model_dir",
        help='checkpoint, or its folder, or "none" for random weights '
        "(default: deepemd_trained_model/<dataset>/<deepemd>/max_acc.pth)",
    )
    group.add_argument(
        "-resume",
        action="store_true",
        help="go on with an evaluation that was stopped, or start it where there is none",
    )
    group.add_argument("-json", metavar="FILE", help='write the results there too; "-" prints them and nothing else')
    add_data_arguments(parser)
    add_episode_arguments(parser)
    add_model_arguments(parser, sfc_lr=100.0)
    add_evaluation_arguments(parser)
    add_rank_arguments(parser)
    add_run_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)

    ranks, device, device_ids = start(args)
    set_threads(arguments.solver_threads(args, ranks))
    folder = Path("checkpoint", "eval", args.extra_dir)
    outputs = [folder / "results.json"] + ([Path(args.json)] if args.json not in (None, "-") else [])
    if ranks.is_first:
        append_line(folder / "results.txt")  # what cannot be written is reported before the long work
        for path in outputs:
            check_writable(path)

    model, weights = open_model(args, device=device, device_ids=device_ids, **pixel_statistics(args))
    dataset = open_dataset(args, args.set, train=False)
    episodes = draw_episodes(args, dataset, args.test_episode, seed=args.seed, name=args.set)
    loaded = fingerprint(weights)
    identity = {
        "flags": {**deciding(args), "model_dir": None},
        "weights": loaded and loaded["sha256"],
        "data": dataset.fingerprint(),
    }
    recorder = Recorder(folder, identity, resume=args.resume, ranks=ranks)

    go_on = arguments.same_command("eval.py", parser, args) if ranks.is_first and args.json != "-" else None
    with stop_request(go_on) as stop:
        evaluator = arguments.make_evaluator(args, dataset, device=device, ranks=ranks, stop=stop)
        result = evaluator(model, episodes, title=args.set, known=recorder.scores, after_round=recorder.note)
    if not ranks.is_first:
        return
    line = (
        f"{args.dataset} {args.set}, {args.deepemd}, {args.way}-way {args.shot}-shot, {args.test_episode} episodes: "
        f"acc {result} ({duration(recorder.seconds)})"
    )
    found = results(args, result, weights, recorder.seconds, data=identity["data"])
    for path in outputs:
        write_json(path, found)
    recorder.remove()
    append_line(folder / "results.txt", f"{line}, {weights}")
    print(json.dumps(found) if args.json == "-" else line)


if __name__ == "__main__":
    run_script(main)
