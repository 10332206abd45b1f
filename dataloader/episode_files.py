"""Episodes in a JSON file, so that other programs can evaluate the same ones.

A list of ``{"classes": [...], "support": [[file, ...], ...], "query": [[file, ...], ...]}``: for each class, in the order of
``classes``, its files, relative to the split. Where views are random, ``view_seeds`` are those of the images,
class-interleaved, support first; other programs can ignore them.
"""

import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from dataloader.episodes import ListedEpisodes, SeededEpisodes
from utils import InputError, printable, read_json, write_output

Shape = tuple[int, int, int]  # way, shot, queries per class


class NamedImages(Protocol):
    """A data set whose images have names: an ImageDataset or a FeatureSet."""

    labels: Sequence[int]
    class_names: Sequence[str]
    paths: Sequence[str]

    def relative_paths(self) -> list[str]: ...


def episodes_digest(episodes: SeededEpisodes | ListedEpisodes) -> str:
    """A hash of the images that episodes consist of; for episodes of a file, of all that it lists."""
    listed = getattr(episodes, "indices", None) or [[index for index, _ in episode] for episode in episodes]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def images_digest(dataset: NamedImages) -> str:
    """A hash of the images of a data set and their order: by their names, or by their classes where they have none."""
    names = dataset.relative_paths() if dataset.paths else dataset.labels
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def write_episodes(
    path: str | Path,
    episodes: SeededEpisodes | ListedEpisodes,
    dataset: NamedImages,
    *,
    way: int,
    shot: int,
    with_seeds: bool,
) -> None:
    """Write episodes of pairs (index, view seed), class-interleaved; ``with_seeds`` for views that are random."""
    files, lines = _names(dataset, "-episodes_out"), []
    for episode in episodes:
        rows = [[files[index] for index, _ in episode[number::way]] for number in range(way)]
        content = {"classes": [dataset.class_names[dataset.labels[index]] for index, _ in episode[:way]]}
        content |= {"support": [row[:shot] for row in rows], "query": [row[shot:] for row in rows]}
        if with_seeds:
            content["view_seeds"] = [seed for _, seed in episode]
        lines.append(json.dumps(content))
    write_output(Path(path), ("[\n" + ",\n".join(lines) + "\n]\n").encode())


def read_episodes(path: str | Path, dataset: NamedImages, **settings: Any) -> ListedEpisodes:
    """The episodes of a file over the images of a data set; ``settings`` are for :class:`ListedEpisodes`.

    InputError for a file that cannot be read, names that the data set does not have, or episodes of several shapes.
    """
    content = read_json(Path(path), "a list of episodes")
    where = f"-episodes_in {printable(str(path))}"
    number_of = {file: number for number, file in enumerate(_names(dataset, where))}
    if not isinstance(content, list) or not content:
        raise InputError(f"{where}: it must be a list of one or more episodes")
    indices, shapes = [], []
    for k, episode in enumerate(content):
        try:
            shape, found = _parse(episode, dataset, number_of)
        except InputError as error:
            raise InputError(f"{where}, episode {k}: {error}") from None
        if shapes and shape != shapes[0]:
            first, other = ("{}-way {}-shot with {} queries per class".format(*one) for one in (shapes[0], shape))
            shown = f"episode 0 is {first}, episode {k} {other}"
            raise InputError(f"{where}: all episodes must have the same shape; {shown}")
        indices.append(found)
        shapes.append(shape)
    seeds = [episode.get("view_seeds") for episode in content]
    if any(not _are_seeds(one, len(found)) for one, found in zip(seeds, indices, strict=True)):
        seeds = None
    return ListedEpisodes(indices, shapes[0], seeds, **settings)


def _names(dataset: NamedImages, flag: str) -> list[str]:
    files = dataset.relative_paths()
    if len(set(files)) < len(files):
        raise InputError(f"{flag}: some images of the data have the same name, so that names do not tell them apart")
    return files


def _are_seeds(seeds: Any, count: int) -> bool:
    are_seeds = isinstance(seeds, list) and len(seeds) == count
    return are_seeds and all(type(one) is int and 0 <= one < 2**62 for one in seeds)


def _parse(episode: Any, dataset: NamedImages, number_of: dict[str, int]) -> tuple[Shape, list[int]]:
    """The shape of an episode, and its images, class-interleaved."""
    episode = episode if isinstance(episode, dict) else {}
    classes, support, query = (episode.get(name) for name in ("classes", "support", "query"))
    form = 'an episode is {"classes": [name, ...], "support": [[file, ...], ...], "query": [[file, ...], ...]}'
    if not _are_names(classes):
        raise InputError(f'"classes" must be a list of names; {form}')
    for name, rows in (("support", support), ("query", query)):
        if not (isinstance(rows, list) and len(rows) == len(classes) and all(map(_are_names, rows))):
            raise InputError(f'"{name}" must have a list of files for each of the {len(classes)} classes; {form}')
        if len(counts := set(map(len, rows))) > 1:
            raise InputError(f'"{name}" has {min(counts)} to {max(counts)} files for a class; all classes need as many')
    if unknown := [name for name in classes if name not in dataset.class_names]:
        raise InputError(f"there is no class {printable(unknown[0])!r} in the data")
    rows = [one + other for one, other in zip(support, query, strict=True)]
    for name, row in zip(classes, rows, strict=True):
        for file in row:
            if file not in number_of:
                example = printable(next(iter(number_of)))
                raise InputError(f"there is no file {printable(file)!r} in the data, whose names are like {example!r}")
            if (found := dataset.class_names[dataset.labels[number_of[file]]]) != name:
                raise InputError(f"{printable(file)!r} is of class {printable(found)!r}, not of {printable(name)!r}")
    files = list(chain.from_iterable(zip(*rows, strict=True)))  # class-interleaved
    for names, what in ((classes, "class"), (files, "file")):
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"the {what} {printable(twice)!r} is in it twice")
    return (len(classes), len(support[0]), len(query[0])), [number_of[file] for file in files]


def _are_names(names: Any) -> bool:
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)
