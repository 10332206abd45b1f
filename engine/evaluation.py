"""Evaluation: encode each image once, match episodes in batches."""

import itertools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from engine import cache
from engine.cache import Item, NodeTable, PixelCache, Queue, load_ahead, plan_groups
from engine.distributed import Ranks
from engine.loading import make_loader, progress_bar, stream
from engine.stopping import Stopped, StopRequest
from utils import InputError, mean_confidence_interval, named_generator, read_json, warn, write_atomically

# Images (patches) encoded at once, per device.
ENCODE_BATCH = {"cpu": 8, "cuda": 256}
# On a GPU, batches have at most this many sizes: cudnn searches for the fastest kernels once per size.
ENCODE_SIZES = 8
# Episodes drawn ahead of those being matched, at most, to keep the loader busy.
EPISODES_AHEAD = 512
SECONDS_BETWEEN_RECORDS = 10.0


class DivergenceError(RuntimeError):
    """The numbers of a network are no longer finite. The message says where, and what to try."""

    is_user_error = True


class Model(Protocol):
    """What an :class:`Evaluator` needs of a model; see :class:`Models.deepemd.DeepEMD`, whose ``match`` has the settings."""

    device_ids: Sequence[int]  # the GPUs that batches are spread over, if there are several
    statistics_hash: str | None  # of the statistics of training nodes that it compares nodes by, if it does

    def folded(self) -> "Model": ...
    def encode(self, images: Tensor) -> Tensor: ...
    def match(self, support: Tensor, query: Tensor, **settings: Any) -> Tensor: ...
    def settle(self) -> None: ...


class Episodes(Protocol):
    """What is evaluated, such as :class:`dataloader.episodes.SeededEpisodes`."""

    epoch: int  # names the draws inside the model
    fixed_seeds: Tensor | None  # if not None, an image has the same view seed in every episode

    def __len__(self) -> int: ...

    def __getitem__(self, k: int) -> Sequence[tuple[int, int]]:
        """Pairs (index, view seed), support first."""


class Score(NamedTuple):
    """The result of one episode."""

    loss: float  # mean cross entropy
    hits: float  # queries classified correctly
    queries: float

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.hits / self.queries


class Evaluation(NamedTuple):
    """Accuracies over episodes, in percent."""

    loss: float  # mean cross entropy
    accuracy: float  # mean; equal for equal numbers of hits
    interval: float  # half width of its 95 % interval
    accuracies: list[float]  # one per episode

    @classmethod
    def of(cls, scores: Sequence[Score]) -> "Evaluation":
        """The summary of one or more scores."""
        accuracies = [score.accuracy for score in scores]
        loss = sum(score.loss for score in scores) / len(scores)
        accuracy = 100 * sum(score.hits for score in scores) / sum(score.queries for score in scores)
        return cls(loss, accuracy, mean_confidence_interval(accuracies)[1], accuracies)

    def __str__(self) -> str:
        return f"{self.accuracy:.2f} +- {self.interval:.2f} %"


# (true class, predicted class), as numbers of the data set -> queries
Confusion = Counter[tuple[int, int]]


class _RunningInterval:
    """Mean and 95 % interval of the accuracies so far, in constant time per score."""

    count, total, squares = 0, 0.0, 0.0

    def add(self, scores: Iterable[Score]) -> None:
        for score in scores:
            self.count += 1
            self.total += score.accuracy
            self.squares += score.accuracy**2

    def __str__(self) -> str:
        mean = self.total / self.count
        variance = max(0.0, self.squares / self.count - mean**2)
        return f"acc {mean:.2f} +- {1.96 * math.sqrt(variance / self.count):.2f} %"


