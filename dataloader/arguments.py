"""The flags that choose the data and how it is seen."""

import argparse
import os

import torch

from dataloader.catalog import CATALOG
from dataloader.dataset import ImageDataset
from dataloader.episodes import EpisodeSampler, SeededBatches
from dataloader.views import CROP_TO, VIEWS, make_view
from utils import InputError, named_generator, number_at_least, whole_numbers

# Four halvings lie between an image and its feature map.
SMALLEST_IMAGE = 16


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that :func:`open_dataset` reads."""
    group = parser.add_argument_group("data")
    group.add_argument("-dataset", choices=CATALOG, default="miniimagenet", help="(default: %(default)s)")
    group.add_argument("-data_dir", default="datasets", help="folder that holds the data sets (default: %(default)s)")
    group.add_argument("-deepemd", choices=VIEWS, default="fcn", help="what becomes a node (default: %(default)s)")
    group.add_argument(
        "-num_patch", type=number_at_least(1, int), default=9, help="sampling: patches per image (default: %(default)s)"
    )
    group.add_argument(
        "-fixed_patches",
        action="store_true",
        help="sampling: draw the patches of an image once in validation and test, not anew for each use",
    )
    group.add_argument(
        "-patch_list",
        type=whole_numbers,
        default=(2, 3),
        metavar="CELLS",
        help="grid: cells along an edge, for each level of the pyramid (default: 2,3)",
    )
    group.add_argument(
        "-patch_ratio",
        type=number_at_least(1, float),
        default=2.0,
        help="grid: how much larger than its share a patch is, in evaluation (default: %(default)s)",
    )
    group.add_argument(
        "-image_size",
        type=number_at_least(SMALLEST_IMAGE, int),
        default=CROP_TO,
        help="pixels along an edge of what the encoder sees; smaller for quick runs (default: %(default)s)",
    )
    group.add_argument(
        "-num_workers",
        type=number_at_least(0, int),
        default=min(8, os.cpu_count() or 1),
        help="processes that load images; results do not depend on it (default: %(default)s)",
    )
    group.add_argument(
        "-verify_images", action="store_true", help="decode every image first, and leave out those that cannot be read"
    )


def add_episode_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that give an episode its shape."""
    group = parser.add_argument_group("episodes")
    for name, default, what in (
        ("way", 5, "classes"),
        ("shot", 1, "support images per class"),
        ("query", 15, "queries per class"),
    ):
        group.add_argument(
            f"-{name}", type=number_at_least(1, int), default=default, help=f"{what} (default: %(default)s)"
        )


def open_dataset(args: argparse.Namespace, split: str, *, train: bool, deepemd: str | None = None) -> ImageDataset:
    """One split as the flags say; ``deepemd`` in the place of the flag of that name."""
    spec = CATALOG[args.dataset]
    view = make_view(
        deepemd or args.deepemd,
        train=train,
        mean=spec.mean,
        std=spec.std,
        image_size=args.image_size,
        patch_list=args.patch_list,
        patch_ratio=args.patch_ratio,
        num_patch=args.num_patch,
    )
    return ImageDataset(args.dataset, split, data_dir=args.data_dir, view=view, verify=args.verify_images)


def draw_episodes(
    args: argparse.Namespace, dataset: ImageDataset, episodes: int, *, seed: int, name: str, train: bool = False
) -> SeededBatches:
    """Episodes of the shape that the flags give them; ``name`` keeps the draws of several uses apart.

    ``-fixed_patches`` holds for evaluation only; ``train`` passes it over.
    """
    try:
        sampler = EpisodeSampler(
            dataset.labels, episodes, args.way, args.shot + args.query, named_generator(seed, name, "episodes")
        )
    except InputError as error:
        raise InputError(f"{args.dataset}, {name} episodes: {error}") from None
    generator = named_generator(seed, name, "views")
    fixed = torch.randint(2**62, (len(dataset),), generator=generator) if args.fixed_patches and not train else None
    return SeededBatches(sampler, generator, seed_per_image=fixed)
