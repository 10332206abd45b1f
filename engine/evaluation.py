"""Evaluation: encode each image once, match episodes in batches."""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from engine import cache
from engine.cache import Group, NodeTable, PixelCache, Queue, plan_groups
from engine.distributed import Ranks
from engine.loading import make_loader, progress_bar, stream
from engine.stopping import Stopped, StopRequest
from utils import Stopwatch, mean_confidence_interval, named_generator, write_json

# Images (patches) encoded at once, per device.
ENCODE_BATCH = {"cpu": 8, "cuda": 256}
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
            ``patches`` an image has.
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
        self.pixels = PixelCache(self._share() * cache.free_memory(torch.device("cpu")) if keep_pixels else 0)
        self.queue = Queue()
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
        table = NodeTable(self.device, most=most, share=self._share())
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
                        table.put(batch.row, model.encode(pixels), group.rows.numel())
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
        return cache.CACHE_SHARE / self.ranks.local_size

    def _ready(
        self, model: nn.Module, episodes: Sequence, start: int, table: NodeTable
    ) -> Iterator[tuple[Group, Iterator]]:
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
            plan, ahead = itertools.tee(plan_groups(part, table, self.pixels, batch_size))
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


@torch.no_grad()
def encode_images(model: nn.Module, images: Tensor, *, device: torch.device) -> Tensor:
    """8-bit images ``(B, 3, S, S)``, or patches ``(B, P, 3, S, S)``, to nodes ``(B, C, N)`` on the device, in batches.

    Raises:
        DivergenceError: the nodes are not finite.
    """
    patches = images.shape[1] if images.dim() == 5 else 1
    batches = images.split(max(1, ENCODE_BATCH.get(device.type, 8) // patches))
    nodes = torch.cat([model.encode(batch.to(device, non_blocking=True)) for batch in batches])
    if not bool(nodes.isfinite().all()):
        raise DivergenceError("the encoder's features are not finite: its weights have diverged")
    return nodes


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
