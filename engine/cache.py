"""What is encoded when, and kept where: the nodes of images, and decoded images."""

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

# An image as a data set is asked for it: its index, or its index and the seed of its random view.
Item = int | tuple[int, int]

# The share of free memory that nodes may take, and that decoded images may take.
CACHE_SHARE = 1 / 4


class Batch(NamedTuple):
    items: list[Item]  # to encode together
    row: int  # the place of the first of them in the table of nodes
    missing: list[Item]  # those whose pixels have to be loaded


class Group(NamedTuple):
    batches: list[Batch]  # what has to be encoded before the episodes can be matched
    rows: Tensor  # (E, images): the places of their images


class Queue:
    """A batch sampler that is given its batches anew for every pass, so that one loader serves them all."""

    batches: Iterable[list[Item]] = ()

    def __iter__(self) -> Iterator[list[Item]]:
        return iter(self.batches)


class NodeTable:
    """The nodes of images: a row each, on the device, or in pinned host memory where that has more room.

    Args:
        most: images worth keeping; 0 keeps none beyond its group.
        share: of free memory, that it may take.
    """

    def __init__(self, device: torch.device, *, most: int, share: float = CACHE_SHARE) -> None:
        self.device, self.most, self.share = device, most, share
        self.capacity = math.inf  # known with the first nodes
        self.place: dict[Item, int] = {}
        self.nodes: Tensor | None = None  # (capacity, C, N)

    def places_for(self, wanted: list[Item]) -> tuple[int, list[Item]]:
        """Give a row to each image that has none: the first of those rows, and the images. A full table starts anew."""
        if not self.most:
            return 0, wanted
        new = [item for item in dict.fromkeys(wanted) if item not in self.place]
        if len(self.place) + len(new) > self.capacity:
            self.place.clear()
            new = list(dict.fromkeys(wanted))
        first = len(self.place)
        self.place.update(zip(new, itertools.count(first), strict=False))
        return first, new

    def put(self, row: int, nodes: Tensor, least: int) -> None:
        """Write ``(B, C, N)`` from that row on. The first call makes the table, of ``least`` rows at least."""
        if self.nodes is None:
            size = nodes[0].numel() * nodes.element_size()
            here, host = (int(self.share * free_memory(place)) // size for place in (self.device, torch.device("cpu")))
            wanted = max(least, self.most)
            on_host = self.device.type == "cuda" and here < wanted and here < host
            self.capacity = max(least, min(wanted, host if on_host else here))
            place = {"pin_memory": True} if on_host else {"device": self.device}
            self.nodes = torch.empty(self.capacity, *nodes.shape[1:], dtype=nodes.dtype, **place)
        self.nodes[row : row + len(nodes)] = nodes

    def get(self, rows: Tensor) -> Tensor:
        """Rows ``(E, images)`` to nodes ``(E, images, C, N)`` on the device."""
        nodes = self.nodes[rows.flatten().to(self.nodes.device)]
        return nodes.to(self.device, non_blocking=True).unflatten(0, rows.shape)


class PixelCache(dict[Item, Tensor]):
    """Decoded images, up to ``room`` bytes of them."""

    def __init__(self, room: float) -> None:
        super().__init__()
        self.room = room

    def complete(self, batch: Batch, fresh: Tensor | None, *, keep: bool) -> Tensor:
        """The pixels of a batch, of which ``fresh`` are those that were missing."""
        if fresh is None:
            return torch.stack([self[item] for item in batch.items])
        pixels = fresh
        if len(fresh) < len(batch.items):
            loaded = dict(zip(batch.missing, fresh, strict=True))
            pixels = torch.stack([loaded[item] if item in loaded else self[item] for item in batch.items])
        if keep and self.room >= fresh.nbytes:
            self.room -= fresh.nbytes
            # Out of the memory shared with the loader's processes, of which there is little.
            self.update(zip(batch.missing, fresh.clone(), strict=True))
        return pixels


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on a device; in a container, as its control group says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such group, or "max"
        return free
    return min(free, max(0, limit - used))


def plan_groups(
    groups: Iterable[list[list[Item]]], table: NodeTable, pixels: PixelCache, batch_size: int
) -> Iterator[Group]:
    """What each group of episodes needs to have encoded, in batches, and where in the table its nodes will lie."""
    for group in groups:
        wanted = [item for episode in group for item in episode]
        first, new = table.places_for(wanted)
        batches = [
            Batch(part, first + start, [item for item in part if item not in pixels])
            for start in range(0, len(new), batch_size)
            for part in (new[start : start + batch_size],)
        ]
        rows = [table.place[item] for item in wanted] if table.most else range(len(wanted))
        yield Group(batches, torch.tensor(rows).view(len(group), -1))
