"""Stage 2: meta-train the encoder on episodes, through the EMD; ends with the test protocol."""

from pathlib import Path

from dataloader import add_data_arguments, add_episode_arguments, draw_episodes, episode_labels, open_dataset
from engine import add_evaluation_arguments, add_training_arguments, evaluate, fit, make_loader
from Models import add_model_arguments, build_model
from Models.emd import SOLVERS, EmdError, ProblemError, SolverError
from utils import (
    BEST_WEIGHTS,
    RunFolder,
    Stopwatch,
    add_run_arguments,
    choose_device,
    load_encoder_weights,
    make_parser,
    named_generator,
    next_command,
    number_at_least,
    run_script,
    set_seed,
)


def pretrained_weights(pretrain_dir: str, dataset: str) -> Path:
    """``-pretrain_dir`` may be a checkpoint, a run folder, or a folder laid out as the published encoders are."""
    path = Path(pretrain_dir)
    if path.is_file() or (path / BEST_WEIGHTS).is_file():
        return path
    return path / dataset / "resnet12" / BEST_WEIGHTS


def main() -> None:
    parser = make_parser(__doc__)
    count = number_at_least(1, int)
    add_training_arguments(
        parser,
        max_epoch=100,
        bs=1,
        bs_help="tasks per step, by gradient accumulation",
        lr=0.0005,
        step_size=10,
        gamma=0.5,
    )
    parser.add_argument(
        "-val_frequency", type=count, default=50, help="training steps per epoch (default: %(default)s)"
    )
    parser.add_argument(
        "-val_episode", type=count, default=1000, help="validation episodes per epoch (default: %(default)s)"
    )
    parser.add_argument(
        "-test_episode", type=count, default=5000, help="episodes of the final test (default: %(default)s)"
    )
    parser.add_argument(
        "-val_solver",
        choices=SOLVERS,
        default="opencv",
        help="solver of validation and final test (default: %(default)s)",
    )
    parser.add_argument(
        "-pretrain_dir",
        default="deepemd_pretrain_model/",
        help="encoder to start from: a checkpoint, a run folder of train_pretrain.py, or a folder with "
        '<dataset>/resnet12/max_acc.pth in it; "none" starts from nothing (default: %(default)s)',
    )
    add_run_arguments(parser)
    add_data_arguments(parser)
    add_episode_arguments(parser)
    add_evaluation_arguments(parser)
    add_model_arguments(parser)
    args = parser.parse_args()

    device, device_ids = choose_device(args.gpu)
    seed = set_seed(args.seed)
    model = build_model(args, device_ids=device_ids).to(device)
    if args.pretrain_dir != "none":
        load_encoder_weights(model, pretrained_weights(args.pretrain_dir, args.dataset))

    train_set = open_dataset(args, "train", train=True)
    val_set = open_dataset(args, args.set, train=False)
    test_set = open_dataset(args, "test", train=False)
    train_episodes = draw_episodes(args, train_set, args.val_frequency * args.bs, seed=seed, name="train", train=True)
    val_episodes = draw_episodes(args, val_set, args.val_episode, seed=seed, name=args.set)
    val_episodes = val_episodes if args.random_val_task else list(val_episodes)
    test_episodes = draw_episodes(args, test_set, args.test_episode, seed=seed, name="final test")

    loader = make_loader(train_set, train_episodes, num_workers=args.num_workers, device=device)
    labels = episode_labels(args.way, args.query).to(device)
    settings = {"way": args.way, "shot": args.shot}
    sfc_order = named_generator(seed, "train", "sfc")

    def forward(images, _):
        return model(images, generator=sfc_order, **settings), labels

    def run_episodes(dataset, episodes, title):
        return evaluate(
            model,
            dataset,
            episodes,
            labels,
            device=device,
            seed=seed,
            num_workers=args.num_workers,
            solver=args.val_solver,
            feature_cache=args.feature_cache,
            episode_batch=args.episode_batch,
            title=title,
            **settings,
        )

    path = Path("checkpoint", args.dataset, args.deepemd, f"{args.shot}shot-{args.way}way", args.extra_dir)
    run = RunFolder(path, args)
    fit(
        model,
        forward,
        loader,
        lambda: run_episodes(val_set, val_episodes, args.set),
        run,
        model,
        args,
        device=device,
        accumulate=args.bs,
        skip_on=(SolverError, ProblemError),
    )

    load_encoder_weights(model, run.path / BEST_WEIGHTS)
    watch = Stopwatch()
    result = run_episodes(test_set, test_episodes, "test")
    run.log(f"test, best model, {args.way}-way {args.shot}-shot, {args.test_episode} episodes: acc {result} ({watch})")
    run.finish(test_acc=result.accuracy, test_interval=result.interval, test_loss=result.loss)
    keep = "dataset data_dir deepemd image_size way shot query num_patch patch_list patch_ratio fixed_patches feature_pyramid"
    keep += " temperature metric norm gpu seed num_workers test_episode feature_cache episode_batch amp compile"
    more = {"solver": args.val_solver} if args.val_solver != "opencv" else {}
    print(f"next: {next_command('eval.py', parser, args, keep.split(), model_dir=run.path / BEST_WEIGHTS, **more)}")


if __name__ == "__main__":
    run_script(main, EmdError)
