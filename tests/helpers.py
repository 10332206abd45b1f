"""What several test files share: golden files, formula weights."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Tensor]:
    """A golden file as tensors (strings stay numpy arrays)."""
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return {
            key: torch.from_numpy(np.asarray(archive[key])) if archive[key].dtype.kind in "fiu" else archive[key]
            for key in archive.files
        }


def formula_weights(encoder: nn.Module, seed: int) -> None:
    """Fill a ResNet-12 by the formula of golden/README.md."""
    random = np.random.RandomState(seed)
    state = encoder.state_dict()
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros_like(value)
            continue
        draw = torch.from_numpy(random.standard_normal(tuple(value.shape)).astype(np.float32))
        if value.dim() == 4:
            out_channels, _, height, width = value.shape
            draw = draw * (2 / (out_channels * height * width)) ** 0.5
        elif key.endswith("running_var"):
            draw = torch.exp(0.1 * draw)
        elif key.endswith("weight"):
            draw = 1 + 0.1 * draw
        else:
            draw = 0.1 * draw
        state[key] = draw
    encoder.load_state_dict(state)


def normal_images(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())
