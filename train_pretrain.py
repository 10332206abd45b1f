"""Stage 1: pre-train the encoder by classifying the base classes, validated each epoch on episodes."""

from pathlib import Path

from torch.nn import DataParallel
from torch.utils.data import BatchSampler, RandomSampler

from dataloader import (
    SeededBatches,
    add_data_arguments,
    add_episode_arguments,
    draw_episodes,
    episode_labels,
    open_dataset,
)
from engine import add_evaluation_arguments, add_training_arguments, evaluate, fit, make_loader
from Models import Classifier, add_model_arguments, build_model
from Models.emd import EmdError
from utils import (
    BEST_WEIGHTS,
    RunFolder,
    add_run_arguments,
    choose_device,
    make_parser,
    named_generator,
    next_command,
    number_at_least,
    run_script,
    set_seed,
)


def main() -> None:
    parser = make_parser(__doc__)
    add_training_arguments(parser, max_epoch=120, bs=128, bs_help="images per step", lr=0.1, step_size=30, gamma=0.2)
    parser.add_argument(
        "-num_episode",
        type=number_at_least(1, int),
        default=100,
        help="validation episodes per epoch (default: %(default)s)",
    )
    add_run_arguments(parser)
    add_data_arguments(parser)
    add_episode_arguments(parser)
    add_evaluation_arguments(parser)
    add_model_arguments(parser)
    args = parser.parse_args()

    device, device_ids = choose_device(args.gpu)
    seed = set_seed(args.seed)
    train_set = open_dataset(args, "train", train=True, deepemd="fcn")  # whole images, whatever the variant
    val_set = open_dataset(args, args.set, train=False)
    val_episodes = draw_episodes(args, val_set, args.num_episode, seed=seed, name=args.set)
    val_episodes = val_episodes if args.random_val_task else list(val_episodes)

    model = build_model(args, device_ids=device_ids).to(device)
    classifier = Classifier(model.encoder, len(train_set.class_names)).to(device)
    network = DataParallel(classifier, device_ids) if len(device_ids) > 1 else classifier

    shuffled = BatchSampler(
        RandomSampler(train_set, generator=named_generator(seed, "train", "order")), args.bs, drop_last=False
    )
    train_batches = SeededBatches(shuffled, named_generator(seed, "train", "views"))
    train_loader = make_loader(train_set, train_batches, num_workers=args.num_workers, device=device)

    def validate():
        return evaluate(
            model,
            val_set,
            val_episodes,
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

    path = Path(
        "checkpoint",
        "pre_train",
        args.dataset,
        f"{args.bs}-{args.lr:.4f}-{args.step_size}-{args.gamma:.2f}",
        args.extra_dir,
    )
    run = RunFolder(path, args)
    fit(
        network,
        lambda images, labels: (network(images), labels),
        train_loader,
        validate,
        run,
        model.encoder,
        args,
        device=device,
    )
    run.finish()
    keep = ["dataset", "data_dir", "deepemd", "image_size", "way", "query", "gpu", "seed", "num_workers"]
    print(f"next: {next_command('train_meta.py', parser, args, keep, pretrain_dir=run.path / BEST_WEIGHTS)}")


if __name__ == "__main__":
    run_script(main, EmdError)
