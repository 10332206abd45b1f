"""The loops that the scripts share: a training run, one epoch of it, one evaluation."""

import argparse
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils import (
    BEST_WEIGHTS,
    InputError,
    RunFolder,
    Stopwatch,
    mean_confidence_interval,
    named_generator,
    number_above_zero,
    number_at_least,
)

# So many steps in a row without a usable gradient, and the run stops.
PATIENCE = 10


def add_training_arguments(
    parser: argparse.ArgumentParser, *, max_epoch: int, bs: int, bs_help: str, lr: float, step_size: int, gamma: float
) -> None:
    """The flags that :func:`fit` and :func:`make_optimizer` read, with a script's defaults."""
    group = parser.add_argument_group("training")
    count, rate = number_at_least(1, int), number_above_zero(float)
    group.add_argument("-max_epoch", type=count, default=max_epoch, help="(default: %(default)s)")
    group.add_argument("-bs", type=count, default=bs, help=f"{bs_help} (default: %(default)s)")
    group.add_argument("-lr", type=rate, default=lr, help="learning rate (default: %(default)s)")
    group.add_argument(
        "-step_size", type=count, default=step_size, help="epochs between its drops (default: %(default)s)"
    )
    group.add_argument("-gamma", type=rate, default=gamma, help="factor of a drop (default: %(default)s)")
    group.add_argument("-save_all", action="store_true", help="keep the weights of every epoch, as epoch-<n>.pth")
    group = parser.add_argument_group("validation")
    group.add_argument(
        "-set", choices=("val", "test"), default="val", help="split to validate on (default: %(default)s)"
    )
    group.add_argument(
        "-random_val_task", action="store_true", help="new validation episodes every epoch, not the same ones"
    )


def make_optimizer(
    network: nn.Module, args: argparse.Namespace
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.StepLR]:
    """The published optimiser: SGD with Nesterov momentum, its learning rate falling in steps."""
    optimizer = torch.optim.SGD(network.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=args.step_size, gamma=args.gamma)


def make_loader(dataset: Dataset, batches: Iterable, *, num_workers: int, device: torch.device) -> DataLoader:
    """A loader of the given batches of indices, whose worker processes outlive the epoch."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # the loader's own draws decide nothing, and must not disturb those that do
    )


class Evaluation(NamedTuple):
    loss: float  # mean cross entropy
    accuracy: float  # mean, in percent
    interval: float  # half width of its 95 % interval, in percent
    accuracies: list[float]  # one per episode, in percent

    def __str__(self) -> str:
        return f"{self.accuracy:.2f} +- {self.interval:.2f} %"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    labels: Tensor,
    *,
    way: int,
    shot: int,
    device: torch.device,
    seed: int,
    solver: str | None = None,
    title: str = "",
) -> Evaluation:
    """Classify the queries of every episode of a loader.

    Args:
        model: takes ``(images, way=, shot=, solver=, generator=)`` to logits ``(W*Q, W)``. Left in evaluation mode.
        loader: gives the images of one episode at a time, support first.
        labels: ``(W*Q,)``, of the queries.
        seed: of the draws inside the model; those of episode k depend on it and on k alone.
        solver: in the place of the model's own.
    """
    model.eval()
    labels = labels.to(device)
    losses, accuracies = [], []
    bar = tqdm(loader, desc=title, leave=False, dynamic_ncols=True)
    for number, (images, _) in enumerate(bar):
        generator = named_generator(seed, "episode", number)
        logits = model(images.to(device, non_blocking=True), way=way, shot=shot, solver=solver, generator=generator)
        losses.append(F.cross_entropy(logits, labels).item())
        accuracies.append(100 * (logits.argmax(1) == labels).float().mean().item())
        mean, interval = mean_confidence_interval(accuracies)
        bar.set_postfix_str(f"acc {mean:.2f} +- {interval:.2f} %", refresh=False)
    return Evaluation(sum(losses) / len(losses), *mean_confidence_interval(accuracies), accuracies)


class StepGuard:
    """Lets the optimiser step only on whole, finite gradients; counts the steps that were skipped.

    Raises:
        InputError: from :meth:`step`, when skipped steps follow each other without end.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self.in_a_row = 0
        self.failure: str | None = None

    def fail(self, why: str) -> None:
        """Something went wrong on the way to the next step, which is therefore to be skipped."""
        self.failure = why

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step or skip, and clear the gradients."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        failure, self.failure = self.failure, None
        if failure is None and not torch.isfinite(torch.stack([gradient.norm() for gradient in gradients]).sum()):
            failure = "gradient not finite"
        if failure is None:
            optimizer.step()
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
            tqdm.write(f"step skipped ({self.skipped} so far): {failure}")
        optimizer.zero_grad(set_to_none=True)
        if self.in_a_row >= PATIENCE:
            raise InputError(
                f"{self.in_a_row} steps in a row were skipped, the last because: {failure}. Lower -lr, or try another -solver"
            )


