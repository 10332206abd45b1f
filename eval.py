"""Stage 3: the test protocol. Accuracy of a checkpoint over many episodes."""

from pathlib import Path

from dataloader import add_data_arguments, add_episode_arguments, draw_episodes, episode_labels, open_dataset
from engine import add_evaluation_arguments, evaluate
from Models import add_model_arguments, build_model
from Models.emd import EmdError
from utils import (
    Stopwatch,
    add_run_arguments,
    append_line,
    choose_device,
    load_encoder_weights,
    make_parser,
    number_at_least,
    run_script,
    set_seed,
)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "-set", choices=("train", "val", "test"), default="test", help="split to draw from (default: %(default)s)"
    )
    parser.add_argument(
        "-test_episode",
        type=number_at_least(1, int),
        default=5000,
        help="episodes; the paper takes 5000 for 1-shot, 600 for 5-shot (default: %(default)s)",
    )
    parser.add_argument(
        "-model_dir",
        default="deepemd_trained_model/miniimagenet/fcn/max_acc.pth",
        help='checkpoint, or "none" for an encoder that has learned nothing (default: %(default)s)',
    )
    add_run_arguments(parser)
    add_data_arguments(parser)
    add_episode_arguments(parser)
    add_evaluation_arguments(parser)
    add_model_arguments(parser, sfc_lr=100.0)
    args = parser.parse_args()

    device, device_ids = choose_device(args.gpu)
    seed = set_seed(args.seed)
    model = build_model(args, device_ids=device_ids).to(device)
    if args.model_dir != "none":
        load_encoder_weights(model, args.model_dir)
    dataset = open_dataset(args, args.set, train=False)
    episodes = draw_episodes(args, dataset, args.test_episode, seed=seed, name=args.set)

    watch = Stopwatch()
    result = evaluate(
        model,
        dataset,
        episodes,
        episode_labels(args.way, args.query),
        way=args.way,
        shot=args.shot,
        device=device,
        seed=seed,
        num_workers=args.num_workers,
        feature_cache=args.feature_cache,
        episode_batch=args.episode_batch,
        title=args.set,
    )
    line = (
        f"{args.dataset} {args.set}, {args.deepemd}, {args.way}-way {args.shot}-shot, {args.test_episode} episodes: "
        f"acc {result} ({watch})"
    )
    print(line)
    if args.extra_dir:
        append_line(Path("checkpoint", "eval", args.extra_dir, "results.txt"), f"{line}, {args.model_dir}")


if __name__ == "__main__":
    run_script(main, EmdError)
