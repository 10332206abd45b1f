"""What is loaded and encoded when, and kept where: the nodes of images, and decoded images."""

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from engine.loading import stream
from utils import status, warn

# An image as a data set is asked for it: its index, or its index and the seed of its random view.
Item = int | tuple[int, int]

# The share of free memory that nodes may take, and that decoded images may take.
CACHE_SHARE = 1 / 4
# Nodes that would take more bytes than this are kept in float16, unless their values do not fit.
LARGE_TABLE = 2**30
LARGEST_HALF = 65504.0
# float16 has steps of 6e-8 near 0: nodes whose largest value is below this would lose digits.
SMALLEST_HALF = 1e-2


def fits_half(largest: float) -> bool:
    """Whether nodes whose largest absolute value is that can be kept in float16, to its precision."""
    return SMALLEST_HALF <= largest <= LARGEST_HALF


class Batch(NamedTuple):
    items: list[Item]  # to encode together
    rows: list[int]  # of the table of nodes, for each
    missing: list[Item]  # those whose pixels have to be loaded


class Group(NamedTuple):
    batches: list[Batch]  # what has to be encoded before the episodes can be matched
    rows: Tensor  # (E, images): of the table of nodes


class Queue:
    """A batch sampler whose batches are set before each pass, so that one loader serves all passes."""

    batches: Iterable[list[Item]] = ()

    def __iter__(self) -> Iterator[list[Item]]:
        return iter(self.batches)


@dataclass(eq=False)
class NodeTable:
    """The nodes of images: a row each, on the device, or in pinned host memory where that has more room.

    A full table gives the rows of the oldest images to new ones.
    """

    device: torch.device
    most: int  # images worth keeping; 0 keeps none beyond its group
    share: float = CACHE_SHARE  # the part of free memory that it may take
    capacity: float = math.inf  # known with the first nodes
    place: dict[Item, int] = field(default_factory=dict)
    owner: dict[int, Item] = field(default_factory=dict)  # of a row: the image in it, once all before are done
    next_row: int = 0
    nodes: Tensor | None = None  # (capacity, C, N)

    def reserve_rows(self, wanted: list[Item]) -> dict[Item, int]:
        """Give a row to each image that has none, but no row of another that is wanted; return the new ones."""
        needed = dict.fromkeys(wanted)
        new = [item for item in needed if item not in self.place]
        for item in new:
            row = self._pass_row()
            while self.owner.get(row) in needed:
                row = self._pass_row()
            self.place.pop(self.owner.get(row), None)
            self.owner[row], self.place[item] = item, row
        return {item: self.place[item] for item in new}

    def _pass_row(self) -> int:
        row = self.next_row if self.next_row < self.capacity else 0
        self.next_row = row + 1
        return row

    def put(self, rows: list[int], nodes: Tensor, *, least: int) -> None:
        """Write ``(B, C, N)`` to those rows. The first call makes the table, of ``least`` rows at least."""
        if self.nodes is None:
            self._make(nodes, least)
        if self.nodes.dtype == torch.float16 and (largest := float(nodes.abs().max())) > LARGEST_HALF:
            warn(f"nodes reach {largest:.0f}, which float16 cannot hold: they are kept in float32 from here on")
            self.nodes = self.nodes.float()
        self.nodes[torch.tensor(rows)] = nodes.to(self.nodes)

    def _make(self, nodes: Tensor, least: int) -> None:
        size, dtype = nodes[0].numel() * nodes.element_size(), nodes.dtype
        if self.most * size > LARGE_TABLE and fits_half(float(nodes.abs().max())):
            status(f"nodes are kept in float16; in full they would take {self.most * size / 2**30:.1f} GiB")
            size, dtype = size * 2 // nodes.element_size(), torch.float16
        here, host = (int(self.share * free_memory(place)) // size for place in (self.device, torch.device("cpu")))
        on_host = self.device.type == "cuda" and here < min(host, max(least, self.most))
        self.capacity = max(least, min(self.most, host if on_host else here))
        place = {"pin_memory": True} if on_host else {"device": self.device}
        self.nodes = torch.empty(self.capacity, *nodes.shape[1:], dtype=dtype, **place)

    def get(self, rows: Tensor) -> Tensor:
        """Rows ``(E, images)`` to nodes ``(E, images, C, N)`` on the device."""
        nodes = self.nodes[rows.flatten().to(self.nodes.device, non_blocking=True)].to(self.device, non_blocking=True)
        return (nodes.float() if nodes.dtype == torch.float16 else nodes).unflatten(0, rows.shape)


class PixelCache(dict[Item, Tensor]):
    """Decoded images, up to ``room`` bytes of them."""

    def __init__(self, room: float) -> None:
        super().__init__()
        self.room = room

    def assemble(self, batch: Batch, fresh: Tensor | None, *, keep: bool) -> Tensor:
        """The pixels of a batch, from those kept and ``fresh``, those that were missing."""
        if fresh is None:
            return torch.stack([self[item] for item in batch.items])
        if keep and self.room >= fresh.nbytes:
            self.room -= fresh.nbytes
            self.update(zip(batch.missing, fresh.clone(), strict=True))  # memory shared with the loader is scarce
        if len(fresh) == len(batch.items):
            return fresh
        loaded = dict(zip(batch.missing, fresh, strict=True))
        return torch.stack([loaded[item] if item in loaded else self[item] for item in batch.items])


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on a device; in a container, within the limit of its control group."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch's allocator
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    try:
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such group, or "max"
        return free
    return min(free, max(0, limit - used))


def plan_groups(groups: Iterable[list[list[Item]]], table: NodeTable, pixels: PixelCache, size: int) -> Iterator[Group]:
    """What each group of episodes has to have encoded, in batches of ``size``, and the table's rows of its nodes."""
    for group in groups:
        wanted = [item for episode in group for item in episode]
        new = list(table.reserve_rows(wanted).items()) if table.most else list(zip(wanted, itertools.count()))
        batches = []
        for start in range(0, len(new), size):
            items, places = map(list, zip(*new[start : start + size], strict=True))
            batches.append(Batch(items, places, [item for item in items if item not in pixels]))
        rows = [table.place[item] for item in wanted] if table.most else range(len(wanted))
        yield Group(batches, torch.tensor(rows).view(len(group), -1))


def load_ahead(plan: Iterator[Group], loader: DataLoader, queue: Queue, most: int) -> Iterator[tuple[Group, Iterator]]:
    """The groups of a plan, each with the stream of batches that its missing pixels come from.

    The loader takes batches of later groups in advance, planning at most ``most``, as none may have a missing image.
    """
    ahead: deque[Group] = deque()  # planned and not yet complete

    def missing(most: int) -> Iterator[list[Item]]:
        group: Group | None = ahead[0]
        while group:
            yield from (batch.missing for batch in group.batches if batch.missing)
            group = next(plan, None) if len(ahead) < most else None
            if group:
                ahead.append(group)

    # The first group alone: its nodes show how many images fit in memory, on which the plan of the others depends.
    for limit in itertools.chain([1], itertools.repeat(most)):
        ahead.extend(itertools.islice(plan, 1))
        if not ahead:
            return
        queue.batches, loaded = missing(limit), stream(loader)  # a pass over the loader
        while ahead:
            yield ahead[0], loaded
            ahead.popleft()
