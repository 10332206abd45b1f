"""Mean and deviation of the nodes of training images, channel by channel: what ``-norm base`` and ``standard`` subtract and
divide by.

They come from images of the training classes, never from those that are classified: a classifier that sees one image at a time
cannot know the statistics of the test images. C channels, N nodes, B any batch.
"""

import hashlib
import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils import InputError, write_atomically

OF_STATISTICS = ("base", "standard")  # the norms that need them
# The smallest deviation of a channel, as a fraction of the mean one: behind a ReLU, a channel may be 0 on all training images.
DEVIATION_FLOOR = 1e-3


@dataclass(frozen=True, eq=False)
class NodeStatistics:
    """Mean and deviation ``(C,)`` of nodes. ValueError unless they are finite, of the same length, and all deviations above 0."""

    mean: Tensor
    deviation: Tensor

    def __post_init__(self) -> None:
        parts = {"mean": self.mean, "deviation": self.deviation}
        for name, values in parts.items():
            if values.dim() != 1 or not values.is_floating_point() or not values.isfinite().all():
                found = f"{values.dtype} {tuple(values.shape)}".removeprefix("torch.")
                raise ValueError(f"{name} must be finite numbers, one a channel; it is {found}")
        if len(self.mean) != len(self.deviation) or not len(self.mean) or self.deviation.min() <= 0:
            lengths = (
                f"{len(self.mean)} and {len(self.deviation)} channels, deviations {self.deviation.tolist()[:3]}..."
            )
            raise ValueError(f"mean and deviation must have the same channels, and deviation be above 0; got {lengths}")

    @classmethod
    def of(cls, nodes: Tensor | Iterable[Tensor]) -> "NodeStatistics":
        """Those of nodes ``(B, C, N)``, or of batches of them, over images and nodes; the deviation is that of the population.

        A deviation below :data:`DEVIATION_FLOOR` times the mean one is raised to that. ValueError if there are no nodes, or
        if all nodes are the same.
        """
        count, total, squares = 0, 0.0, 0.0
        for batch in [nodes] if isinstance(nodes, Tensor) else nodes:
            batch = batch.double()
            count += batch.shape[0] * batch.shape[-1]
            total, squares = total + batch.sum((0, -1)), squares + batch.square().sum((0, -1))
        if not count:
            raise ValueError("there are no nodes to take statistics of")
        mean = total / count
        deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
        deviation = deviation.clamp_min(DEVIATION_FLOOR * float(deviation.mean()))
        if not deviation.max() > 1e-12 * mean.abs().max():
            raise InputError("all nodes of the training images are the same, so that norms have nothing to divide by")
        return cls(mean.float(), deviation.float())

    @classmethod
    def read(cls, path: Path) -> "NodeStatistics":
        """From an .npz file with the arrays ``mean`` and ``deviation``, as :meth:`write` makes; InputError for others."""
        needed = "the arrays mean and deviation, one number per channel"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(*(torch.from_numpy(arrays[name]).float() for name in ("mean", "deviation")))
        except OSError as error:
            raise InputError(f"cannot read the statistics in {path} ({error.strerror or error})") from error
        except (LookupError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path} is not a file of statistics, which has {needed} ({reason})") from error

    def write(self, path: Path) -> None:
        """Write an .npz file, atomically. InputError if it cannot be written."""
        buffer = io.BytesIO()
        np.savez(buffer, mean=self.mean.cpu().numpy(), deviation=self.deviation.cpu().numpy())
        write_atomically(path, buffer.getbuffer())

    def to(self, device: torch.device) -> "NodeStatistics":
        return NodeStatistics(self.mean.to(device), self.deviation.to(device))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(torch.cat([self.mean, self.deviation]).cpu().numpy().tobytes()).hexdigest()

    def shift_and_scale(self, norm: str, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """``(C, 1)`` each, with the type and device of ``nodes (..., C, N)``: what ``norm`` subtracts and divides by."""
        mean, deviation = (part.to(nodes).unsqueeze(-1) for part in (self.mean, self.deviation))
        return mean, deviation if norm == "standard" else torch.ones_like(deviation)

    def unit_shift_and_scale(self, norm: str, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`shift_and_scale`, with a larger divisor: the squared length of training nodes is then 1 on average."""
        mean, scale = self.shift_and_scale(norm, nodes)
        length = scale.new_tensor(len(scale)).sqrt() if norm == "standard" else self.deviation.to(nodes).norm()
        return mean, scale * length


def needed_statistics(
    norm: str, statistics: NodeStatistics | None, channels: int | None = None
) -> NodeStatistics | None:
    """The statistics if ``norm`` needs any, else None; InputError if there are none, or those of other ``channels``."""
    if norm not in OF_STATISTICS:
        return None
    if statistics is None:
        source = "Set -statistics FOLDER or FILE, or give them to DeepEMD.use_statistics"
        raise InputError(f"-norm {norm} needs the mean and deviation of the nodes of training images. {source}")
    if channels not in (None, len(statistics.mean)):
        found = f"of {len(statistics.mean)} channels, and the nodes have {channels}"
        raise InputError(f"the statistics for -norm {norm} are {found}. Compute them with the same encoder")
    return statistics


def normalised(nodes: Tensor, norm: str, statistics: NodeStatistics | None) -> Tensor:
    """Nodes ``(..., C, N)`` in the space of ``base`` or ``standard``; as they are for the other norms."""
    needed = needed_statistics(norm, statistics, nodes.shape[-2])
    if needed is None:
        return nodes
    shift, scale = needed.shift_and_scale(norm, nodes)
    return (nodes - shift) / scale if norm == "standard" else nodes - shift
