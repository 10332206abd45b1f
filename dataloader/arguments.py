"""The flags that choose the data and the views of an image."""

import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from dataloader.catalog import CATALOG
from dataloader.dataset import ImageDataset
from dataloader.episode_files import read_episodes
from dataloader.episodes import EpisodeSampler, ListedEpisodes, SeededEpisodes
from dataloader.features import FeatureSet, read_features
from dataloader.readers import image_files
from dataloader.views import CROP_TO, INTERPOLATIONS, VIEWS, View, make_view
from utils import InputError, number_between, printable, status, whole_numbers

# Four halvings lie between an image and its feature map. The upper bounds guard against typing errors.
SMALLEST_IMAGE, LARGEST_IMAGE = 16, 1024
MOST_PATCHES, MOST_PER_EPISODE, LARGEST_RATIO = 1000, 1000, 100
LARGEST_EPISODE = 8  # GiB of pixels


def add_data_arguments(parser: ArgumentParser, *, has_splits: bool = True) -> None:
    """The flags that :func:`view_of` reads, and where splits are read those of :func:`open_dataset` and the loader."""
    data = parser.add_argument_group("data")
    views = parser.add_argument_group("views of an image")
    what = "to read" if has_splits else "that the model was trained on, whose pixel statistics are used"
    data.add_argument("-dataset", choices=CATALOG, default="miniimagenet", help=f"data set {what}")
    if has_splits:
        data.add_argument("-data_dir", metavar="DIR", default="datasets", help="folder that holds the data sets")
        text = "decode every image first, and skip those that cannot be read"
        data.add_argument("-verify_images", action="store_true", help=text)
        cores = "the cores that this process may use, at most 8, divided by the processes of the run on this machine"
        text = f"processes that load images; results do not depend on it (default: {cores})"
        data.add_argument("-num_workers", type=number_between(0, 256, int), metavar="N", help=text)

    text = "what becomes a node. fcn: a cell of the feature map; grid: a cell of an image pyramid; sampling: a random patch"
    views.add_argument("-deepemd", choices=VIEWS, default="fcn", help=text)
    text = f"pixels along an edge of the images and patches that the encoder sees, {SMALLEST_IMAGE} to {LARGEST_IMAGE} "
    text += f"(default: {CROP_TO}; timm: what the model was made for, at most 224)"
    edge = number_between(SMALLEST_IMAGE, LARGEST_IMAGE, int)
    views.add_argument("-image_size", type=edge, metavar="N", help=text)
    text = "how images are resized (default: bilinear; timm: as the model was trained)"
    views.add_argument("-interpolation", choices=INTERPOLATIONS, help=text)
    patches = number_between(1, MOST_PATCHES, int)
    views.add_argument("-num_patch", type=patches, default=9, help="sampling: patches per image")
    if has_splits:
        text = "sampling: draw the patches of an image once in validation and test, not for each use"
        views.add_argument("-fixed_patches", action="store_true", help=text)
    text = "grid: cells along an edge, for each level of the pyramid"
    views.add_argument("-patch_list", type=_grid_levels, default="2,3", metavar="CELLS", help=text)
    text = "grid: how much larger than its share of the image a patch is, in evaluation"
    views.add_argument("-patch_ratio", type=number_between(1, LARGEST_RATIO, float), default=2.0, help=text)
    parser.completions.append(_complete)


def _complete(args: Namespace) -> None:
    """Fill in the defaults that the model's flags, if there are any, have left open."""
    args.image_size = args.image_size or CROP_TO
    args.interpolation = args.interpolation or "bilinear"


def _grid_levels(text: str) -> tuple[int, ...]:
    levels = whole_numbers(text)
    patches = sum(cells**2 for cells in levels)
    if patches > MOST_PATCHES:
        raise ArgumentTypeError(f"{text} makes {patches} patches of an image; at most {MOST_PATCHES} are allowed")
    return levels


def add_episode_arguments(parser: ArgumentParser) -> None:
    """The flags that :func:`draw_episodes` reads."""
    count = number_between(1, MOST_PER_EPISODE, int)
    group = parser.add_argument_group("episodes")
    group.add_argument("-way", type=count, default=5, help="classes per episode")
    group.add_argument("-shot", type=count, default=1, help="support images per class")
    group.add_argument("-query", type=count, default=15, help="queries per class")


def add_episode_file_arguments(group: Any) -> None:
    """The flags of files of episodes, which :func:`choose_episodes` reads."""
    what = "evaluate the episodes of a JSON file instead of drawn ones; it decides -way, -shot and -query"
    group.add_argument("-episodes_in", metavar="FILE", help=f"{what}, and -test_episode if that is not given")
    what = "write the episodes to FILE, for -episodes_in or another program"
    group.add_argument("-episodes_out", metavar="FILE", help=what)


def add_features_argument(group: Any) -> None:
    """The flag that makes :func:`open_dataset` read nodes instead of images."""
    what = "nodes of an .npz file, from -features_out or another program, instead of images and an encoder"
    group.add_argument("-features", metavar="FILE", help=f"{what}; flags of either are ignored, except -map_size")


