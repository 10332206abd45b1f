"""Episodes and batches: which images, in which order, and the seeds of their views.

An episode of W ways with P images per class (P = shot + queries) is a list of W*P indices, class-interleaved:
``c0 c1 .. c(W-1) c0 c1 ..``. The first W*K are the support, the rest the queries, so query labels are
:func:`episode_labels`.

:class:`EpisodeSampler` draws in the published, sequential order. :class:`SeededEpisodes` and :class:`SeededBatches` make
every draw a function of (seed, name, epoch, index), so any part of a run can be repeated without what came before it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import Sampler

from utils import InputError, named_generator

_SEEDS = 2**62  # view seeds are drawn below this bound


class EpisodeSampler(Sampler[list[int]]):
    """Draws episodes in sequence: a permutation of the classes, then one of the images of each class chosen.

    Args:
        labels: ``(B,)`` class numbers of the images.
        episodes: how many to draw per pass; nothing is drawn or stored before it is asked for.
        way: classes per episode.
        per_class: images per class: shot + queries.
        generator: the CPU generator that iteration draws from; torch's global one when not given.

    Raises:
        InputError: fewer classes than ``way``, or a class with fewer images than ``per_class``.
    """

    def __init__(
        self, labels: Sequence | Tensor, episodes: int, way: int, per_class: int, generator: Generator | None = None
    ) -> None:
        labels = torch.as_tensor(labels)
        if labels.dim() != 1:
            shape = tuple(labels.shape)
            raise ValueError(f"labels are one number per image, a shape (B,); these have the shape {shape}")
        self.members = [(labels == label).nonzero().flatten() for label in labels.unique()]
        self.episodes, self.way, self.per_class, self.generator = episodes, way, per_class, generator
        is_whole = all(isinstance(count, Integral) for count in (way, per_class, episodes))
        if not is_whole or way < 1 or per_class < 1 or episodes < 0:
            numbers = f"{way} classes with {per_class} images, {episodes} times"
            raise InputError(f"no episodes of {numbers}: give whole numbers of 1 or more")
        if way > len(self.members):
            raise InputError(f"{way}-way episodes need {way} classes; the split has {len(self.members)}. Lower -way")
        smallest = min(map(len, self.members))
        if smallest < per_class:
            need = f"episodes need at least {per_class} images in every class (shot + query)"
            raise InputError(f"{need}; the smallest class has {smallest}. Lower -shot or -query")

    def __len__(self) -> int:
        return self.episodes

    def __iter__(self) -> Iterator[list[int]]:
        return (self.draw(self.generator) for _ in range(self.episodes))

    def draw(self, generator: Generator | None = None) -> list[int]:
        """The next episode of a generator: ``W*P`` indices, class-interleaved."""

        def choose(members: Tensor, count: int) -> Tensor:
            return members[torch.randperm(len(members), generator=generator)[:count]]

        classes = choose(torch.arange(len(self.members)), self.way).tolist()
        rows = [choose(self.members[number], self.per_class) for number in classes]
        return torch.stack(rows).t().flatten().tolist()  # (way, per_class) -> class-interleaved


class _Seeded(Sampler[list[tuple[int, int]]], ABC):
    """``drawn[k]`` is a list of pairs (index, view seed), a function of (seed, name, epoch, k); k from 0 to ``len - 1``.

    The attribute ``epoch``, 0 at first, chooses among independent draws; ``name`` keeps those of several uses apart. With
    ``fixed_views``, the number of images of the data set, an image has one view seed, in every list and epoch.
    """

    def __init__(self, seed: int, name: str, fixed_views: int | None = None) -> None:
        self.seed, self.name, self.epoch = seed, name, 0
        self.fixed_seeds = None
        if fixed_views is not None:
            generator = named_generator(seed, name, "views")
            self.fixed_seeds = torch.randint(_SEEDS, (fixed_views,), generator=generator)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _draw(self, k: int) -> tuple[list[int], Tensor]:
        """The indices and the view seeds of list k."""

    def __getitem__(self, k: int) -> list[tuple[int, int]]:
        if not 0 <= k < len(self):
            raise IndexError(f"no batch {k}; there are {len(self)}")
        indices, seeds = self._draw(k)
        if self.fixed_seeds is not None:
            seeds = self.fixed_seeds[indices]
        return list(zip(indices, seeds.tolist(), strict=True))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.__getitem__, range(len(self)))


class SeededEpisodes(_Seeded):
    """Episodes of a sampler, whose own generator is not used: lists of ``W*P`` pairs (index, view seed), in any order."""

    def __init__(self, sampler: EpisodeSampler, *, seed: int, name: str, fixed_views: int | None = None) -> None:
        super().__init__(seed, name, fixed_views)
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def _draw(self, k: int) -> tuple[list[int], Tensor]:
        generator = named_generator(self.seed, self.name, self.epoch, "episode", k)
        indices = self.sampler.draw(generator)
        return indices, torch.randint(_SEEDS, (len(indices),), generator=generator)


class ListedEpisodes(_Seeded):
    """Episodes of a file, all of the ``shape`` (way, shot, queries per class); only the first ``most`` if given.

    ``indices`` are the ``W*P`` images of each episode, class-interleaved. ``view_seeds`` are those of their views, which are
    drawn as for :class:`SeededEpisodes` when not given.
    """

    def __init__(
        self,
        indices: Sequence[Sequence[int]],
        shape: tuple[int, int, int],
        view_seeds: Sequence[Sequence[int]] | None = None,
        *,
        most: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.indices, self.view_seeds, self.count = indices, view_seeds, min(len(indices), most or len(indices))
        self.way, self.shot, self.query = shape

    def __len__(self) -> int:
        return self.count

    def _draw(self, k: int) -> tuple[list[int], Tensor]:
        indices = list(self.indices[k])
        if self.view_seeds is not None:
            return indices, torch.tensor(self.view_seeds[k])
        generator = named_generator(self.seed, self.name, self.epoch, "views", k)
        return indices, torch.randint(_SEEDS, (len(indices),), generator=generator)


class SeededBatches(_Seeded):
    """Every one of ``count`` images once per epoch, shuffled, in batches, of which the last may be smaller."""

    def __init__(self, count: int, batch_size: int, *, seed: int, name: str) -> None:
        super().__init__(seed, name)
        self.count, self.batch_size = count, batch_size
        self._order: tuple[int, list[int]] | None = None  # the epoch, and its permutation of the images

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def _draw(self, k: int) -> tuple[list[int], Tensor]:
        if self._order is None or self._order[0] != self.epoch:
            generator = named_generator(self.seed, self.name, self.epoch, "order")
            self._order = self.epoch, torch.randperm(self.count, generator=generator).tolist()
        indices = self._order[1][k * self.batch_size : (k + 1) * self.batch_size]
        generator = named_generator(self.seed, self.name, self.epoch, "views", k)
        return indices, torch.randint(_SEEDS, (len(indices),), generator=generator)


def episode_labels(way: int, query: int) -> Tensor:
    """``(W*Q,)`` labels of the queries of an episode: ``0 1 .. W-1 0 1 ..``."""
    return torch.arange(way).repeat(query)
