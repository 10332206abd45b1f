"""A training run: epochs of steps, each followed by validation."""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from engine.distributed import Ranks
from engine.evaluation import DivergenceError, Evaluation, Score
from engine.loading import progress_bar, stream
from engine.run import LAST_STATE, RunFolder
from engine.stopping import Stopped, StopRequest
from utils import BEST_WEIGHTS, InputError, duration

# After this many skipped steps in a row the run stops.
MAX_SKIPPED_IN_A_ROW = 10

# A script's (images, labels, (epoch, number of the batch)) to (logits, labels). The pair names the batch's random draws.
Forward = Callable[[Tensor, Tensor, tuple[int, int]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FitSettings:
    """How a network is trained."""

    max_epoch: int
    lr: float  # multiplied by gamma every step_size epochs
    step_size: int
    gamma: float
    accumulate: int = 1  # batches per step over all ranks, which takes their mean gradient; fewer in the last step
    half_precision: bool = False  # float16 is in use, so scale the loss
    save_all: bool = False  # keep the weights of every epoch
    save_every: int = 0  # steps between saves of the state within an epoch; 0 for none
    skip_on: tuple[type[Exception], ...] = ()  # errors in a batch, forward or backward, that cost only its step


def make_optimizer(network: nn.Module, settings: FitSettings) -> tuple[SGD, StepLR]:
    """The published optimiser: SGD with Nesterov momentum, and a learning rate that drops in steps."""
    optimizer = SGD(network.parameters(), lr=settings.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return optimizer, StepLR(optimizer, settings.step_size, settings.gamma)


@dataclass
class Progress:
    """How far a run has come, in plain values."""

    epoch: int = 1
    batch: int = 0  # batches of the epoch that are done; all of them when only validation is left
    losses: list[float] = field(default_factory=list)  # of those batches whose step was taken
    accuracies: list[float] = field(default_factory=list)
    best: float = -1.0  # validation accuracy of the best weights
    skipped: int = 0  # steps, over the whole run
    in_a_row: list[str] = field(default_factory=list)  # the steps skipped since the last one taken


def from_state(run: RunFolder, parts: dict[str, Any]) -> Progress:
    """Restore what has a ``load_state_dict`` from the state of a run, and return its progress; InputError if it does not fit."""
    try:
        progress = Progress(**run.state["progress"])
        for name, default in vars(Progress()).items():
            if type(getattr(progress, name)) is not type(default):
                raise TypeError(f"{name} is {getattr(progress, name)!r}")
        for name, part in parts.items():
            if name != "scaler" or run.state[name]:  # empty if there was no loss scale
                part.load_state_dict(run.state[name])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the state in {run.path / LAST_STATE} does not fit this run ({reason})") from error
    return progress


@dataclass(eq=False)
class StepGuard:
    """Takes an optimiser step if the gradient is complete and finite; otherwise leaves the network as it was.

    Its buffers too: one batch that overflows would leave NaN in the running statistics for good.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))  # of the loss
    progress: Progress = field(default_factory=Progress)  # counts the skipped steps
    ranks: Ranks = field(default_factory=Ranks)  # buffers are averaged over them

    def __post_init__(self) -> None:
        self.buffers = list(self.network.buffers())
        self.before = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def step(self, where: str, failure: str | None = None) -> bool:
        """Take the step named ``where``, or skip it, and clear the gradients. Returns whether it was taken.

        ``failure`` is what went wrong before, if anything did. DivergenceError after :data:`MAX_SKIPPED_IN_A_ROW` in a row.
        """
        if failure is None:
            self.scaler.unscale_(self.optimizer)
            gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            if torch.nn.utils.get_total_norm(gradients).isfinite():
                self.scaler.step(self.optimizer)
            else:
                failure = "the gradient is not finite"
            self.scaler.update()  # to a smaller scale, if that was at fault
        self.optimizer.zero_grad(set_to_none=True)
        progress = self.progress
        if failure is None:
            progress.in_a_row.clear()
            self.ranks.average(self.buffers)
            _copy(self.buffers, to=self.before)
            return True
        _copy(self.before, to=self.buffers)
        progress.skipped += 1
        progress.in_a_row.append(where)
        if self.ranks.is_first:
            tqdm.write(f"{where}: step skipped ({progress.skipped} so far): {failure}")
        if (count := len(progress.in_a_row)) >= MAX_SKIPPED_IN_A_ROW:
            skipped = f"{count} steps in a row were skipped since {progress.in_a_row[0]}, the last because {failure}"
            raise DivergenceError(f"{skipped}. Lower -lr, or try another -solver")
        return False


def _copy(tensors: list[Tensor], *, to: list[Tensor]) -> None:
    if tensors:  # a network may have no buffers
        torch._foreach_copy_(to, tensors)


def train_epoch(
    network: nn.Module,
    forward: Forward,
    loader: DataLoader,
    guard: StepGuard,
    run: RunFolder,
    settings: FitSettings,
    *,
    stop: StopRequest | None = None,
    after_step: Callable[[int], None] = lambda signal_number: None,
) -> None:
    """The rest of an epoch, from where ``guard.progress`` says it is. ``forward`` calls the network, which is trained.

    In a step, every rank computes the gradient of its own batches; if all succeeded, the ranks average the gradients and take
    the step, else all skip it. The loader's ``batch_sampler`` is a :class:`engine.distributed.Shard`; ``after_step`` is called
    with the signal by which any rank has been asked to stop, or 0.
    """
    progress, ranks, shard = guard.progress, guard.ranks, loader.batch_sampler
    batches, title = stream(loader), f"epoch {progress.epoch}"
    stop = stop or StopRequest()
    with progress_bar(title, total=len(shard), initial=progress.batch, disable=not ranks.is_first) as bar:
        while progress.batch < len(shard):
            first, window = progress.batch, min(settings.accumulate, len(shard) - progress.batch)
            own = range(1, window + 1) if shard.by_image else range(1 + ranks.rank, window + 1, ranks.size)
            places = [(progress.epoch, first + number) for number in own]
            own_scores, failure = _differentiate(forward, batches, places, guard, settings)
            failures, parts, signals = zip(*ranks.gather((failure, own_scores, stop.signal_number)), strict=True)
            failure = next(filter(None, failures), None)
            scores = list(chain.from_iterable(zip(*parts, strict=False)))  # in the order of the batches
            if failure is None:
                weight = 1.0
                if shard.by_image:  # the ranks have parts of one batch, which may differ in size
                    queries = sum(part.queries for part in scores)
                    weight = own_scores[0].queries * ranks.size / queries
                    loss = sum(part.loss * part.queries for part in scores) / queries
                    scores = [Score(loss, sum(part.hits for part in scores), queries)]
                gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
                ranks.average(gradients, weight=weight)
            progress.batch += window
            if guard.step(f"{title}, batch {progress.batch}", failure):
                for number, score in enumerate(scores, start=first + 1):
                    progress.losses.append(score.loss)
                    progress.accuracies.append(score.accuracy)
                    step = (progress.epoch - 1) * len(shard.batches) + number
                    run.scalars(step, loss=score.loss, acc=score.accuracy, total_loss=score.loss / window)
            shown = f"loss {_mean(progress.losses):.4f}, acc {_mean(progress.accuracies):.2f} %"
            bar.set_postfix_str(shown, refresh=False)
            bar.update(window)
            after_step(max(signals))


def _differentiate(
    forward: Forward, batches: Iterator[Any], places: list[tuple[int, int]], guard: StepGuard, settings: FitSettings
) -> tuple[list[Score], str | None]:
    """Add up the gradients of this rank's batches of a step. Returns their scores, and what went wrong if anything did."""
    scores: list[Score] = []
    failure, device = None, guard.ranks.device
    for place in places:
        images, labels = next(batches)
        if failure is not None:
            continue
        try:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            logits, labels = forward(images, labels, place)
            loss = F.cross_entropy(logits, labels)
            hits = (logits.argmax(1) == labels).sum()
            scores.append(Score(*torch.stack([loss.detach(), hits]).tolist(), len(labels)))
            if not math.isfinite(scores[-1].loss):
                getattr(guard.network, "settle", lambda: None)()  # raises what a solver on a GPU has met
                raise FloatingPointError("the loss is not finite")
            guard.scaler.scale(loss / len(places)).backward()
        except (FloatingPointError, *settings.skip_on) as error:
            failure = " ".join(str(error).split()) or type(error).__name__
    return scores, failure


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def fit(
    network: nn.Module,
    forward: Forward,
    loader: DataLoader,
    validate: Callable[[int], Evaluation],
    run: RunFolder,
    settings: FitSettings,
    *,
    weights_of: nn.Module,
    ranks: Ranks | None = None,
    stop: StopRequest | None = None,
) -> None:
    """Train epoch by epoch, from the state in the folder of a resumed run; validate, log, and keep the best weights.

    Args:
        validate: evaluates the network after an epoch. Of equal accuracies the later epoch wins.
        weights_of: the module whose state dict is the checkpoint. The other arguments are those of :func:`train_epoch`.

    Raises:
        DivergenceError: the numbers are no longer finite.
        InputError: the state of a resumed run cannot be restored.
        Stopped: the run was asked to stop; its state is saved.
    """
    ranks = ranks or Ranks()
    optimizer, scheduler = make_optimizer(network, settings)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=settings.half_precision)
    parts = {"network": network, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    progress = from_state(run, parts) if run.state else Progress()
    guard = StepGuard(network, optimizer, scaler, progress, ranks)

    def save() -> None:
        run.save_state({"progress": vars(progress).copy(), **{name: part.state_dict() for name, part in parts.items()}})

    def after_step(signal_number: int) -> None:
        steps = -(-progress.batch // settings.accumulate)
        if signal_number or (settings.save_every and steps % settings.save_every == 0):
            save()
        if signal_number:
            raise Stopped(signal_number)

    while progress.epoch <= settings.max_epoch:
        start, rate = time.monotonic(), optimizer.param_groups[0]["lr"]
        if progress.batch < len(loader.batch_sampler):
            network.train()
            loader.batch_sampler.set_epoch(progress.epoch, progress.batch)
            train_epoch(network, forward, loader, guard, run, settings, stop=stop, after_step=after_step)
            save()  # validation may take long, and may fail
        try:
            result = validate(progress.epoch)
        except DivergenceError as error:
            since = f"; steps were skipped since {progress.in_a_row[0]}" if progress.in_a_row else ""
            message = f"validation after epoch {progress.epoch}: {error}{since}. Lower -lr, now {rate:g}"
            raise DivergenceError(message) from error
        with warnings.catch_warnings():  # torch misses the optimiser's steps if all were skipped, or preceded a stop
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            scheduler.step()
        if is_best := result.accuracy >= progress.best:
            progress.best = result.accuracy
            run.save_weights(BEST_WEIGHTS, weights_of.state_dict())
        if settings.save_all:
            run.save_weights(f"epoch-{progress.epoch}.pth", weights_of.state_dict())
        _log_epoch(run, progress, result, rate, is_best, f"{progress.epoch}/{settings.max_epoch}", start)
        progress.epoch, progress.batch, progress.losses, progress.accuracies = progress.epoch + 1, 0, [], []
        save()


def _log_epoch(
    run: RunFolder, progress: Progress, result: Evaluation, rate: float, is_best: bool, title: str, start: float
) -> None:
    loss, accuracy, skipped = _mean(progress.losses), _mean(progress.accuracies), progress.skipped
    run.scalars(progress.epoch, val_loss=result.loss, val_acc=result.accuracy)
    trained = {"epoch": progress.epoch, "lr": rate, "train_loss": loss, "train_acc": accuracy}
    validated = {"val_loss": result.loss, "val_acc": result.accuracy, "val_interval": result.interval}
    run.record(**trained, **validated, best=is_best, skipped_steps=skipped)
    run.log(
        f"epoch {title}: train loss {loss:.4f} acc {accuracy:.2f} %, validation loss {result.loss:.4f} acc {result}"
        f"{' (best)' * is_best}, lr {rate:.4g}, {duration(time.monotonic() - start)}"
        + (f", {skipped} steps skipped" if skipped else "")
    )