def train_epoch(
    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    guard: StepGuard,
    run: RunFolder,
    *,
    epoch: int,
    device: torch.device,
    accumulate: int = 1,
    skip_on: tuple[type[Exception], ...] = (),
) -> tuple[float, float]:
    """One pass over a loader; returns mean loss and mean accuracy in percent.

    Args:
        forward: ``(images, labels)`` of a batch to ``(logits, labels)``.
        epoch: counted from 1.
        accumulate: batches per optimiser step, whose mean gradient it takes.
        skip_on: errors of a batch that cost its step, not the run.
    """
    losses, accuracies = [], []
    bar = tqdm(loader, desc=f"epoch {epoch}", leave=False, dynamic_ncols=True)
    for number, (images, labels) in enumerate(bar, start=1):
        try:
            logits, labels = forward(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))
            loss = F.cross_entropy(logits, labels)
            (loss / accumulate).backward()
            losses.append(loss.item())
            accuracies.append(100 * (logits.argmax(1) == labels).float().mean().item())
            step = (epoch - 1) * len(loader) + number
            run.scalars(step, loss=losses[-1], acc=accuracies[-1], total_loss=losses[-1] / accumulate)
        except skip_on as error:
            guard.fail(str(error))
        if number % accumulate == 0:
            guard.step(optimizer)
        bar.set_postfix_str(f"loss {_mean(losses):.4f}, acc {_mean(accuracies):.2f} %", refresh=False)
    return _mean(losses), _mean(accuracies)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def fit(
    network: nn.Module,
    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    loader: DataLoader,
    validate: Callable[[], Evaluation],
    run: RunFolder,
    weights_of: nn.Module,
    args: argparse.Namespace,
    *,
    device: torch.device,
    accumulate: int = 1,
    skip_on: tuple[type[Exception], ...] = (),
) -> None:
    """Train for ``-max_epoch`` epochs; after each, validate, write the log, and keep the best weights.

    Args:
        network: what is trained; in training mode during an epoch.
        forward: ``(images, labels)`` of a batch to ``(logits, labels)``.
        validate: evaluates the network as it is. Of equal accuracies the later epoch wins.
        weights_of: the module whose state dict is saved.
        accumulate, skip_on: see :func:`train_epoch`.
    """
    optimizer, scheduler = make_optimizer(network, args)
    guard = StepGuard()
    best = -1.0
    for epoch in range(1, args.max_epoch + 1):
        watch = Stopwatch()
        network.train()
        rate = scheduler.get_last_lr()[0]
        loss, accuracy = train_epoch(
            forward,
            loader,
            optimizer,
            guard,
            run,
            epoch=epoch,
            device=device,
            accumulate=accumulate,
            skip_on=skip_on,
        )
        scheduler.step()
        result = validate()
        is_best = result.accuracy >= best
        if is_best:
            best = result.accuracy
            run.save_weights(BEST_WEIGHTS, weights_of.state_dict())
        if args.save_all:
            run.save_weights(f"epoch-{epoch}.pth", weights_of.state_dict())
        run.scalars(epoch, val_loss=result.loss, val_acc=result.accuracy)
        run.record(
            epoch=epoch, lr=rate, train_loss=loss, train_acc=accuracy, val_loss=result.loss, val_acc=result.accuracy,
            val_interval=result.interval, best=is_best, skipped_steps=guard.skipped,
        )  # fmt: skip
        skipped = f", {guard.skipped} steps skipped" if guard.skipped else ""
        run.log(
            f"epoch {epoch}/{args.max_epoch}: train loss {loss:.4f} acc {accuracy:.2f} %, {args.set} loss {result.loss:.4f} "
            f"acc {result}{' (best)' if is_best else ''}, lr {rate:.4g}, {watch}{skipped}"
        )
