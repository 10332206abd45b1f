"""Stage 2: meta-train the encoder on episodes, through the EMD; ends with the test protocol."""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the script without a traceback

import copy
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import eval as eval_script
from dataloader.arguments import (
    add_data_arguments,
    add_episode_arguments,
    draw_episodes,
    open_dataset,
    pixel_statistics,
)
from dataloader.episodes import episode_labels
from engine import arguments, distributed
from engine.arguments import add_evaluation_arguments, add_rank_arguments, add_run_arguments, add_training_arguments
from engine.loading import make_loader
from engine.run import LAST_STATE, fingerprint, is_finished, open_run, results
from engine.start import start
from engine.stopping import Stopped, stop_request
from engine.training import fit
from Models.arguments import add_model_arguments, build_model
from Models.emd import SOLVERS, ProblemError, SolverError, set_threads
from Models.weights import load_encoder_weights
from pictures.matches import FixedMatches, check_head
from utils import (
    BEST_WEIGHTS,
    InputError,
    Stopwatch,
    make_parser,
    named_generator,
    number_at_least,
    run_script,
    status,
    write_json,
)


def build_parser() -> ArgumentParser:

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
    group.add_argument(
        "-log_images",
        type=number_at_least(0, int),
        default=0,
        help="validation episodes of which one match is drawn every epoch, for TensorBoard",
    )
    group.add_argument("-val_solver", choices=SOLVERS, default="opencv", help="solver of validation and final test")
    group.add_argument(
        "-pretrain_dir",
        default="deepemd_pretrain_model/",
        help="encoder to start from: a checkpoint, a run folder of train_pretrain.py, or a folder with "
        '<dataset>/resnet12/max_acc.pth in it; "none" starts from random weights',
    )
    add_data_arguments(parser)
    add_episode_arguments(parser)
    add_model_arguments(parser)
    add_evaluation_arguments(parser)
    add_rank_arguments(parser)
    add_run_arguments(parser)
    return parser


def run_folder(args: Namespace) -> Path:
    return Path("checkpoint", args.dataset, args.deepemd, f"{args.shot}shot-{args.way}way", args.extra_dir)


def pretrained_weights(pretrain_dir: str, dataset: str) -> Path:
    """``-pretrain_dir`` may be a checkpoint, a run folder, or a folder laid out as the published encoders are."""
    path = Path(pretrain_dir)
    if path.is_file() or (path / BEST_WEIGHTS).is_file():
        return path
    return path / dataset / "resnet12" / BEST_WEIGHTS


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()

    args, folder = arguments.parse_run("train_meta.py", parser, argv, run_folder)
    if args.log_images:
        check_head(args.head)
    ranks, device, device_ids = start(args)
    if args.bs % ranks.size:
        raise InputError(
            f"-bs {args.bs}: expected a multiple of the {ranks.size} processes, which share the tasks of a step"
        )
    set_threads(arguments.solver_threads(args, ranks))

    train_set = open_dataset(args, "train", train=True)
    val_set = open_dataset(args, args.set, train=False)
    test_set = open_dataset(args, "test", train=False)
    train_episodes = draw_episodes(
        args, train_set, args.val_frequency * args.bs, seed=args.seed, name="train", train=True
    )
    val_episodes = draw_episodes(args, val_set, args.val_episode, seed=args.seed, name=args.set)
    test_episodes = draw_episodes(args, test_set, args.test_episode, seed=args.seed, name="test")
    for dataset in (train_set, val_set, test_set):
        dataset[0, 0]  # what is wrong with all images is reported before the first step

    model = build_model(args, device_ids=device_ids, **pixel_statistics(args)).to(device)
    weights = pretrained_weights(args.pretrain_dir, args.dataset)
    if args.pretrain_dir != "none" and not (args.resume is not None and (folder / LAST_STATE).is_file()):
        load_encoder_weights(
            model,
            weights,
            hint="Name yours with -pretrain_dir, run train_pretrain.py, or: bash download_pretrain_model.sh",
        )

    test_data = test_set.fingerprint()
    run = open_run(
        "train_meta.py",
        args,
        folder,
        ranks,
        weights=model,
        data={"train": train_set.fingerprint(), args.set: val_set.fingerprint(), "test": test_data},
        started_from=None if args.pretrain_dir == "none" else fingerprint(weights),
    )
    best = folder / BEST_WEIGHTS
    again = arguments.next_command(
        "eval.py", eval_script.build_parser(), args, model_dir=str(best), solver=args.val_solver, set="test"
    )
    if is_finished(args, run):
        status(f"the run in {folder} is finished: nothing to do")
        return

    shard = distributed.Shard(train_episodes, ranks, by_image=False)
    loader = make_loader(train_set, shard, num_workers=arguments.loader_processes(args, ranks), device=device)
    labels = episode_labels(args.way, args.query).to(device)

    def forward(images, _, at):
        order = named_generator(args.seed, "train", "sfc", *at)
        return model(images, way=args.way, shot=args.shot, generator=order), labels

    go_on = arguments.same_command("train_meta.py", parser, args)
    with stop_request(go_on if ranks.is_first else None) as stop:
        evaluator = arguments.make_evaluator(args, val_set, device=device, keep_pixels=True, ranks=ranks, stop=stop)

        drawn = draw_episodes(args, val_set, args.log_images if ranks.is_first else 0, seed=args.seed, name=args.set)
        matches = FixedMatches(
            val_set, list(drawn), way=args.way, shot=args.shot, seed=args.seed, device=device, solver=args.val_solver
        )

        def validate(epoch):
            val_episodes.set_epoch(epoch if args.random_val_task else 0)
            result = evaluator(model, val_episodes, solver=args.val_solver, title=args.set)
            for name, pixels in matches.draw(model):
                run.image(name, pixels, epoch)
            return result

        fit(
            model,
            forward,
            loader,
            validate,
            run,
            weights_of=model,
            device=device,
            accumulate=args.bs,
            skip_on=(SolverError, ProblemError),
            ranks=ranks,
            stop=stop,
            **arguments.training_settings(args),
        )

        watch = Stopwatch()
        try:
            tested = copy.deepcopy(model)  # the model itself is part of the state, which may be saved again
            if ranks.is_first:
                load_encoder_weights(tested, best)
            ranks.copy_from_first(tested)
            evaluator = arguments.make_evaluator(args, test_set, device=device, ranks=ranks, stop=stop)
            result = evaluator(tested, test_episodes, solver=args.val_solver, title="test")
            if ranks.is_first:
                write_json(folder / "results.json", results(args, result, best, watch.seconds, data=test_data))
            run.log(
                f"test, best model, {args.way}-way {args.shot}-shot, {args.test_episode} episodes: acc {result} ({watch})"
            )
            run.finish(test_acc=result.accuracy, test_interval=result.interval, test_loss=result.loss)
        except Stopped:
            raise
        except Exception:
            status(f"the final test failed; the best weights are in {best}, and this tests them: {again}")
            raise
    if ranks.is_first:
        print(f"next: {again}")


if __name__ == "__main__":
    run_script(main)
