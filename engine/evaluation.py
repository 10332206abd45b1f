"""Evaluation: encode each image once, match episodes in batches."""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from engine.distributed import Ranks
from engine.loading import make_loader, stream
from engine.progress import progress_bar
from engine.stopping import Stopped, StopRequest
from utils import Stopwatch, mean_confidence_interval, named_generator, write_json

# An image as a data set is asked for it: its index, or its index and the seed of its random view.
Item = int | tuple[int, int]

# Images (patches) encoded at once, per device.
ENCODE_BATCH = {"cpu": 8, "cuda": 256}
# The share of free memory that nodes may take, and that decoded images may take.
CACHE_SHARE = 1 / 4
SECONDS_BETWEEN_RECORDS = 10.0


class DivergenceError(RuntimeError):
    """The numbers of a network are no longer finite. The message says where, and what to try."""

    is_user_error = True


class Score(NamedTuple):
    """What came of one episode."""

    loss: float  # mean cross entropy
    hits: float  # queries classified right
    queries: float

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.hits / self.queries


class Evaluation(NamedTuple):
    """Accuracies over episodes."""

    loss: float  # mean cross entropy
    accuracy: float  # mean, in percent; the same for the same number of hits
    interval: float  # half width of its 95 % interval, in percent
    accuracies: list[float]  # one per episode, in percent

    def __str__(self) -> str:
        return f"{self.accuracy:.2f} +- {self.interval:.2f} %"


