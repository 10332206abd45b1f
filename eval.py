"""Stage 3: the test protocol. Accuracy of a checkpoint over many episodes."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

# Everything else is imported where it is needed, so that Ctrl-C ends a starting script quietly.
from utils import make_parser, run_script


def build_parser() -> ArgumentParser:
    from dataloader.arguments import add_data_arguments, add_episode_arguments
    from engine.arguments import add_evaluation_arguments
    from Models.arguments import add_model_arguments
    from utils import add_run_arguments, number_at_least

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
        help='checkpoint, or its folder, or "none" for an encoder that has learned nothing '
        "(default: deepemd_trained_model/<dataset>/<deepemd>/max_acc.pth)",
    )
    add_data_arguments(parser)
    add_episode_arguments(parser)
    add_model_arguments(parser, sfc_lr=100.0)
    add_evaluation_arguments(parser)
    add_run_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    import sys

    from dataloader.arguments import draw_episodes, open_dataset
    from engine.arguments import make_evaluator
    from Models.arguments import build_model
    from utils import Stopwatch, append_line, choose_device, load_encoder_weights, set_seed

    device, device_ids = choose_device(args.gpu)
    args.seed = set_seed(args.seed, deterministic=args.deterministic)
    results = Path("checkpoint", "eval", args.extra_dir, "results.txt") if args.extra_dir else None
    if results:
        append_line(results)  # what cannot be written is told before the long work

    model = build_model(args, device_ids=device_ids).to(device)
    weights = args.model_dir or f"deepemd_trained_model/{args.dataset}/{args.deepemd}/max_acc.pth"
    print(f"weights: {weights}", file=sys.stderr)
    if weights != "none":
        load_encoder_weights(model, weights, hint="Name yours with -model_dir, or run: bash download_trained_model.sh")
    dataset = open_dataset(args, args.set, train=False)
    episodes = draw_episodes(args, dataset, args.test_episode, seed=args.seed, name=args.set)

    watch = Stopwatch()
    result = make_evaluator(args, dataset, device=device)(model, episodes, title=args.set)
    line = (
        f"{args.dataset} {args.set}, {args.deepemd}, {args.way}-way {args.shot}-shot, {args.test_episode} episodes: "
        f"acc {result} ({watch})"
    )
    print(line)
    if results:
        append_line(results, f"{line}, {weights}")


if __name__ == "__main__":
    run_script(main)
