"""A training run, and one epoch of it."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from engine.distributed import Ranks
from engine.evaluation import DivergenceError, Evaluation
from engine.loading import progress_bar, stream
from engine.run import RunFolder
from engine.stopping import Stopped, StopRequest
from utils import BEST_WEIGHTS, Stopwatch

# After this many skipped steps in a row the run stops.
MAX_SKIPPED_IN_A_ROW = 10

# What a script does with a batch: (images, labels, (epoch, number of the batch)) to (logits, labels). The pair names what
# is drawn on the way.
Forward = Callable[[Tensor, Tensor, tuple[int, int]], tuple[Tensor, Tensor]]


def make_optimizer(
    network: nn.Module, *, lr: float, step_size: int, gamma: float
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.StepLR]:
    """The published optimiser: SGD with Nesterov momentum, its learning rate falling in steps."""
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=step_size, gamma=gamma)


@dataclass
class Progress:
    """Where a run is, in plain numbers."""

    epoch: int = 1
    batch: int = 0  # batches of the epoch that are done; all of them when only validation is left
    losses: list[float] = field(default_factory=list)  # of those batches whose step was taken
    accuracies: list[float] = field(default_factory=list)
    best: float = -1.0  # validation accuracy of the best weights
    skipped: int = 0  # steps, over the whole run
    in_a_row: list[str] = field(default_factory=list)  # the steps skipped since the last one taken

    def next_epoch(self) -> None:
        """The epoch is over."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.losses, self.accuracies = [], []


def to_dict(
    progress: Progress,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
) -> dict[str, Any]:
    """Tensors, numbers, strings, and lists and dicts of them: what a file can be read back from without running code."""
    return {
        "progress": dict(vars(progress)),
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict(),
    }


def from_dict(
    state: dict[str, Any],
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
) -> Progress:
    """Put everything back where :func:`to_dict` took it from."""
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"])


