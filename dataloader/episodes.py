"""Episodes: which images, in which order.

An episode of W ways with P images per class (P = shot + queries) is a list of W*P indices, class-interleaved:
``c0 c1 .. c(W-1) c0 c1 ..``. The first W*K are the support, the rest the queries, so query labels are
:func:`episode_labels`.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from utils import InputError


class EpisodeSampler(Sampler[list[int]]):
    """Draws episodes.

    Per episode one permutation of the classes, then one of the images of each class chosen.

    Args:
        labels: ``(B,)`` class numbers of the images.
        episodes: how many to draw per pass.
        way: classes per episode.
        per_class: images per class: shot + queries.
        generator: the CPU generator to draw from; torch's global one when not given.

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
        self.members = [(labels == label).nonzero().flatten() for label in labels.unique()]
        self.episodes, self.way, self.per_class, self.generator = episodes, way, per_class, generator
        if way < 1 or per_class < 1 or episodes < 0:
            raise InputError(f"expected way and images per class of 1 or more; got {way} and {per_class}")
        if way > len(self.members):
            raise InputError(
                f"expected at least {way} classes for {way}-way episodes; the split has {len(self.members)}. Lower -way"
            )
        smallest = min(len(members) for members in self.members)
        if smallest < per_class:
            raise InputError(
                f"expected at least {per_class} images in every class (shot + query); the smallest class has {smallest}. "
                "Lower -shot or -query"
            )

    def __len__(self) -> int:
        return self.episodes

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.episodes):
            classes = torch.randperm(len(self.members), generator=self.generator)[: self.way]
            rows = [self._draw(self.members[number]) for number in classes.tolist()]
            yield torch.stack(rows).t().flatten().tolist()  # (way, per_class) -> class-interleaved

    def _draw(self, members: Tensor) -> Tensor:
        return members[torch.randperm(len(members), generator=self.generator)[: self.per_class]]


class SeededBatches(Sampler[list[tuple[int, int]]]):
    """Gives every index of the batches it is made from a seed, as :class:`ImageDataset` takes them.

    Args:
        batches: lists of indices.
        generator: draws the seeds.
        seed_per_image: ``(B,)`` one seed for each image of the data set, whenever it comes; none are drawn then.
    """

    def __init__(
        self, batches: Iterable[Sequence[int]], generator: torch.Generator, seed_per_image: Tensor | None = None
    ) -> None:
        self.batches, self.generator, self.seed_per_image = batches, generator, seed_per_image

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches:
            if self.seed_per_image is None:
                seeds = torch.randint(2**62, (len(batch),), generator=self.generator)
            else:
                seeds = self.seed_per_image[torch.as_tensor(batch)]
            yield list(zip(batch, seeds.tolist(), strict=True))


def episode_labels(way: int, query: int) -> Tensor:
    """``(W*Q,)`` labels of the queries of an episode: ``0 1 .. W-1 0 1 ..``."""
    return torch.arange(way).repeat(query)
