"""The loops that the scripts share: a training run, one epoch of it, one evaluation."""

import argparse
from collections.abc import Callable, Iterable, Sequence
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


# An image as a data set is asked for it: its index, or its index and the seed of its random view.
Item = int | tuple[int, int]

# Nodes kept over an evaluation take at most this much memory (12,000 images of 25 nodes take 0.7 GB); what needs more is
# gone through in rounds, each of which fits.
CACHE_BYTES = 1 << 30
# Images (patches) encoded at once, per device.
ENCODE_BATCH = {"cpu": 8, "cuda": 256}


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that :func:`evaluate` takes as they are."""
    group = parser.add_argument_group("speed of evaluation")
    group.add_argument(
        "-feature_cache",
        choices=("auto", "off"),
        default="auto",
        help="auto: encode each image once per set of weights, where its view is not random (default: %(default)s)",
    )
    group.add_argument(
        "-episode_batch",
        type=number_at_least(1, int),
        default=8,
        help="episodes that are matched together; decides memory and speed, not results (default: %(default)s)",
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    episodes: Iterable[Sequence[tuple[int, int]]],
    labels: Tensor,
    *,
    way: int,
    shot: int,
    device: torch.device,
    seed: int,
    num_workers: int = 0,
    solver: str | None = None,
    feature_cache: str = "auto",
    episode_batch: int = 8,
    title: str = "",
) -> Evaluation:
    """Classify the queries of every episode.

    Images stream through the encoder in batches of their own, in the order in which episodes ask for them; an episode is
    matched as soon as all its images are there. An image that several episodes ask for is encoded once.

    Args:
        model: has ``folded()``, a copy for evaluation with ``encode(images)`` to nodes ``(B, C, N)`` and
            ``match(support, query, way=, shot=, solver=, generator=)`` to logits ``(E, W*Q, W)``.
        dataset: gives ``(image, label)`` for an :data:`Item`; its ``view`` says whether it ``is_random``.
        episodes: each a list of (index, seed), support first.
        labels: ``(W*Q,)``, of the queries.
        seed: of the draws inside the model; those of episode k depend on it and on k alone.
        solver: in the place of the model's own.
        feature_cache: ``"off"`` encodes an image anew for every use.
        episode_batch: episodes that are matched together.
    """
    model = model.folded()
    labels = labels.to(device)
    is_random = dataset.view.is_random
    wanted: list[list[Item]] = [[item if is_random else item[0] for item in episode] for episode in episodes]
    first = dataset[wanted[0][0]][0]
    shape = model.encode(first.unsqueeze(0).to(device)).shape[1:]  # (C, N)

    capacity = episode_batch * len(wanted[0])
    if feature_cache == "auto" and len({item for episode in wanted for item in episode}) < sum(map(len, wanted)):
        capacity = max(capacity, CACHE_BYTES // (4 * shape.numel()))
    rounds = _rounds(wanted, capacity, distinct=feature_cache == "off")
    patches = first.shape[0] if first.dim() == 4 else 1
    devices = max(1, len(getattr(model, "device_ids", ())))
    encode_batch = max(1, devices * ENCODE_BATCH.get(device.type, ENCODE_BATCH["cpu"]) // patches)
    batches = [items[k : k + encode_batch] for items, _ in rounds for k in range(0, len(items), encode_batch)]
    loader = iter(make_loader(dataset, batches, num_workers=num_workers, device=device))

    losses: list[float] = []
    accuracies: list[float] = []
    bar = tqdm(total=len(wanted), desc=title, leave=False, dynamic_ncols=True)
    for items, places in rounds:
        nodes = _room_for(len(items), shape, device)
        filled = 0
        for start in range(0, len(places), episode_batch):
            group = torch.tensor(places[start : start + episode_batch])  # (E, images)
            while filled <= int(group.max()):
                images = next(loader)[0].to(device, non_blocking=True)
                nodes[filled : filled + len(images)] = model.encode(images)
                filled += len(images)
            chosen = nodes[group.flatten().to(nodes.device)].to(device, non_blocking=True).unflatten(0, group.shape)
            done = len(losses)
            logits = model.match(
                chosen[:, : way * shot],
                chosen[:, way * shot :],
                way=way,
                shot=shot,
                solver=solver,
                generator=[named_generator(seed, "episode", done + k) for k in range(len(group))],
            )
            for episode in logits:
                losses.append(F.cross_entropy(episode, labels).item())
                accuracies.append(100 * (episode.argmax(1) == labels).float().mean().item())
            mean, interval = mean_confidence_interval(accuracies)
            bar.set_postfix_str(f"acc {mean:.2f} +- {interval:.2f} %", refresh=False)
            bar.update(len(group))
        del nodes, chosen  # before there is room for the next round's
    bar.close()
    return Evaluation(sum(losses) / len(losses), *mean_confidence_interval(accuracies), accuracies)


def _rounds(episodes: list[list[Item]], capacity: int, *, distinct: bool) -> list[tuple[list[Item], list[list[int]]]]:
    """Cut the episodes into rounds that need at most ``capacity`` images each.

    Returns per round the images in the order of their first use, and for each episode the places of its images among
    them. ``distinct`` gives every use of an image a place of its own.
    """
    rounds: list[tuple[list[Item], list[list[int]]]] = []
    place: dict[Item, int] = {}
    for episode in episodes:
        new = len(episode) if distinct else sum(item not in place for item in episode)
        if not rounds or len(rounds[-1][0]) + new > capacity:
            rounds.append(([], []))
            place = {}
        items, places = rounds[-1]
        row = []
        for item in episode:
            if distinct or item not in place:
                place[item] = len(items)
                items.append(item)
            row.append(place[item])
        places.append(row)
    return rounds


def _room_for(images: int, shape: torch.Size, device: torch.device) -> Tensor:
    """Room for the nodes of a round: on the model's device, or in pinned host memory where that device is short of it."""
    if device.type == "cuda" and 4 * images * shape.numel() > torch.cuda.mem_get_info(device)[0] // 4:
        return torch.empty(images, *shape, pin_memory=True)
    return torch.empty(images, *shape, device=device)


