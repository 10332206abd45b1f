"""Stage 2: meta-train the encoder on episodes, through the EMD; ends with the test protocol."""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the script without a traceback

import copy
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import utils
from dataloader import arguments as data
from dataloader.episodes import episode_labels
from engine import arguments
from engine.command_line import make_parser
from engine.distributed import Shard
from engine.loading import make_loader
from engine.results import final_test
from engine.run import fingerprint, open_run
from engine.start import start
from engine.statistics import keep_for_run
from engine.stopping import Stopped, stop_request
from engine.training import fit
from Models.arguments import add_model_arguments, build_model, solver_choice, starting_weights
from Models.backbones import backbone_class
from Models.emd import ProblemError, SolverError
from Models.package import is_package, weights_file
from Models.weights import load_encoder_weights
from pictures.matches import check_head, draw_fixed
from utils import BEST_WEIGHTS, InputError, named_generator, number_at_least, number_between, run_script

SCRIPT, PRETRAINED = "train_meta.py", "deepemd_pretrain_model/"
# Flags that eval.py does not have, and -set, which means the validation split here.
OWN_FLAGS = (
    *("val_frequency", "val_episode", "val_solver", "random_val_task", "set"),
    *("log_images", "pretrain_dir", "save_all"),
)


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    tasks = "tasks per step, by gradient accumulation"
    arguments.add_training_arguments(parser, max_epoch=100, bs=1, bs_help=tasks, lr=0.0005, step_size=10, gamma=0.5)
    count = number_at_least(1, int)
    group = parser.add_argument_group("meta-training")
    group.add_argument("-val_frequency", type=count, default=50, help="training steps per epoch")
    group.add_argument("-val_episode", type=count, default=1000, help="validation episodes per epoch")
    arguments.add_test_episode_argument(group, help="episodes of the final test")
    log_images = "validation episodes of which one match is drawn every epoch, for TensorBoard"
    group.add_argument("-log_images", type=number_between(0, 100, int), default=0, help=log_images)
    shown = {"metavar": "NAME[:OPTION=VALUE,...]", "help": "solver of validation and final test, as -solver"}
    group.add_argument("-val_solver", type=solver_choice, default="opencv", **shown)
    layout = '<dataset>/resnet12/max_acc.pth in it; "none" starts from random weights'
    encoder = f"encoder to start from: what -model_dir of eval.py takes, or a folder with {layout} "
    encoder += f"(default: {PRETRAINED}; timm: the model with its own weights)"
    group.add_argument("-pretrain_dir", metavar="SOURCE", help=encoder)
    parser.completions.append(complete)
    data.add_data_arguments(parser)
    data.add_episode_arguments(parser)
    add_model_arguments(parser)
    arguments.add_evaluation_arguments(parser)
    arguments.add_run_arguments(parser)
    return parser


def complete(args: Namespace) -> None:
    if args.pretrain_dir is None and not backbone_class(args.backbone)[0].comes_with_weights:
        args.pretrain_dir = PRETRAINED


def run_folder(args: Namespace) -> Path:
    task = f"{args.shot}shot-{args.way}way{arguments.encoder_suffix(args)}"
    return Path("checkpoint", args.dataset, args.deepemd, task, args.extra_dir)


