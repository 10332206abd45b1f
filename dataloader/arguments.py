"""The flags that choose the data and the views of an image."""

import argparse

from dataloader.catalog import CATALOG
from dataloader.dataset import ImageDataset
from dataloader.episodes import EpisodeSampler, SeededEpisodes, Task
from dataloader.views import CROP_TO, VIEWS, View, make_view
from utils import InputError, number_at_least, number_between, whole_numbers

# Four halvings lie between an image and its feature map. The upper bounds guard against slips of the keyboard.
SMALLEST_IMAGE, LARGEST_IMAGE = 16, 1024
MOST_PATCHES, MOST_PER_EPISODE, LARGEST_RATIO = 1000, 1000, 100
LARGEST_EPISODE = 2**33  # bytes of pixels


def add_data_arguments(parser: argparse.ArgumentParser, *, has_splits: bool = True) -> None:
    """The flags that :func:`view_of` reads, and where splits are read those of :func:`open_dataset` and the loader."""
    data = parser.add_argument_group("data")
    what = (
        "data set to read" if has_splits else "data set that the model was trained on, whose pixel statistics are used"
    )
    data.add_argument("-dataset", choices=CATALOG, default="miniimagenet", help=what)
    if has_splits:
        data.add_argument("-data_dir", default="datasets", help="folder that holds the data sets")
        data.add_argument(
            "-verify_images", action="store_true", help="decode every image first, and skip those that cannot be read"
        )
        data.add_argument(
            "-num_workers",
            type=number_at_least(0, int),
            help="processes that load images; results do not depend on it (default: the cores that this process may use, at "
            "most 8, divided by the processes of the run on this machine)",
        )

    views = parser.add_argument_group("views of an image")
    views.add_argument("-deepemd", choices=VIEWS, default="fcn", help="what becomes a node")
    views.add_argument(
        "-image_size",
        type=number_between(SMALLEST_IMAGE, LARGEST_IMAGE, int),
        default=CROP_TO,
        help=f"pixels along an edge of what the encoder sees, {SMALLEST_IMAGE} to {LARGEST_IMAGE}; less for quick runs",
    )
    views.add_argument(
        "-num_patch", type=number_between(1, MOST_PATCHES, int), default=9, help="sampling: patches per image"
    )
    if has_splits:
        views.add_argument(
            "-fixed_patches",
            action="store_true",
            help="sampling: draw the patches of an image once in validation and test, not for each use",
        )
    views.add_argument(
        "-patch_list",
        type=_grid_levels,
        default="2,3",
        metavar="CELLS",
        help="grid: cells along an edge, for each level of the pyramid",
    )
    views.add_argument(
        "-patch_ratio",
        type=number_between(1, LARGEST_RATIO, float),
        default=2.0,
        help="grid: how much larger than its share of the image a patch is, in evaluation",
    )


def _grid_levels(text: str) -> tuple[int, ...]:
    levels = whole_numbers(text)
    patches = sum(cells**2 for cells in levels)
    if patches > MOST_PATCHES:
        raise argparse.ArgumentTypeError(
            f"{text} makes {patches} patches of an image; at most {MOST_PATCHES} are allowed"
        )
    return levels


def add_episode_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that :func:`draw_episodes` reads."""
    count = number_between(1, MOST_PER_EPISODE, int)
    group = parser.add_argument_group("episodes")
    group.add_argument("-way", type=count, default=5, help="classes per episode")
    group.add_argument("-shot", type=count, default=1, help="support images per class")
    group.add_argument("-query", type=count, default=15, help="queries per class")


def open_dataset(args: argparse.Namespace, split: str, *, train: bool, deepemd: str | None = None) -> ImageDataset:
    """One split as the flags say; ``deepemd`` overrides the flag of that name."""
    view = view_of(args, train=train, deepemd=deepemd)
    return ImageDataset(args.dataset, split, data_dir=args.data_dir, view=view, verify=args.verify_images)


def view_of(args: argparse.Namespace, *, train: bool, deepemd: str | None = None) -> View:
    """The view that the flags ask for; ``deepemd`` overrides the flag of that name."""
    return make_view(
        deepemd or args.deepemd,
        train=train,
        image_size=args.image_size,
        patch_list=args.patch_list,
        patch_ratio=args.patch_ratio,
        num_patch=args.num_patch,
    )


def pixel_statistics(args: argparse.Namespace) -> dict[str, tuple[float, float, float] | None]:
    """``mean`` and ``std`` of the pixels of the data set, for its model; None where the encoder's own are published."""
    return {"mean": CATALOG[args.dataset].mean, "std": CATALOG[args.dataset].std}


def draw_episodes(
    args: argparse.Namespace, dataset: ImageDataset, episodes: int, *, seed: int, name: str, train: bool = False
) -> SeededEpisodes:
    """Episodes of the task that the flags describe; ``name`` keeps the draws of several uses apart.

    ``-fixed_patches`` is for evaluation; with ``train`` it is ignored.

    Raises:
        InputError: the data set has too few classes, a class has too few images, or an episode is too large for memory.
    """
    task = Task(args.way, args.shot, args.query)
    _check_memory(task, dataset.view.patches, args.image_size)
    try:
        sampler = EpisodeSampler(dataset.labels, episodes, task.way, task.per_class)
    except InputError as error:
        raise InputError(f"{args.dataset}, {name} episodes: {error}") from None
    fixed_views = len(dataset) if args.fixed_patches and not train else None
    return SeededEpisodes(sampler, seed=seed, name=name, fixed_views=fixed_views)


def _check_memory(task: Task, patches: int, image_size: int) -> None:
    size = task.way * task.per_class * patches * 3 * image_size**2
    if size > LARGEST_EPISODE:
        raise InputError(
            f"an episode of {task.way} classes with {task.per_class} images of {patches} patches needs {size / 2**30:.0f} GiB "
            f"for its pixels; at most {LARGEST_EPISODE / 2**30:.0f} GiB are allowed. Lower -way, -query, -image_size or the "
            "number of patches"
        )