class Recorder:
    """Records the scores of an evaluation in a file from time to time, so that it can be resumed.

    With ``resume``, ``scores`` and ``confusion`` are those in the file at first; one that does not fit so many ``episodes`` of
    so many ``queries`` is set aside with a warning. Only the first rank reads and writes.
    """

    def __init__(self, path: Path, *, resume: bool, episodes: int, queries: int, ranks: Ranks) -> None:
        self.path, self.ranks, self.next_write = path, ranks, time.monotonic() + SECONDS_BETWEEN_RECORDS
        content: tuple[list[Score], Confusion, float] = [], Counter(), 0.0
        if resume and ranks.is_first and path.exists():
            try:
                content = read_json(path, "scores of an evaluation", lambda found: _parse(found, episodes, queries))
            except InputError as error:
                aside = path.with_suffix(".damaged")
                path.replace(aside)
                warn(f"{error}. It is now {aside.name}, and the evaluation starts from its first episode")
        self.scores, self.confusion, earlier_seconds = ranks.from_first(content)
        self.start = time.monotonic() - earlier_seconds

    @property
    def seconds(self) -> float:
        """Time spent on the evaluation, interrupted parts included."""
        return time.monotonic() - self.start

    def update(self, confusions: Sequence[Confusion] = (), *, now: bool) -> None:
        """Add what classes were confused, and write all if it is time, or ``now``."""
        for confusion in confusions:
            self.confusion.update(confusion)
        before = time.monotonic()
        if self.ranks.is_first and (now or before >= self.next_write):
            pairs = [[*pair, count] for pair, count in self.confusion.items()]
            content = {"scores": self.scores, "seconds": self.seconds, "confusion": pairs}
            write_atomically(self.path, json.dumps(content).encode())  # compact, as there may be a million scores
            after = time.monotonic()
            self.next_write = after + max(SECONDS_BETWEEN_RECORDS, 20 * (after - before))

    def remove(self) -> None:
        """Delete the file: the evaluation is complete."""
        self.path.unlink(missing_ok=True)


def _parse(content: Any, episodes: int, queries: int) -> tuple[list[Score], Confusion, float]:
    scores, seconds = [Score(*row) for row in content["scores"]], content["seconds"]
    fits = len(scores) <= episodes and 0 <= seconds <= sys.float_info.max
    for loss, hits, count in scores:
        fits = fits and 0 <= loss <= sys.float_info.max and 0 <= hits <= count == queries and hits % 1 == 0
    confusion = Counter({(true, found): count for true, found, count in content["confusion"]})
    fits = fits and all(type(number) is int for row in content["confusion"] for number in row)
    hits = sum(count for (true, found), count in confusion.items() if true == found)
    # Images without labels are not counted.
    fits = fits and hits in (0, sum(score.hits for score in scores))
    fits = fits and confusion.total() in (0, sum(score.queries for score in scores))
    if not fits:
        raise ValueError("its numbers do not fit this evaluation")
    return scores, confusion, seconds


