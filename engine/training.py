"""A training run, and one epoch of it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from engine.evaluation import DivergenceError, Evaluation
from engine.loading import stream
from utils import BEST_WEIGHTS, RunFolder, Stopwatch

# After this many skipped steps in a row the run stops.
PATIENCE = 10

# What a script does with a batch: (images, labels, (epoch, number of the batch)) to (logits, labels). The pair names what
# is drawn on the way.
Forward = Callable[[Tensor, Tensor, tuple[int, int]], tuple[Tensor, Tensor]]


def make_optimizer(
    network: nn.Module, *, lr: float, step_size: int, gamma: float
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.StepLR]:
    """The published optimiser: SGD with Nesterov momentum, its learning rate falling in steps."""
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=step_size, gamma=gamma)


class StepGuard:
    """Takes an optimiser's step if the gradient is whole and finite; otherwise leaves the network as it was before.

    Args:
        network: the module in training. A skipped step also takes back what its batches did to its buffers: one batch that
            overflows would otherwise leave NaN in the running statistics for good.
        optimizer: of the network's weights.
        scaler: scales the loss, where half precision needs it.
    """

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        self.optimizer = optimizer
        self.scaler = scaler or torch.amp.GradScaler(enabled=False)
        self.buffers = list(network.buffers())
        self.before = [buffer.clone() for buffer in self.buffers]
        self.skipped = 0
        self.in_a_row: list[str] = []  # the steps skipped since the last one taken
        self.failure: str | None = None

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to those of the step."""
        self.scaler.scale(loss).backward()

    def fail(self, why: str) -> None:
        """Something went wrong in a batch of the next step, which is therefore to be skipped."""
        self.failure = self.failure or why

    @torch.no_grad()
    def step(self, where: str) -> None:
        """Step or skip, and clear the gradients. ``where`` names the step in messages.

        Raises:
            DivergenceError: after :data:`PATIENCE` skipped steps in a row.
        """
        failure, self.failure = self.failure, None
        if failure is None:
            self.scaler.unscale_(self.optimizer)
            gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            if torch.nn.utils.get_total_norm(gradients).isfinite():
                self.scaler.step(self.optimizer)
            else:
                failure = "the gradient is not finite"
            self.scaler.update()  # to a smaller scale, if that was at fault
        self.optimizer.zero_grad(set_to_none=True)
        if failure is None:
            self.in_a_row.clear()
            _copy(self.buffers, to=self.before)
            return
        _copy(self.before, to=self.buffers)
        self.skipped += 1
        self.in_a_row.append(where)
        tqdm.write(f"{where}: step skipped ({self.skipped} so far): {failure}")
        if len(self.in_a_row) >= PATIENCE:
            raise DivergenceError(
                f"{len(self.in_a_row)} steps in a row were skipped since {self.in_a_row[0]}, the last because {failure}. "
                "Lower -lr, or try another -solver"
            )


def _copy(tensors: list[Tensor], *, to: list[Tensor]) -> None:
    if tensors:  # a network may have no buffers
        torch._foreach_copy_(to, tensors)


def train_epoch(
    forward: Forward,
    loader: DataLoader,
    guard: StepGuard,
    run: RunFolder,
    *,
    epoch: int,
    device: torch.device,
    accumulate: int = 1,
    skip_on: tuple[type[Exception], ...] = (),
) -> tuple[float, float]:
    """One pass over a loader; returns mean loss and mean accuracy in percent, of the batches that went well.

    Args:
        epoch: counted from 1.
        accumulate: batches per optimiser step, which takes their mean gradient. The last step of an epoch may have fewer.
        skip_on: errors of a batch that cost its step, not the run.
    """
    losses: list[float] = []
    accuracies: list[float] = []
    with tqdm(stream(loader), total=len(loader), desc=f"epoch {epoch}", leave=False, dynamic_ncols=True) as bar:
        for number, (images, labels) in enumerate(bar, start=1):
            first = number - (number - 1) % accumulate  # of the batches of this step
            share = 1 / min(accumulate, len(loader) + 1 - first)
            try:
                images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                logits, labels = forward(images, labels, (epoch, number))
                loss = F.cross_entropy(logits, labels)
                guard.backward(loss * share)
                value, hits = torch.stack([loss.detach(), (logits.argmax(1) == labels).sum()]).tolist()
                if not math.isfinite(value):
                    raise FloatingPointError("the loss is not finite")
                losses.append(value)
                accuracies.append(100 * hits / len(labels))
                step = (epoch - 1) * len(loader) + number
                run.scalars(step, loss=value, acc=accuracies[-1], total_loss=value * share)
            except (FloatingPointError, *skip_on) as error:
                guard.fail(str(error))
            if number % accumulate == 0 or number == len(loader):
                guard.step(f"epoch {epoch}, batch {number}")
            bar.set_postfix_str(f"loss {_mean(losses):.4f}, acc {_mean(accuracies):.2f} %", refresh=False)
    return _mean(losses), _mean(accuracies)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def fit(
    network: nn.Module,
    forward: Forward,
    loader: DataLoader,
    validate: Callable[[int], Evaluation],
    run: RunFolder,
    weights_of: nn.Module,
    *,
    device: torch.device,
    max_epoch: int,
    lr: float,
    step_size: int,
    gamma: float,
    half_precision: bool = False,
    save_all: bool = False,
    accumulate: int = 1,
    skip_on: tuple[type[Exception], ...] = (),
) -> None:
    """Train for ``max_epoch`` epochs; after each, validate, write the log, and keep the best weights.

    Args:
        network: what is trained; in training mode during an epoch.
        loader: of the training batches; its batch sampler is told the epoch by ``set_epoch``.
        validate: evaluates the network as it is after an epoch. Of equal accuracies the later epoch wins.
        weights_of: the module whose state dict is saved.
        lr, step_size, gamma: see :func:`make_optimizer`.
        half_precision: float16 is in use, so scale the loss.
        save_all: keep the weights of every epoch.
        accumulate, skip_on: see :func:`train_epoch`.

    Raises:
        DivergenceError: the numbers are no longer finite.
    """
    optimizer, scheduler = make_optimizer(network, lr=lr, step_size=step_size, gamma=gamma)
    guard = StepGuard(network, optimizer, torch.amp.GradScaler(device.type, enabled=half_precision))
    best = -1.0
    for epoch in range(1, max_epoch + 1):
        watch = Stopwatch()
        network.train()
        loader.batch_sampler.set_epoch(epoch)
        rate = scheduler.get_last_lr()[0]
        loss, accuracy = train_epoch(
            forward, loader, guard, run, epoch=epoch, device=device, accumulate=accumulate, skip_on=skip_on
        )
        scheduler.step()
        try:
            result = validate(epoch)
        except DivergenceError as error:
            since = f"; steps were skipped since {guard.in_a_row[0]}" if guard.in_a_row else ""
            raise DivergenceError(f"validation after epoch {epoch}: {error}{since}. Lower -lr, now {rate:g}") from error
        is_best = result.accuracy >= best
        if is_best:
            best = result.accuracy
            run.save_weights(BEST_WEIGHTS, weights_of.state_dict())
        if save_all:
            run.save_weights(f"epoch-{epoch}.pth", weights_of.state_dict())
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
            skipped_steps=guard.skipped,
        )
        skipped = f", {guard.skipped} steps skipped" if guard.skipped else ""
        run.log(
            f"epoch {epoch}/{max_epoch}: train loss {loss:.4f} acc {accuracy:.2f} %, validation loss {result.loss:.4f} "
            f"acc {result}{' (best)' if is_best else ''}, lr {rate:.4g}, {watch}{skipped}"
        )