class Evaluator:
    """Classifies the queries of episodes from one data set, with whatever weights a model has at the time.

    Episodes are taken a group at a time, in two phases: encode those of their images that have not been encoded yet, then
    match. Nodes are kept for later groups as long as they fit in memory, and decoded images for later calls, where views
    are not random.

    Args:
        dataset: gives ``(pixels, label)`` for an :data:`Item`. Its ``view`` says whether it ``is_random`` and how many
            ``patches`` an image has, and turns pixels on any device into what the model takes, by ``normalize``.
        way, shot: W and K of the episodes.
        device: of the model.
        seed: of the draws inside the model; those of episode k of an epoch depend on it, the epoch and k alone.
        num_workers: processes that load images.
        feature_cache: ``"auto"``, or ``"off"`` to encode an image anew for every use.
        episode_batch: episodes in a group; decides memory and speed, not results.
        keep_pixels: keep decoded images for later calls.
        ranks: the processes that take groups in turn; each of them then knows the results of all.
        stop: whether this process has been asked to stop.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        way: int,
        shot: int,
        device: torch.device,
        seed: int,
        num_workers: int = 0,
        feature_cache: str = "auto",
        episode_batch: int = 8,
        keep_pixels: bool = False,
        ranks: Ranks | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.dataset, self.way, self.shot, self.device, self.seed = dataset, way, shot, device, seed
        self.feature_cache, self.episode_batch = feature_cache, episode_batch
        self.ranks, self.stop = ranks or Ranks(), stop or StopRequest()
        self.pixels = _PixelCache(self._share() * free_memory(torch.device("cpu")) if keep_pixels else 0)
        self.queue = _Queue()
        self.loader = make_loader(dataset, self.queue, num_workers=num_workers, device=device)

    @torch.no_grad()
    def __call__(
        self,
        model: nn.Module,
        episodes: Sequence[Sequence[tuple[int, int]]],
        *,
        solver: str | None = None,
        title: str = "",
        known: Sequence[Score] = (),
        after_round: Callable[[list[Score], bool], None] = lambda scores, is_stopping: None,
    ) -> Evaluation:
        """Evaluate a model as it is now.

        Args:
            model: has ``folded()``, a copy for evaluation with ``encode(images)`` to nodes ``(B, C, N)`` and
                ``match(support, query, way=, shot=, solver=, generator=)`` to logits ``(E, W*Q, W)``.
            episodes: each a list of (index, seed of the view), support first. They are drawn as they are needed. Two
                attributes may say more: ``epoch`` names the draws, and ``fixed_seeds``, when not None, promises that an
                image comes with the same seed every time.
            solver: overrides the model's own.
            title: of the progress bar.
            known: the scores of the first episodes, which are not evaluated again.
            after_round: called with all scores so far, and whether the evaluation is going to stop.

        Raises:
            DivergenceError: the model's nodes or logits are not finite.
            Stopped: one of the processes was asked to stop.
        """
        model = model.folded()
        ranks, size = self.ranks, self.episode_batch
        repeats = not self.dataset.view.is_random or getattr(episodes, "fixed_seeds", None) is not None
        most = len(self.dataset) if repeats and self.feature_cache == "auto" else 0
        table = _NodeTable(self.device, most=most, share=self._share())
        scores = list(known)
        ready = self._ready(model, episodes, len(known), table)
        with progress_bar(title, total=len(episodes), initial=len(known), disable=not ranks.is_first) as bar:
            for first in range(len(known), len(episodes), ranks.size * size):  # a round: a group for every rank
                own: list[Score] = []
                if first + ranks.rank * size < len(episodes):
                    group, loaded = next(ready)
                    for batch in group.batches:
                        fresh = next(loaded)[0] if batch.missing else None
                        pixels = self.pixels.complete(batch, fresh, keep=repeats).to(self.device, non_blocking=True)
                        table.put(batch.row, model.encode(self.dataset.view.normalize(pixels)), group.rows.numel())
                    logits = self._match(model, table.get(group.rows), episodes, first + ranks.rank * size, solver)
                    own = _score(logits)
                padding = [[0.0, 0, 0]] * (size - len(own))
                rows = ranks.gather(
                    [self.stop.signal_number, *(value for score in (*own, *padding) for value in score)]
                )
                for row in rows:
                    scores += [Score(*row[k : k + 3]) for k in range(1, 1 + 3 * size, 3) if row[k + 2]]
                signal_number = max(int(row[0]) for row in rows)
                after_round(scores, signal_number > 0)
                if signal_number:
                    raise Stopped(signal_number)
                mean, interval = mean_confidence_interval([score.accuracy for score in scores])
                bar.set_postfix_str(f"acc {mean:.2f} +- {interval:.2f} %", refresh=False)
                bar.update(len(scores) - bar.n)
        accuracies = [score.accuracy for score in scores]
        accuracy = 100 * sum(score.hits for score in scores) / sum(score.queries for score in scores)
        loss = sum(score.loss for score in scores) / len(scores)
        return Evaluation(loss, accuracy, mean_confidence_interval(accuracies)[1], accuracies)

    def _share(self) -> float:
        """The part of the free memory of this machine that one cache of this process may take."""
        return CACHE_SHARE / self.ranks.local_size

    def _ready(
        self, model: nn.Module, episodes: Sequence, start: int, table: "_NodeTable"
    ) -> Iterator[tuple["_Group", Iterator]]:
        """This rank's groups of episodes, each with the stream that its missing pixels come from."""
        batch_size = max(1, len(getattr(model, "device_ids", ()))) * ENCODE_BATCH.get(self.device.type, 8)
        batch_size = max(1, batch_size // self.dataset.view.patches)
        is_random, size, step = self.dataset.view.is_random, self.episode_batch, self.ranks.size * self.episode_batch
        groups = (
            [
                [item if is_random else item[0] for item in episodes[k]]
                for k in range(first, min(first + size, len(episodes)))
            ]
            for first in range(start + self.ranks.rank * size, len(episodes), step)
        )
        # The first group alone: its nodes tell how many images fit in memory, on which the plan of the rest depends.
        for part in (itertools.islice(groups, 1), groups):
            plan, ahead = itertools.tee(_plan(part, table, self.pixels, batch_size))
            # The loader runs through the plan a few batches ahead of what is encoded.
            self.queue.batches = (batch.missing for group in ahead for batch in group.batches if batch.missing)
            loaded = stream(self.loader)
            for group in plan:
                yield group, loaded

    def _match(self, model: nn.Module, nodes: Tensor, episodes: Sequence, first: int, solver: str | None) -> Tensor:
        """Logits ``(E, W*Q, W)`` of a group whose nodes are ``(E, images, C, N)``, from episode number ``first`` on."""
        epoch, support = getattr(episodes, "epoch", 0), self.way * self.shot
        generators = [named_generator(self.seed, "sfc", epoch, first + k) for k in range(len(nodes))]
        try:
            return model.match(
                nodes[:, :support],
                nodes[:, support:],
                way=self.way,
                shot=self.shot,
                solver=solver,
                generator=generators,
            )
        except Exception as error:
            if bool(nodes.isfinite().all()):
                raise
            raise DivergenceError("the encoder's features are not finite: its weights have diverged") from error


def _score(logits: Tensor) -> list[Score]:
    """The scores of episodes, from ``(E, W*Q, W)``; query i is of class ``i % W``."""
    episodes, queries, way = logits.shape
    labels = (torch.arange(queries, device=logits.device) % way).expand(episodes, -1)
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)
    rows = torch.stack([losses, (logits.argmax(2) == labels).sum(1)], dim=1).tolist()  # one wait for the device
    if not all(math.isfinite(loss) for loss, _ in rows):
        raise DivergenceError("the logits are not finite: the encoder's weights have diverged")
    return [Score(loss, hits, queries) for loss, hits in rows]