class StepGuard:
    """Takes an optimiser's step if the gradient is whole and finite; otherwise leaves the network as it was before.

    Args:
        network: the module in training. A skipped step also takes back what its batches did to its buffers: one batch that
            overflows would otherwise leave NaN in the running statistics for good.
        optimizer: of the network's weights.
        scaler: scales the loss, where half precision needs it.
        progress: counts the skipped steps.
        ranks: buffers are averaged over them.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
        progress: Progress | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.scaler = scaler or torch.amp.GradScaler(enabled=False)
        self.progress, self.ranks = progress or Progress(), ranks or Ranks()
        self.buffers = list(network.buffers())
        self.before = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def step(self, where: str, failure: str | None = None) -> bool:
        """Step or skip, and clear the gradients. Returns whether the step was taken.

        Args:
            where: names the step in messages.
            failure: what went wrong on the way to it, if anything did.

        Raises:
            DivergenceError: after :data:`MAX_SKIPPED_IN_A_ROW` skipped steps in a row.
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
        if len(progress.in_a_row) >= MAX_SKIPPED_IN_A_ROW:
            raise DivergenceError(
                f"{len(progress.in_a_row)} steps in a row were skipped since {progress.in_a_row[0]}, the last because "
                f"{failure}. Lower -lr, or try another -solver"
            )
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
    *,
    device: torch.device,
    accumulate: int = 1,
    skip_on: tuple[type[Exception], ...] = (),
    stop: StopRequest | None = None,
    after_step: Callable[[int], None] = lambda signal_number: None,
) -> None:
    """The rest of an epoch, from where ``guard.progress`` says it is.

    Args:
        network: what is trained; ``forward`` calls it. Its gradients are averaged over the ranks.
        loader: of this rank's batches; its ``batch_sampler`` is a :class:`engine.distributed.Shard`.
        accumulate: batches per optimiser step over all ranks, which takes their mean gradient. The last step of an epoch
            may have fewer.
        skip_on: errors of a batch that cost its step, not the run.
        stop: whether this process has been asked to stop.
        after_step: called with the signal by which any rank has been asked to stop, or 0.
    """
    progress, ranks, shard = guard.progress, guard.ranks, loader.batch_sampler
    batches = stream(loader)
    title = f"epoch {progress.epoch}"
    with progress_bar(title, total=len(shard), initial=progress.batch, disable=not ranks.is_first) as bar:
        while progress.batch < len(shard):
            window = min(accumulate, len(shard) - progress.batch)  # batches of this step, over all ranks
            numbers = range(1, window + 1) if shard.by_image else range(1 + ranks.rank, window + 1, ranks.size)
            rows: list[list[float]] = []  # loss, hits and queries of each batch of this rank
            failure = None
            for number in numbers:
                images, labels = next(batches)
                try:
                    if failure:
                        raise FloatingPointError(failure)
                    images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                    logits, labels = forward(images, labels, (progress.epoch, progress.batch + number))
                    loss = F.cross_entropy(logits, labels)
                    hits = (logits.argmax(1) == labels).sum()
                    rows.append([*torch.stack([loss.detach(), hits]).tolist(), len(labels)])
                    if not math.isfinite(rows[-1][0]):
                        raise FloatingPointError("the loss is not finite")
                    if number != numbers[-1]:
                        guard.scaler.scale(loss / len(numbers)).backward()
                except (FloatingPointError, *skip_on) as error:
                    failure = str(error)
            # Agree first: has a batch of any rank failed, has any rank been asked to stop, what came of all batches?
            rows = rows if failure is None else [[0.0, 0, 1]] * len(numbers)
            signal_number = stop.signal_number if stop else 0
            table = ranks.gather([failure is not None, signal_number, *(value for row in rows for value in row)])
            failed, signals = any(row[0] for row in table), [int(row[1]) for row in table]
            scores = [row[2 + k : 5 + k] for k in range(0, 3 * len(numbers), 3) for row in table]
            if failed:
                failure = next(filter(None, ranks.gather_objects(failure)))
            else:
                queries = sum(score[2] for score in scores)
                share = rows[-1][2] * ranks.size / queries if shard.by_image else 1 / len(numbers)
                guard.scaler.scale(loss * share).backward()
                ranks.average([parameter.grad for parameter in network.parameters() if parameter.grad is not None])
                if shard.by_image:  # the ranks have parts of one batch
                    scores = [[sum(s[0] * s[2] for s in scores) / queries, sum(s[1] for s in scores), queries]]
            first, progress.batch = progress.batch, progress.batch + window
            if guard.step(f"epoch {progress.epoch}, batch {progress.batch}", failure):
                for number, (value, hits, count) in enumerate(scores, start=first + 1):
                    progress.losses.append(value)
                    progress.accuracies.append(100 * hits / count)
                    step = (progress.epoch - 1) * len(shard.batches) + number
                    run.scalars(step, loss=value, acc=progress.accuracies[-1], total_loss=value / window)
            bar.set_postfix_str(
                f"loss {_mean(progress.losses):.4f}, acc {_mean(progress.accuracies):.2f} %", refresh=False
            )
            bar.update(window)
            after_step(max(signals))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def fit(
    network: nn.Module,
    forward: Forward,
    loader: DataLoader,
    validate: Callable[[int], Evaluation],
    run: RunFolder,
    *,
    weights_of: nn.Module,
    device: torch.device,
    max_epoch: int,
    lr: float,
    step_size: int,
    gamma: float,
    half_precision: bool = False,
    save_all: bool = False,
    save_every: int = 0,
    accumulate: int = 1,
    skip_on: tuple[type[Exception], ...] = (),
    ranks: Ranks | None = None,
    stop: StopRequest | None = None,
) -> None:
    """Train until ``max_epoch`` epochs are done; after each, validate, write the log, and keep the best weights.

    A resumed run goes on from the state in its folder.

    Args:
        network: what is trained; in training mode during an epoch.
        loader: of the training batches; see :func:`train_epoch`.
        validate: evaluates the network as it is after an epoch. Of equal accuracies the later epoch wins.
        weights_of: the module whose state dict is the checkpoint.
        lr, step_size, gamma: see :func:`make_optimizer`.
        half_precision: float16 is in use, so scale the loss.
        save_all: keep the weights of every epoch.
        save_every: steps between saves of the state within an epoch; 0 for none.
        accumulate, skip_on, stop: see :func:`train_epoch`.

    Raises:
        DivergenceError: the numbers are no longer finite.
        Stopped: the run was asked to stop; its state is saved.
    """
    ranks = ranks or Ranks()
    optimizer, scheduler = make_optimizer(network, lr=lr, step_size=step_size, gamma=gamma)
    scaler = torch.amp.GradScaler(device.type, enabled=half_precision)
    parts = network, optimizer, scheduler, scaler
    progress = from_dict(run.state, *parts) if run.state else Progress()
    guard = StepGuard(network, optimizer, scaler, progress, ranks)

    def save() -> None:
        if ranks.is_first:
            run.save_state(to_dict(progress, *parts))

    def after_step(signal_number: int) -> None:
        steps = -(-progress.batch // accumulate)
        if signal_number or (save_every and steps % save_every == 0):
            save()
        if signal_number:
            raise Stopped(signal_number)

    while progress.epoch <= max_epoch:
        watch = Stopwatch()
        epoch, length = progress.epoch, len(loader.batch_sampler)
        rate = optimizer.param_groups[0]["lr"]
        if progress.batch < length:
            network.train()
            loader.batch_sampler.set_epoch(epoch, progress.batch)
            train_epoch(
                network,
                forward,
                loader,
                guard,
                run,
                device=device,
                accumulate=accumulate,
                skip_on=skip_on,
                stop=stop,
                after_step=after_step,
            )
            save()  # validation may take long, and may fail
        try:
            result = validate(epoch)
        except DivergenceError as error:
            since = f"; steps were skipped since {progress.in_a_row[0]}" if progress.in_a_row else ""
            raise DivergenceError(f"validation after epoch {epoch}: {error}{since}. Lower -lr, now {rate:g}") from error
        with (
            warnings.catch_warnings()
        ):  # torch misses the optimiser's steps where all were skipped, or taken before a stop
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            scheduler.step()
        is_best = result.accuracy >= progress.best
        if is_best:
            progress.best = result.accuracy
            run.save_weights(BEST_WEIGHTS, weights_of.state_dict())
        if save_all:
            run.save_weights(f"epoch-{epoch}.pth", weights_of.state_dict())
        loss, accuracy = _mean(progress.losses), _mean(progress.accuracies)
        run.scalars(epoch, val_loss=result.loss, val_acc=result.accuracy)
        run.record(
            epoch=epoch,
            lr=rate,
            train_loss=loss,
            train_acc=accuracy,
            val_loss=result.loss,
            val_acc=result.accuracy,
            val_interval=result.interval,
            best=is_best,
            skipped_steps=progress.skipped,
        )
        skipped = f", {progress.skipped} steps skipped" if progress.skipped else ""
        run.log(
            f"epoch {epoch}/{max_epoch}: train loss {loss:.4f} acc {accuracy:.2f} %, validation loss {result.loss:.4f} "
            f"acc {result}{' (best)' if is_best else ''}, lr {rate:.4g}, {watch}{skipped}"
        )
        progress.next_epoch()
        save()