class StepGuard:
    """Lets the optimiser step only on whole, finite gradients; counts the steps that were skipped.

    Args:
        scaler: scales the loss, where half precision needs it.

    Raises:
        InputError: from :meth:`step`, when skipped steps follow each other without end.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None = None) -> None:
        self.scaler = scaler or torch.amp.GradScaler(enabled=False)
        self.skipped = 0
        self.in_a_row = 0
        self.failure: str | None = None

    def fail(self, why: str) -> None:
        """Something went wrong on the way to the next step, which is therefore to be skipped."""
        self.failure = why

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step or skip, and clear the gradients."""
        failure, self.failure = self.failure, None
        if failure is None:
            self.scaler.unscale_(optimizer)
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if torch.isfinite(torch.stack([gradient.norm() for gradient in gradients]).sum()):
                self.scaler.step(optimizer)
            else:
                failure = "gradient not finite"
            self.scaler.update()  # to a smaller scale, if that was at fault
        if failure is None:
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
            guard.scaler.scale(loss / accumulate).backward()
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
    guard = StepGuard(torch.amp.GradScaler(device.type, enabled=args.amp == "float16"))
    best = -1.0
    for epoch in range(1, args.max_epoch + 1):
        watch = Stopwatch()
        network.train()
        rate = scheduler.get_last_lr()[0]
        loss, accuracy = train_epoch(
            forward, loader, optimizer, guard, run, epoch=epoch, device=device, accumulate=accumulate, skip_on=skip_on
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
            f"epoch {epoch}/{args.max_epoch}: train loss {loss:.4f} acc {accuracy:.2f} %, {args.set} loss {result.loss:.4f} "
            f"acc {result}{' (best)' if is_best else ''}, lr {rate:.4g}, {watch}{skipped}"
        )