class Recorder:
    """Keeps the scores of an evaluation under way in a file of its own, so that it can be resumed.

    Args:
        folder: of the file.
        identity: what decides the scores, as plain values; evaluations of another identity have another file.
        resume: start from what is there.
        ranks: the first writes, and tells the others what there is.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, resume: bool, ranks: Ranks) -> None:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.path, self.ranks = folder / f"partial-{digest[:12]}.json", ranks
        self.watch, self.earlier = Stopwatch(), 0.0
        self.next_write = SECONDS_BETWEEN_RECORDS
        content = None
        if resume and ranks.is_first and self.path.is_file():
            content = json.loads(self.path.read_text())
        content = ranks.from_first(content) or {"scores": [], "seconds": 0.0}
        self.scores, self.earlier = [Score(*row) for row in content["scores"]], content["seconds"]

    @property
    def seconds(self) -> float:
        """Spent on the evaluation, before it was stopped and since."""
        return self.earlier + self.watch.seconds

    def note(self, scores: list[Score], is_stopping: bool) -> None:
        """Write the scores so far, now and then, and when the evaluation stops."""
        if self.ranks.is_first and (is_stopping or self.watch.seconds >= self.next_write):
            write_json(self.path, {"scores": scores, "seconds": self.seconds})
            self.next_write = self.watch.seconds + SECONDS_BETWEEN_RECORDS

    def remove(self) -> None:
        """The evaluation is over."""
        self.path.unlink(missing_ok=True)


# --- What is encoded when, and kept where -----------------------------------------------------------------------------


class _Batch(NamedTuple):
    items: list[Item]  # to encode together
    row: int  # the place of the first of them in the table of nodes
    missing: list[Item]  # those whose pixels have to be loaded


class _Group(NamedTuple):
    batches: list[_Batch]  # what has to be encoded before the episodes can be matched
    rows: Tensor  # (E, images): the places of their images


class _Queue:
    """A batch sampler that is given its batches anew for every pass, so that one loader serves them all."""

    batches: Iterable[list[Item]] = ()

    def __iter__(self) -> Iterator[list[Item]]:
        return iter(self.batches)


def _plan(
    groups: Iterable[list[list[Item]]], table: "_NodeTable", pixels: "_PixelCache", batch_size: int
) -> Iterator[_Group]:
    """What each group of episodes needs to have encoded, in batches, and where in the table its nodes will lie."""
    for group in groups:
        wanted = [item for episode in group for item in episode]
        first, new = table.places_for(wanted)
        batches = [
            _Batch(part, first + start, [item for item in part if item not in pixels])
            for start in range(0, len(new), batch_size)
            for part in (new[start : start + batch_size],)
        ]
        rows = [table.place[item] for item in wanted] if table.most else range(len(wanted))
        yield _Group(batches, torch.tensor(rows).view(len(group), -1))


class _NodeTable:
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


class _PixelCache(dict[Item, Tensor]):
    """Decoded images, up to ``room`` bytes of them."""

    def __init__(self, room: float) -> None:
        super().__init__()
        self.room = room

    def complete(self, batch: _Batch, fresh: Tensor | None, *, keep: bool) -> Tensor:
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
