"""Stage 1: pre-train the encoder by classifying the base classes, validated each epoch on episodes."""

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
    from utils import add_run_arguments, number_at_least

    parser = make_parser(__doc__)
    add_training_arguments(parser, max_epoch=120, bs=128, bs_help="images per step", lr=0.1, step_size=30, gamma=0.2)
    group = parser.add_argument_group("pre-training")
    group.add_argument("-num_episode", type=number_at_least(1, int), default=100, help="validation episodes per epoch")
    add_data_arguments(parser)
    add_episode_arguments(parser)
    add_model_arguments(parser)
    add_evaluation_arguments(parser)
    add_run_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from torch.nn import DataParallel

    import train_meta
    from dataloader.arguments import draw_episodes, open_dataset
    from dataloader.episodes import SeededBatches
    from engine.arguments import folder_number, make_evaluator, next_command, training_settings
    from engine.loading import make_loader
    from engine.training import fit
    from Models.arguments import build_model
    from Models.classifier import Classifier
    from utils import RunFolder, choose_device, set_seed

    device, device_ids = choose_device(args.gpu)
    args.seed = set_seed(args.seed, deterministic=args.deterministic)
    train_set = open_dataset(args, "train", train=True, deepemd="fcn")  # whole images, whatever the variant
    val_set = open_dataset(args, args.set, train=False)
    train_batches = SeededBatches(len(train_set), args.bs, seed=args.seed, name="train")
    val_episodes = draw_episodes(args, val_set, args.num_episode, seed=args.seed, name=args.set)

    model = build_model(args, device_ids=device_ids).to(device)
    classifier = Classifier(model.encoder, len(train_set.class_names)).to(device)
    network = DataParallel(classifier, device_ids) if len(device_ids) > 1 else classifier
    for dataset in (train_set, val_set):
        dataset[0]  # what is wrong with all images is told before the first step

    loader = make_loader(train_set, train_batches, num_workers=args.num_workers, device=device)
    evaluator = make_evaluator(args, val_set, device=device, keep_pixels=True)

    def forward(images, labels, _):
        return network(train_set.view.normalize(images)), labels

    def validate(epoch):
        val_episodes.set_epoch(epoch if args.random_val_task else 0)
        return evaluator(model, val_episodes, title=args.set)

    settings = f"{args.bs}-{folder_number(args.lr, 4)}-{args.step_size}-{folder_number(args.gamma, 2)}"
    run = RunFolder(
        Path("checkpoint", "pre_train", args.dataset, settings, args.extra_dir),
        vars(args),
        weights=model,
        kept=args.max_epoch if args.save_all else 0,
    )
    fit(network, forward, loader, validate, run, model.encoder, device=device, **training_settings(args))
    run.finish()
    best = str(run.path / BEST_WEIGHTS)
    print(f"next: {next_command('train_meta.py', train_meta.build_parser(), args, pretrain_dir=best)}")


if __name__ == "__main__":
    run_script(main)
