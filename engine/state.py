"""What a run of training is made of, saved and restored.

Every random draw is a function of (seed, name, epoch, index), so no generator's state has to be kept. What remains are the
weights, the optimiser, the schedule, the scale of the loss, the position in the epoch, and the log.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


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