@dataclass(eq=False)
class Evaluator:
    """Classifies the queries of episodes from one data set, with the weights a model has at the time.

    For each group of episodes: encode the images that have not been encoded yet, then match. Nodes are kept for later groups
    as long as they fit in memory, and decoded images for later calls, unless views are random.
    """

    # Gives (pixels, label) for an engine.cache.Item; its view has is_random, and patches: their number in an image. One that
    # has nodes (B, C, N) is not asked for pixels, and the model encodes nothing.
    dataset: Dataset
    _: KW_ONLY
    way: int
    shot: int
    device: torch.device  # of the model
    seed: int  # of the draws inside the model; those of episode k of an epoch depend on the seed, the epoch and k alone
    num_workers: int = 0  # processes that load images
    feature_cache: str = "auto"  # or "off", to encode an image for every use
    episode_batch: int = 8  # episodes in a group; affects memory and speed, not results
    keep_pixels: bool = False  # keep decoded images for later calls
    keep_nodes: bool = False  # keep nodes for later calls, all of which have the same encoder
    ranks: Ranks = field(default_factory=Ranks)  # they share the groups, and all of them receive all scores
    stop: StopRequest = field(default_factory=StopRequest)

    def __post_init__(self) -> None:
        # The part of the free memory of this machine that one cache of this process may take.
        self.share = cache.CACHE_SHARE / self.ranks.local_size
        self.pixels = PixelCache(self.share * cache.free_memory(torch.device("cpu")) if self.keep_pixels else 0)
        self.table: NodeTable | None = None
        self.queue = Queue()
        self.loader = make_loader(self.dataset, self.queue, num_workers=self.num_workers, device=self.device)

    @torch.no_grad()
    def __call__(
        self,
        model: Model,
        episodes: Episodes,
        *,
        solver: str | None = None,
        title: str = "",
        recorder: Recorder | None = None,
    ) -> Evaluation:
        """Evaluate a model as it is now, with its own solver or another, beyond the scores that the recorder has.

        Raises:
            DivergenceError: the model's nodes or logits are not finite, and no solver has an explanation.
            Stopped: one of the processes was asked to stop.
        """
        model, scores, shown = model.folded(), recorder.scores if recorder else [], _RunningInterval()
        shown.add(scores)
        nodes_of_groups = self._nodes_of_groups(model, episodes, len(scores))
        rank, size, total = self.ranks.rank, self.episode_batch, len(episodes)
        with progress_bar(title, total=total, initial=len(scores), disable=not self.ranks.is_first) as bar:
            for start in range(len(scores), total, self.ranks.size * size):  # a round: a group for every rank
                first, group = start + rank * size, ([], Counter())
                if first < total:
                    group = self._score(model, next(nodes_of_groups), episodes, first, solver)
                rows = self.ranks.gather((self.stop.signal_number, *group))
                new = [score for _, part, _ in rows for score in part]
                scores += new
                signal_number = max(number for number, _, _ in rows)
                if recorder:
                    recorder.update([confusion for _, _, confusion in rows], now=signal_number > 0)
                if signal_number:
                    raise Stopped(signal_number)
                shown.add(new)
                bar.set_postfix_str(str(shown), refresh=False)
                bar.update(len(new))
        return Evaluation.of(scores)

    def _nodes_of_groups(self, model: Model, episodes: Episodes, start: int) -> Iterator[Tensor]:
        """The nodes ``(E, images, C, N)`` of this rank's groups, from episode ``start`` on, encoded when they are asked for."""
        size, total = self.episode_batch, len(episodes)
        firsts = range(start + self.ranks.rank * size, total, self.ranks.size * size)
        if (nodes := getattr(self.dataset, "nodes", None)) is not None:
            for first in firsts:
                group = [episodes[k] for k in range(first, min(first + size, total))]
                chosen = nodes[torch.tensor([[index for index, _ in items] for items in group])]
                yield chosen.to(self.device).float()
            return
        view = self.dataset.view
        repeats = not view.is_random or episodes.fixed_seeds is not None
        most = len(self.dataset) if repeats and self.feature_cache == "auto" else 0
        table = self.table
        if table is None or table.capacity < min(most, size * len(episodes[0])):
            table = NodeTable(self.device, most=most, share=self.share)
        self.table = table if self.keep_nodes and most else None

        def items(k: int) -> list[Item]:
            return [item if view.is_random else item[0] for item in episodes[k]]

        groups = ([items(k) for k in range(first, min(first + size, total))] for first in firsts)
        plan = plan_groups(groups, table, self.pixels, _encode_batch(model, self.device, view.patches))
        for group, loaded in load_ahead(plan, self.loader, self.queue, most=max(2, EPISODES_AHEAD // size)):
            for batch in group.batches:
                fresh = next(loaded)[0] if batch.missing else None
                pixels = self.pixels.assemble(batch, fresh, keep=repeats)
                table.put(batch.rows, encode_images(model, pixels, device=self.device), least=group.rows.numel())
            yield table.get(group.rows)

    def _score(
        self, model: Model, nodes: Tensor, episodes: Episodes, first: int, solver: str | None
    ) -> tuple[list[Score], Confusion]:
        """The scores of a group whose nodes are ``(E, images, C, N)``, from episode number ``first`` on, and its confusion."""
        support = self.way * self.shot
        draws = [named_generator(self.seed, "sfc", episodes.epoch, first + k) for k in range(len(nodes))]
        settings = {"way": self.way, "shot": self.shot, "solver": solver, "generator": draws}
        logits = model.match(nodes[:, :support], nodes[:, support:], **settings)  # (E, W*Q, W)
        queries = logits.shape[1]
        labels = (torch.arange(queries, device=logits.device) % self.way).expand(len(nodes), -1)
        # By gather: the gradient-free kernel of cross_entropy for more than one axis is not deterministic on a GPU.
        losses = -logits.log_softmax(2).gather(2, labels.unsqueeze(2)).mean((1, 2))
        rows = torch.cat([losses.unsqueeze(1), logits.argmax(2)], dim=1).tolist()  # one wait for the device
        if not all(math.isfinite(loss) for loss, *_ in rows):
            model.settle()
            raise DivergenceError(
                "the logits are not finite: the nodes are too large, or the encoder's weights have diverged"
            )
        scores, confusion, classes_of = [], Counter(), getattr(self.dataset, "labels", None)
        for k, (loss, *found) in enumerate(rows):
            hits = sum(predicted == query % self.way for query, predicted in enumerate(found))
            scores.append(Score(loss, hits, queries))
            if classes_of is not None:
                classes = [classes_of[index] for index, _ in episodes[first + k][: self.way]]
                pairs = ((classes[query % self.way], classes[int(number)]) for query, number in enumerate(found))
                confusion.update(pairs)
        return scores, confusion


@torch.no_grad()
def encode_images(model: Model, images: Tensor, *, device: torch.device) -> Tensor:
    """8-bit images ``(B, 3, S, S)``, or patches ``(B, P, 3, S, S)``, to nodes ``(B, C, N)`` on the device, in batches.

    Raises DivergenceError if the nodes are not finite.
    """
    most = _encode_batch(model, device, images.shape[1] if images.dim() == 5 else 1)
    step = -(-most // ENCODE_SIZES) if device.type == "cuda" else 1
    nodes = []
    for batch in images.split(most):
        padding = min(most, -(-len(batch) // step) * step) - len(batch)
        padded = F.pad(batch.to(device, non_blocking=True), (0, 0) * (batch.dim() - 1) + (0, padding))
        nodes.append(model.encode(padded)[: len(batch)])
    nodes = torch.cat(nodes)
    if not bool(nodes.isfinite().all()):
        raise DivergenceError("the encoder's features are not finite: its weights have diverged")
    return nodes


def encode_dataset(
    model: Model,
    dataset: Dataset,
    items: Sequence[Item],
    *,
    device: torch.device,
    ranks: Ranks,
    stop: StopRequest,
    num_workers: int = 0,
    title: str = "",
) -> Tensor:
    """The nodes ``(B, C, N)`` of items of a data set, on the CPU, which the ranks share the work for.

    They are in float16 if that can hold every batch, and in float32 otherwise. Raises DivergenceError if they are not finite, and
    Stopped.
    """
    model, size = model.folded(), _encode_batch(model, device, dataset.view.patches)
    batches = [items[first : first + size] for first in range(0, len(items), size)]
    loader = make_loader(dataset, batches[ranks.rank :: ranks.size], num_workers=num_workers, device=device)
    own: list[Tensor] = []
    with progress_bar(title, total=len(batches), disable=not ranks.is_first) as bar:
        for images, _ in stream(loader):
            nodes = encode_images(model, images, device=device)
            own.append((nodes.half() if cache.fits_half(float(nodes.abs().max())) else nodes).cpu())
            bar.update(ranks.size)
            if stop.signal_number:
                break
    numbers, parts = zip(*ranks.gather((stop.signal_number, own)), strict=True)
    if signal_number := max(numbers):
        raise Stopped(signal_number)
    # Rank r has batches r, r + size, ..
    return torch.cat([part for row in itertools.zip_longest(*parts) for part in row if part is not None])


def _encode_batch(model: Model, device: torch.device, patches: int) -> int:
    """Images of so many patches that are encoded at once."""
    return max(1, max(1, len(model.device_ids)) * ENCODE_BATCH.get(device.type, 8) // patches)
