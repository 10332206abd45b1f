"""Stage 2: meta-train the encoder on episodes, through the EMD; ends with the test protocol."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

# Everything else is imported where it is needed, so that Ctrl-C ends a starting script quietly.
from utils import BEST_WEIGHTS, make_parser, run_script


def build_parser() -> ArgumentParser:
    from dataloader.arguments import add_data_arguments, add_episode_arguments
    from engine.arguments import add_evaluation_arguments, add_training_arguments
    from Models.arguments import add_model_arguments
    from Models.emd import SOLVERS
    from utils import add_run_arguments, number_at_least

    parser = make_parser(__doc__)
    add_training_arguments(
        parser,
        max_epoch=100,
        bs=1,
        bs_help="tasks per step, by gradient accumulation",
        lr=0.0005,
        step_size=10,
        gamma=0.5,
    )
    count = number_at_least(1, int)
    group = parser.add_argument_group("meta-training")
    group.add_argument("-val_frequency", type=count, default=50, help="training steps per epoch")
    group.add_argument("-val_episode", type=count, default=1000, help="validation episodes per epoch")
    group.add_argument("-test_episode", type=count, default=5000, help="episodes of the final test")
    group.add_argument("-val_solver", choices=SOLVERS, default="opencv", help="solver of validation and final test")
    group.add_argument(
        "-pretrain_dir",
        default="deepemd_pretrain_model/",
        help="encoder to start from: a checkpoint, a run folder of train_pretrain.py, or a folder with "
        '<dataset>/resnet12/max_acc.pth in it; "none" starts from nothing',
    )
    add_data_arguments(parser)
    add_episode_arguments(parser)
    add_model_arguments(parser)
    add_evaluation_arguments(parser)
    add_run_arguments(parser)
    return parser


def pretrained_weights(pretrain_dir: str, dataset: str) -> Path:
    """``-pretrain_dir`` may be a checkpoint, a run folder, or a folder laid out as the published encoders are."""
    path = Path(pretrain_dir)
    if path.is_file() or (path / BEST_WEIGHTS).is_file():
        return path
    return path / dataset / "resnet12" / BEST_WEIGHTS


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    import eval as eval_script
    from dataloader.arguments import draw_episodes, open_dataset
    from dataloader.episodes import episode_labels
    from engine.arguments import make_evaluator, next_command, training_settings
    from engine.loading import make_loader
    from engine.training import fit
    from Models.arguments import build_model
    from Models.emd import ProblemError, SolverError
    from utils import RunFolder, Stopwatch, choose_device, load_encoder_weights, named_generator, set_seed

    device, device_ids = choose_device(args.gpu)
    args.seed = set_seed(args.seed, deterministic=args.deterministic)
    model = build_model(args, device_ids=device_ids).to(device)
    if args.pretrain_dir != "none":
        weights = pretrained_weights(args.pretrain_dir, args.dataset)
        load_encoder_weights(
            model,
            weights,
            hint="Name yours with -pretrain_dir, run train_pretrain.py, or: bash download_pretrain_model.sh",
        )

    train_set = open_dataset(args, "train", train=True)
    val_set = open_dataset(args, args.set, train=False)
    test_set = open_dataset(args, "test", train=False)
    train_episodes = draw_episodes(
        args, train_set, args.val_frequency * args.bs, seed=args.seed, name="train", train=True
    )
    val_episodes = draw_episodes(args, val_set, args.val_episode, seed=args.seed, name=args.set)
    test_episodes = draw_episodes(args, test_set, args.test_episode, seed=args.seed, name="test")
    for dataset in (train_set, val_set, test_set):
        dataset[0]  # what is wrong with all images is told before the first step

    loader = make_loader(train_set, train_episodes, num_workers=args.num_workers, device=device)
    evaluator = make_evaluator(args, val_set, device=device, keep_pixels=True)
    labels = episode_labels(args.way, args.query).to(device)

    def forward(images, _, at):
        order = named_generator(args.seed, "train", "sfc", *at)
        return model(train_set.view.normalize(images), way=args.way, shot=args.shot, generator=order), labels

    def validate(epoch):
        val_episodes.set_epoch(epoch if args.random_val_task else 0)
        return evaluator(model, val_episodes, solver=args.val_solver, title=args.set)

    run = RunFolder(
        Path("checkpoint", args.dataset, args.deepemd, f"{args.shot}shot-{args.way}way", args.extra_dir),
        vars(args),
        weights=model,
        kept=args.max_epoch if args.save_all else 0,
    )
    fit(
        model,
        forward,
        loader,
        validate,
        run,
        model,
        device=device,
        accumulate=args.bs,
        skip_on=(SolverError, ProblemError),
        **training_settings(args),
    )

    best = run.path / BEST_WEIGHTS
    again = next_command(
        "eval.py", eval_script.build_parser(), args, model_dir=str(best), solver=args.val_solver, set="test"
    )
    watch = Stopwatch()
    try:
        load_encoder_weights(model, best)
        evaluator = make_evaluator(args, test_set, device=device)
        result = evaluator(model, test_episodes, solver=args.val_solver, title="test")
        run.log(
            f"test, best model, {args.way}-way {args.shot}-shot, {args.test_episode} episodes: acc {result} ({watch})"
        )
        run.finish(test_acc=result.accuracy, test_interval=result.interval, test_loss=result.loss)
    finally:  # a test that fails can be done again
        print(f"next: {again}")


if __name__ == "__main__":
    run_script(main)
