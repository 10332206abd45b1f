"""Problems like an encoder's, images, the memory of this process as Linux reports it, and the rows of a table."""

import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from Models.emd import scale_to_mass
from Models.matching import cosine_similarity_map, cross_reference_weights

CHANNELS, PARTS = 640, 8


def features(batch: int, nodes: int, random: torch.Generator | None = None) -> Tensor:
    """Nodes ``(batch, C, nodes)`` as an encoder makes them: the cells of a map, and of coarser maps pooled from it.

    A map is ``relu(common + parts + noise)``: what all images share, a few parts that come and go smoothly over an image, and
    noise of each cell. The levels are the largest squares that add up to the nodes: 5x5, 2x2 and 1x1 for 30.
    """
    levels, rest = [], nodes
    while rest:
        levels.append(math.isqrt(rest))
        rest -= levels[-1] ** 2
    edge = levels[0]
    common, parts = torch.randn(CHANNELS, 1, generator=random), torch.randn(CHANNELS, PARTS, generator=random)
    coarse = torch.randn(batch, PARTS, 3, 3, generator=random)
    where = F.interpolate(coarse, (edge, edge), mode="bilinear", align_corners=True).flatten(2)
    maps = common + parts / PARTS**0.5 @ where + torch.randn(batch, CHANNELS, edge**2, generator=random) / 2
    maps = maps.relu().unflatten(2, (edge, edge))
    return torch.cat([F.adaptive_avg_pool2d(maps, level).flatten(2) for level in levels], dim=2)


def problems(nodes: int, batch: int) -> list[Tensor]:
    """Cost ``(batch, nodes, nodes)`` and both weights ``(batch, nodes)`` of pairs of images, float32."""
    random = torch.Generator().manual_seed(nodes)
    query, proto = features(2 * batch, nodes, random).unsqueeze(1).split(batch)
    cost = 1 - cosine_similarity_map(query, proto)[:, 0, 0]
    weights = (cross_reference_weights(*pair)[:, 0, 0] for pair in ((query, proto), (proto, query)))
    return [cost, *(scale_to_mass(weight, nodes) for weight in weights)]


def make_images(folder: Path) -> None:
    """A test split of the layout ``folder``: 20 classes of 25 images of 160 pixels."""
    random = np.random.RandomState(0)
    for number in range(500):
        place = folder / "test" / f"class{number // 25:02d}" / f"{number % 25:03d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(random.randint(0, 255, (20, 20, 3), dtype=np.uint8))
        pixels.resize((160, 160), Image.Resampling.BICUBIC).save(place, quality=90)


def megabytes(field: str) -> float:
    """``VmRSS`` (in use now) or ``VmHWM`` (the peak); nan on other systems. A peak from getrusage may be the parent's."""
    status = Path("/proc/self/status")
    return int(re.search(rf"{field}:\s*(\d+)", status.read_text())[1]) / 1024 if status.exists() else float("nan")


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)
