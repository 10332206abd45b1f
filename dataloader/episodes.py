"""Episodes and batches: which images, in which order, and the seeds of their views.

An episode of W ways with P images per class (P = shot + queries) is a list of W*P indices, class-interleaved:
``c0 c1 .. c(W-1) c0 c1 ..``. The first W*K are the support, the rest the queries, so query labels are
:func:`episode_labels`.

:class:`EpisodeSampler` draws in the published, sequential order. :class:`SeededEpisodes` and :class:`SeededBatches` make
every draw a function of (seed, name, epoch, index), so any part of a run can be repeated without what came before it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from utils import InputError, named_generator

# View seeds are drawn below this bound.
_SEEDS = 2**62


class Task(NamedTuple):
    """What an episode asks: to tell ``way`` classes apart by ``shot`` images of each, for ``query`` images of each."""

    way: int
    shot: int
    query: int

    @property
    def per_class(self) -> int:
        """Images of a class in an episode."""
        return self.shot + self.query


class EpisodeSampler(Sampler[list[int]]):
    """Draws episodes, one after the other.

    Per episode one permutation of the classes, then one of the images of each class chosen.

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
        self,
        labels: Sequence[int] | Tensor,
        episodes: int,
        way: int,
        per_class: int,
        generator: torch.Generator | None = None,
    ) -> None:
        labels = torch.as_tensor(labels)
        if labels.dim() != 1:
            raise ValueError(
                f"labels are one number per image, a shape (B,); these have the shape {tuple(labels.shape)}"
            )
        self.members = [(labels == label).nonzero().flatten() for label in labels.unique()]
        self.episodes, self.way, self.per_class, self.generator = episodes, way, per_class, generator
        if way < 1 or per_class < 1:
            raise InputError(f"way and images per class must be 1 or more, not {way} and {per_class}")
        if episodes < 0:
            raise InputError(f"the number of episodes must be 0 or more, not {episodes}")
        if way > len(self.members):
            raise InputError(
                f"{way}-way episodes need at least {way} classes; the split has {len(self.members)}. Lower -way"
            )
        smallest = min(len(members) for members in self.members)
        if smallest < per_class:
            raise InputError(
                f"episodes need at least {per_class} images in every class (shot + query); the smallest class has {smallest}. "
                "Lower -shot or -query"
            )

    def __len__(self) -> int:
        return self.episodes

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.episodes):
            yield self.draw(self.generator)

    def draw(self, generator: torch.Generator | None = None) -> list[int]:
        """The next episode of a generator: ``W*P`` indices, class-interleaved."""
        classes = torch.randperm(len(self.members), generator=generator)[: self.way]
        rows = [_choose(self.members[number], self.per_class, generator) for number in classes.tolist()]
        return torch.stack(rows).t().flatten().tolist()  # (way, per_class) -> class-interleaved


def _choose(members: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    return members[torch.randperm(len(members), generator=generator)[:count]]


class _Seeded(Sampler[list[tuple[int, int]]], ABC):
    """Lists of (index, view seed), as :class:`ImageDataset` takes them; list k is a function of (seed, name, epoch, k)."""

    def __init__(self, seed: int, name: str) -> None:
        self.seed, self.name = seed, name
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to draw for."""
        self.epoch = epoch

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _draw(self, k: int) -> list[tuple[int, int]]: ...

    def __getitem__(self, k: int) -> list[tuple[int, int]]:
        if not 0 <= k < len(self):
            raise IndexError(f"no batch {k}; there are {len(self)}")
        return self._draw(k)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (self._draw(k) for k in range(len(self)))


class SeededEpisodes(_Seeded):
    """Episodes that can be drawn one by one, in any order.

    Args:
        sampler: draws an episode; its own generator is not used.
        seed: of the run.
        name: keeps the draws of several uses apart.
        fixed_views: the number of images of the data set, to give each image one view seed, whichever episode and epoch it
            comes in; a seed per use when not given.

    ``episodes[k]`` is a list of ``W*P`` pairs (index, view seed); IndexError outside ``0 .. len - 1``. The attribute
    ``epoch`` (0 at first) chooses among independent sets of episodes.
    """

    def __init__(self, sampler: EpisodeSampler, *, seed: int, name: str, fixed_views: int | None = None) -> None:
        super().__init__(seed, name)
        self.sampler = sampler
        self.fixed_seeds = None
        if fixed_views is not None:
            self.fixed_seeds = torch.randint(_SEEDS, (fixed_views,), generator=named_generator(seed, name, "views"))

    def __len__(self) -> int:
        return len(self.sampler)

    def _draw(self, k: int) -> list[tuple[int, int]]:
        generator = named_generator(self.seed, self.name, self.epoch, "episode", k)
        indices = self.sampler.draw(generator)
        if self.fixed_seeds is None:
            seeds = torch.randint(_SEEDS, (len(indices),), generator=generator)
        else:
            seeds = self.fixed_seeds[indices]
        return list(zip(indices, seeds.tolist(), strict=True))


class SeededBatches(_Seeded):
    """Every image once per epoch, shuffled, in batches.

    Args:
        count: images of the data set.
        batch_size: images per batch; the last batch may be smaller.
        seed: of the run.
        name: keeps the draws of several uses apart.

    ``batches[k]`` is a list of pairs (index, view seed); IndexError outside ``0 .. len - 1``. The attribute ``epoch`` (0 at
    first) chooses the order and the views.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int, name: str) -> None:
        super().__init__(seed, name)
        self.count, self.batch_size = count, batch_size
        self._order: tuple[int, Tensor] | None = None  # the epoch, and its permutation of the images

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def _draw(self, k: int) -> list[tuple[int, int]]:
        if self._order is None or self._order[0] != self.epoch:
            generator = named_generator(self.seed, self.name, self.epoch, "order")
            self._order = self.epoch, torch.randperm(self.count, generator=generator)
        indices = self._order[1][k * self.batch_size : (k + 1) * self.batch_size]
        generator = named_generator(self.seed, self.name, self.epoch, "views", k)
        seeds = torch.randint(_SEEDS, (len(indices),), generator=generator)
        return list(zip(indices.tolist(), seeds.tolist(), strict=True))


def episode_labels(way: int, query: int) -> Tensor:
    """``(W*Q,)`` labels of the queries of an episode: ``0 1 .. W-1 0 1 ..``."""
    return torch.arange(way).repeat(query)