def open_dataset(args: Namespace, split: str, *, train: bool, deepemd: str | None = None) -> ImageDataset | FeatureSet:
    """One split as the flags say, or the file of ``-features``; ``deepemd`` overrides the flag of that name."""
    if getattr(args, "features", None):
        features = read_features(args.features, map_size=args.map_size or 0)
        images, channels, nodes = features.nodes.shape
        found = f"{images} images of {len(features.class_names)} classes, {nodes} nodes of {channels} channels"
        status(f"features: {printable(args.features)} ({found})")
        return features
    view = view_of(args, train=train, deepemd=deepemd)
    return ImageDataset(args.dataset, split, data_dir=args.data_dir, view=view, verify=args.verify_images)


def open_base_images(args: Namespace, classified: ImageDataset | FeatureSet | None = None) -> ImageDataset:
    """Images for statistics of training nodes, as evaluation sees them: those below the folder ``-statistics``, else the
    training split. InputError if there are none, or if the folder has images that are ``classified``."""
    if getattr(args, "features", None):
        if args.statistics:
            advice = "name a file of statistics, or leave it out for the train_nodes of the file"
            raise InputError(f"-statistics {args.statistics}: with -features, no encoder sees images; {advice}")
        given = f"-norm {args.norm} needs statistics of training nodes: {printable(args.features)}"
        raise InputError(f"{given} must have train_nodes, or -statistics name a file of statistics")
    if args.statistics:
        if not Path(args.statistics).is_dir():
            raise InputError(f"-statistics {args.statistics}: this must be a folder of images, and there is none")
        files = list(image_files([args.statistics]))
        if not files:
            raise InputError(f"-statistics {args.statistics}: there are no images in this folder")
        known = set(map(os.path.realpath, classified.paths)) if classified else ()
        if both := sum(os.path.realpath(file) in known for file in files):
            found = f"{both} of its images are classified, whose statistics a classifier cannot know"
            raise InputError(f"-statistics {args.statistics}: {found}. Name a folder of others")
        return ImageDataset.of_files(files, view=view_of(args, train=False))
    sources = "Set -statistics to a folder of images that are not classified, or to a file of statistics"
    if "data_dir" not in args:
        raise InputError(f"-norm {args.norm} needs statistics, and there are no training images. {sources}")
    try:
        return open_dataset(args, "train", train=False)
    except InputError as error:
        raise InputError(f"-norm {args.norm} needs statistics of training images: {error}. {sources}") from None


def view_of(args: Namespace, *, train: bool, deepemd: str | None = None) -> View:
    """The view that the flags ask for; ``deepemd`` overrides the flag of that name."""
    names = ("image_size", "interpolation", "patch_list", "patch_ratio", "num_patch")
    settings = {name: getattr(args, name) for name in names}
    return make_view(deepemd or args.deepemd, train=train, **settings)


def pixel_statistics(args: Namespace) -> dict[str, tuple[float, float, float] | None]:
    """``mean`` and ``std`` of the pixels of the data set, for its model; None where the encoder's own are published."""
    return {"mean": CATALOG[args.dataset].mean, "std": CATALOG[args.dataset].std}


def draw_episodes(
    args: Namespace, dataset: ImageDataset | FeatureSet, episodes: int, *, seed: int, name: str, train: bool = False
) -> SeededEpisodes:
    """Episodes of the task that the flags describe; ``name`` keeps the draws of several uses apart.

    ``-fixed_patches`` is for evaluation; with ``train`` it is ignored. InputError if the data set has too few classes, a
    class too few images, or an episode does not fit into memory.
    """
    check_episode_size(args, dataset)
    try:
        sampler = EpisodeSampler(dataset.labels, episodes, args.way, args.shot + args.query)
    except InputError as error:
        is_file = isinstance(dataset, FeatureSet)
        where = f"-features {args.features}" if is_file else f"{args.dataset}, {name} episodes"
        raise InputError(f"{where}: {error}") from None
    fixed_views = len(dataset) if args.fixed_patches and not train else None
    return SeededEpisodes(sampler, seed=seed, name=name, fixed_views=fixed_views)


def choose_episodes(
    args: Namespace, dataset: ImageDataset | FeatureSet, *, seed: int, name: str, most: int | None = None
) -> SeededEpisodes | ListedEpisodes:
    """``-test_episode`` episodes, drawn, or those of ``-episodes_in``, at most ``most``, whose shape ``args`` then has."""
    if not args.episodes_in:
        return draw_episodes(args, dataset, args.test_episode, seed=seed, name=name)
    fixed_views = len(dataset) if args.fixed_patches else None
    episodes = read_episodes(args.episodes_in, dataset, seed=seed, name=name, fixed_views=fixed_views, most=most)
    args.way, args.shot, args.query = episodes.way, episodes.shot, episodes.query
    args.test_episode = len(episodes)
    check_episode_size(args, dataset)
    return episodes


def check_episode_size(args: Namespace, dataset: ImageDataset | FeatureSet) -> None:
    """Raise InputError if an episode is too large for memory."""
    per_class, patches = args.shot + args.query, dataset.view.patches
    size = args.way * per_class * patches * 3 * args.image_size**2 / 2**30
    if size > LARGEST_EPISODE and isinstance(dataset, ImageDataset):
        episode = f"an episode of {args.way} classes with {per_class} images of {patches} patches"
        text = f"{episode} needs {size:.0f} GiB for its pixels; at most {LARGEST_EPISODE} GiB are allowed"
        raise InputError(f"{text}. Lower -way, -query, -image_size or the number of patches")