def pretrained_weights(args: Namespace) -> Path:
    """``-pretrain_dir`` may be what ``-model_dir`` is, or a folder laid out as the published encoders are."""
    path = weights_file(args.pretrain_dir)
    if path.is_file() or is_package(path):
        return path
    return Path(args.pretrain_dir, args.dataset, args.backbone, BEST_WEIGHTS)


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args, folder, resumes = arguments.parse_run(SCRIPT, parser, argv, run_folder)
    if args.log_images:
        check_head(args.head)
    ranks, device, device_ids = start(args)
    if args.bs % ranks.size:
        shared = f"the {ranks.size} processes, which share the tasks of a step"
        raise InputError(f"-bs {args.bs} is not a multiple of {shared}")

    splits = ("train", args.set, "test")
    train_set, val_set, test_set = (data.open_dataset(args, split, train=split == "train") for split in splits)
    tasks = args.val_frequency * args.bs
    train_episodes = data.draw_episodes(args, train_set, tasks, seed=args.seed, name="train", train=True)
    val_episodes = data.draw_episodes(args, val_set, args.val_episode, seed=args.seed, name=args.set)
    test_episodes = data.draw_episodes(args, test_set, args.test_episode, seed=args.seed, name="test")
    for dataset in (train_set, val_set, test_set):
        dataset[0, 0]  # what is wrong with all images is reported before the first step

    pixels = data.pixel_statistics(args)
    weights = "none" if resumes else starting_weights(args, args.pretrain_dir)  # the run's state replaces them
    given = {"device_ids": device_ids, "val_solver": args.val_solver, "weights": weights}
    model = build_model(args, **given, **pixels).to(device)
    started_from = None if resumes else fingerprint(model.encoder.weights)
    if args.pretrain_dir not in (None, "none") and not resumes:
        hint = "Set -pretrain_dir, run train_pretrain.py, or download the published weights: bash download_pretrain_model.sh"
        load_encoder_weights(model, pretrained_weights(args), hint=hint)
        started_from = fingerprint(pretrained_weights(args))
    sets = {"train": train_set, args.set: val_set, "test": test_set}
    fingerprints = {split: dataset.fingerprint() for split, dataset in sets.items()}
    run = open_run(SCRIPT, args, folder, ranks, weights=model, data=fingerprints, started_from=started_from)
    if run.is_finished(args.max_epoch):
        utils.status(f"the run in {folder} is finished: nothing to do")
        return

    start_weights = "none" if args.pretrain_dir in (None, "none") else pretrained_weights(args)
    source = {"open_train": partial(data.open_base_images, args), "num_workers": arguments.loader_processes(args)}
    # What the norms base and standard need, beside the weights: it stays a fixed layer while the encoder learns.
    keep_for_run(args, model, start_weights, folder, resumes=resumes, device=device, ranks=ranks, **source)

    shard = Shard(train_episodes, ranks, by_image=False)
    loader = make_loader(train_set, shard, num_workers=arguments.loader_processes(args), device=device)
    labels = episode_labels(args.way, args.query).to(device)

    def forward(images, _, place):
        """One task through encoder, prototypes and matching; :func:`fit` takes the cross entropy of its queries."""
        order = named_generator(args.seed, "train", "sfc", *place)
        return model(images, way=args.way, shot=args.shot, generator=order), labels

    with stop_request(arguments.resume_command(SCRIPT, argv, args) if ranks.is_first else None) as stop:
        evaluator = arguments.make_evaluator(args, val_set, device=device, keep_pixels=True, ranks=ranks, stop=stop)
        log_images = args.log_images if ranks.is_first else 0
        drawn = data.draw_episodes(args, val_set, log_images, seed=args.seed, name=args.set)
        shape = {"way": args.way, "shot": args.shot, "seed": args.seed, "device": device, "solver": args.val_solver}

        def validate(epoch):
            val_episodes.set_epoch(epoch if args.random_val_task else 0)
            result = evaluator(model, val_episodes, solver=args.val_solver, title=args.set)
            for name, pixels in draw_fixed(model, val_set, list(drawn), **shape):
                run.image(name, pixels, epoch)
            return result

        settings = arguments.fit_settings(args, accumulate=args.bs, skip_on=(SolverError, ProblemError))
        fit(model, forward, loader, validate, run, settings, weights_of=model, ranks=ranks, stop=stop)

        # The test protocol, with the weights of the best epoch.
        best = folder / BEST_WEIGHTS
        changed = {"leave_out": OWN_FLAGS, "model_dir": str(best), "solver": args.val_solver}
        test_command = arguments.next_command("eval.py", parser, args, **changed)
        try:
            tested = copy.deepcopy(model)  # the model itself is part of the state, which may be saved again
            if ranks.is_first:
                load_encoder_weights(tested, best)
            ranks.copy_from_first(tested)
            evaluator = arguments.make_evaluator(args, test_set, device=device, ranks=ranks, stop=stop)
            settings = {"weights": best, "data": fingerprints["test"], "solver": args.val_solver, "resume": resumes}
            line, found = final_test(evaluator, tested, test_episodes, args, folder, **settings)
        except Stopped:
            raise
        except Exception:
            utils.status(f"the final test failed. The best weights are in {best}; to test them, run: {test_command}")
            raise
    run.log(f"test, best model, {line}")
    run.finish(test_acc=found["accuracy"], test_interval=found["interval"], test_loss=found["loss"])
    if ranks.is_first:
        print(f"next: {test_command}")


if __name__ == "__main__":
    run_script(main)
