"""Mean and deviation of training nodes, for ``-norm base`` and ``standard``: read from a file, or computed and kept."""

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine.distributed import Ranks
from engine.evaluation import encode_images
from engine.loading import make_loader, progress_bar, stream
from utils import STATISTICS_FILE, InputError, named_generator, status, warn

PER_CLASS = 20  # images; with 60 classes, more made no difference
OF_FOLDER = 2000  # images, from a folder, which has no classes
LOADED_AT_ONCE = 16
# Flags that nodes depend on, beside the weights and the images.
NODE_FLAGS = (
    *("dataset", "deepemd", "image_size", "patch_list", "patch_ratio", "num_patch", "feature_pyramid", "map_size"),
    *("backbone", "backbone_layer", "interpolation", "amp"),
)


def prepare_statistics(
    args: Any,
    model: Any,
    weights: str | Path,
    *,
    device: torch.device,
    open_train: Callable[[], Dataset],
    num_workers: int,
    ranks: Ranks | None = None,
    fresh: bool = False,
    train_nodes: Tensor | None = None,
) -> None:
    """Give a :class:`Models.DeepEMD` the statistics that its ``-norm`` needs; do nothing if it needs none.

    ``-statistics`` names a file of them, or a folder of images to compute them from. Without it, they are those of the package,
    or of ``base_statistics.npz`` beside the weights, else computed from :data:`PER_CLASS` images of each training class. The
    images are drawn at random, but always the same; ``checkpoint/statistics/`` keeps the result by weights, view and images.

    Args:
        weights: what the encoder was loaded from; "none" for random weights.
        open_train: opens the training images as evaluation sees them, or those in the folder. Never test images.
        num_workers: processes that load images.
        ranks: the processes of the run, of which the first computes for all.
        fresh: compute them even if there is a file: the encoder is being trained.
        train_nodes: ``(B, C, N)``, those in the file ``-features`` if it has any: used in place of images.

    InputError if there is nothing to compute them from, or a file does not fit.
    """
    if not model.settings.needs_statistics:
        if args.statistics:
            warn(f"-statistics has no effect with -norm {args.norm}; it is for the norms base and standard")
        return
    ranks, named = ranks or Ranks(), Path(args.statistics or "")
    beside = (Path(weights) if Path(weights).is_dir() else Path(weights).parent) / STATISTICS_FILE
    if args.statistics and not named.exists():
        raise InputError(f"-statistics {named}: there is no such file or folder")
    if model.settings.statistics is not None and not args.statistics and not fresh:
        status(f"statistics of -norm {args.norm}: those of the package")
        return
    file = named if args.statistics else beside
    if not fresh and file.is_file() and (args.statistics or str(weights) != "none"):
        model.read_statistics(file)
        status(f"statistics of -norm {args.norm}: {file}")
        return
    if train_nodes is not None and not args.statistics:
        model.fit_statistics(nodes.float() for nodes in train_nodes.split(LOADED_AT_ONCE))
        return
    computed = partial(_compute, model, device=device, num_workers=num_workers)
    found = None
    if ranks.is_first:
        _find(args, model, open_train(), computed, fresh)
        found = model.settings.statistics.to(torch.device("cpu"))  # not on a device of another process
    model.use_statistics(ranks.from_first(found))


def keep_for_run(args: Any, model: Any, weights: str | Path, folder: Path, *, resumes: bool, **more: Any) -> None:
    """:func:`prepare_statistics` for a training run, in which they are a fixed layer of the model: those of the weights that
    the run starts from, kept in its ``folder`` from the first step on, and read from there when it is resumed."""
    if not (resumes and model.settings.needs_statistics):
        prepare_statistics(args, model, weights, **more)
        if model.settings.needs_statistics and more["ranks"].is_first:
            model.settings.statistics.write(folder / STATISTICS_FILE)
        return
    model.read_statistics(folder / STATISTICS_FILE)


def _find(args: Any, model: Any, dataset: Dataset, computed: Callable[[Dataset], None], fresh: bool) -> None:
    """Statistics of these images, from the cache if they are there."""
    if fresh:
        computed(dataset)
        return
    content = {name: getattr(args, name, None) for name in NODE_FLAGS} | {"drawn": [PER_CLASS, OF_FOLDER]}
    content |= {"encoder": model.encoder.identity(), "pixels": [model.encoder.mean, model.encoder.std]}
    content |= {"images": dataset.fingerprint()}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path = Path("checkpoint", "statistics", f"{digest[:16]}.npz")
    if path.is_file():
        try:
            model.read_statistics(path)
            status(f"statistics of -norm {args.norm}: {path}")
            return
        except InputError as error:
            warn(f"{error}. They are computed again")
    computed(dataset)
    try:
        model.settings.statistics.write(path)
    except InputError as error:
        warn(f"the statistics of -norm {args.norm} are not kept: {error}")
    else:
        status(f"statistics of -norm {args.norm}: {path}, of {len(drawn_images(dataset))} images")


def drawn_images(dataset: Dataset) -> list[tuple[int, int]]:
    """The images of a training split to compute from, as pairs (index, seed of the view): always the same ones."""
    most = PER_CLASS if len(dataset.class_names) > 1 else OF_FOLDER
    labels = torch.tensor(dataset.labels)
    items = []
    for label in range(len(dataset.class_names)):
        of_class, draws = (labels == label).nonzero().flatten(), named_generator(0, "statistics", label)
        chosen = of_class[torch.randperm(len(of_class), generator=draws)[:most]]
        seeds = torch.randint(2**31, (len(chosen),), generator=draws)
        items += zip(chosen.tolist(), seeds.tolist(), strict=True)
    return items


def _compute(model: Any, dataset: Dataset, *, device: torch.device, num_workers: int) -> None:
    items = drawn_images(dataset)
    batches = [items[start : start + LOADED_AT_ONCE] for start in range(0, len(items), LOADED_AT_ONCE)]
    loader = make_loader(dataset, batches, num_workers=min(num_workers, len(batches)), device=device)
    encoder = model.folded()

    def nodes() -> Iterator[Tensor]:
        with progress_bar("base statistics", total=len(items)) as bar:
            for images, _ in stream(loader):
                yield encode_images(encoder, images, device=device)
                bar.update(len(images))

    model.fit_statistics(nodes())
