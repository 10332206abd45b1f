"""Stage 1: pre-train the encoder by classifying the base classes, validated each epoch on episodes."""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the script without a traceback

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dataloader import arguments as data
from dataloader.episodes import SeededBatches
from engine import arguments
from engine.command_line import make_parser
from engine.distributed import Shard
from engine.loading import make_loader
from engine.run import open_run
from engine.start import start
from engine.statistics import prepare_statistics
from engine.stopping import stop_request
from engine.training import fit
from Models.arguments import add_model_arguments, build_model
from Models.classifier import Classifier
from Models.statistics import OF_STATISTICS
from utils import BEST_WEIGHTS, InputError, number_at_least, run_script, status

SCRIPT = "train_pretrain.py"
OWN_FLAGS = ("num_episode", "sync_bn")  # that train_meta.py does not have


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    images = "images per step"
    arguments.add_training_arguments(parser, max_epoch=120, bs=128, bs_help=images, lr=0.1, step_size=30, gamma=0.2)
    group = parser.add_argument_group("pre-training")
    group.add_argument("-num_episode", type=number_at_least(1, int), default=100, help="validation episodes per epoch")
    sync_bn = "several processes on GPUs: batch statistics of the whole batch, not of the part on each GPU"
    group.add_argument("-sync_bn", action="store_true", help=sync_bn)
    data.add_data_arguments(parser)
    data.add_episode_arguments(parser)
    add_model_arguments(parser)
    arguments.add_evaluation_arguments(parser)
    arguments.add_run_arguments(parser)
    return parser


def run_folder(args: Namespace) -> Path:
    rate, gamma = arguments.folder_number(args.lr, 4), arguments.folder_number(args.gamma, 2)
    settings = f"{args.bs}-{rate}-{args.step_size}-{gamma}{arguments.encoder_suffix(args)}"
    return Path("checkpoint", "pre_train", args.dataset, settings, args.extra_dir)


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args, folder, resumes = arguments.parse_run(SCRIPT, parser, argv, run_folder)
    ranks, device, device_ids = start(args)
    if args.bs < ranks.size:
        raise InputError(f"-bs {args.bs} is less than an image for each of the {ranks.size} processes")
    if args.sync_bn and (device.type != "cuda" or ranks.size == 1):
        raise InputError("-sync_bn requires several processes on GPUs (torchrun); leave it out")

    train_set = data.open_dataset(args, "train", train=True, deepemd="fcn")  # whole images, whatever the variant
    val_set = data.open_dataset(args, args.set, train=False)
    base_set = data.open_base_images(args) if args.norm in OF_STATISTICS else train_set
    train_batches = SeededBatches(len(train_set), args.bs, seed=args.seed, name="train")
    val_episodes = data.draw_episodes(args, val_set, args.num_episode, seed=args.seed, name=args.set)
    for dataset in (train_set, val_set):
        dataset[0, 0]  # what is wrong with all images is reported before the first step

    weights = "none" if resumes else None  # those of the run's state replace them
    model = build_model(args, device_ids=device_ids, weights=weights, **data.pixel_statistics(args)).to(device)
    classifier = Classifier(model.encoder, len(train_set.class_names)).to(device)
    if args.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(classifier)  # in place, so the model's encoder is converted too
    fingerprints = {"train": train_set.fingerprint(), args.set: val_set.fingerprint()}
    run = open_run(SCRIPT, args, folder, ranks, weights=classifier, data=fingerprints)
    if run.is_finished(args.max_epoch):
        status(f"the run in {folder} is finished: nothing to do")
        return

    shard = Shard(train_batches, ranks, by_image=True)
    loader = make_loader(train_set, shard, num_workers=arguments.loader_processes(args), device=device)
    network = nn.DataParallel(classifier, device_ids) if len(device_ids) > 1 else classifier

    def forward(images, labels, _):
        return network(images), labels

    with stop_request(arguments.resume_command(SCRIPT, argv, args) if ranks.is_first else None) as stop:
        evaluator = arguments.make_evaluator(args, val_set, device=device, keep_pixels=True, ranks=ranks, stop=stop)

        source = {"open_train": lambda: base_set, "num_workers": arguments.loader_processes(args), "ranks": ranks}

        def validate(epoch):
            prepare_statistics(args, model, "none", device=device, fresh=True, **source)
            val_episodes.set_epoch(epoch if args.random_val_task else 0)
            return evaluator(model, val_episodes, title=args.set)

        settings = arguments.fit_settings(args)
        fit(classifier, forward, loader, validate, run, settings, weights_of=model.encoder, ranks=ranks, stop=stop)
    run.finish()
    if ranks.is_first:
        changed = {"leave_out": OWN_FLAGS, "pretrain_dir": str(folder / BEST_WEIGHTS)}
        print(f"next: {arguments.next_command('train_meta.py', parser, args, **changed)}")


if __name__ == "__main__":
    run_script(main)
