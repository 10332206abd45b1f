"""How a PIL image becomes what the encoder sees: one tensor, a grid of patches, or random patches.

A view works in two steps. ``boxes`` makes every random draw, from torch's global generator. ``render`` cuts the boxes out and
resizes them to 8-bit pixels, ``(3, S, S)`` (fcn) or ``(P, 3, S, S)`` (grid, sampling), where S is the image size, 84 in the
published system. The encoder normalises them, on its device: four times fewer bytes travel there.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils import InputError

# The evaluation view of whole images resizes to 92 and cuts the middle 84.
RESIZE_TO, CROP_TO = 92, 84
# How images are resized.
INTERPOLATIONS = {
    name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")
}


class Box(NamedTuple):
    """A rectangle of an image in pixels, right and lower excluded, and whether it is mirrored after the cut."""

    left: int
    upper: int
    right: int
    lower: int
    flip: bool = False


@dataclass(frozen=True, kw_only=True)
class View(ABC):
    """What every view has: the settings of all of them, of which each reads its own."""

    train: bool
    image_size: int = CROP_TO
    interpolation: str = "bilinear"  # a key of INTERPOLATIONS
    patch_list: Sequence[int] = (2, 3)
    patch_ratio: float = 2.0
    num_patch: int = 9

    @property
    def is_random(self) -> bool:
        """Whether two calls on one image may differ."""
        return self.train

    @property
    @abstractmethod
    def patches(self) -> int:
        """Patches per image; 1 for a whole image."""

    @abstractmethod
    def boxes(self, size: tuple[int, int]) -> list[Box]:
        """The boxes to cut from an image of ``size`` (width, height) pixels; all random draws happen here."""

    def seeded_boxes(self, size: tuple[int, int], seed: int) -> list[Box]:
        """The boxes with draws from ``seed`` alone, so that they do not depend on which process makes them."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.boxes(size)

    def render(self, image: Image.Image, boxes: Sequence[Box]) -> Tensor:
        """The pixels in the boxes of an RGB image, uint8: ``(3, S, S)`` or ``(P, 3, S, S)``."""
        pixels = np.empty((len(boxes), 3, self.image_size, self.image_size), dtype=np.uint8)
        for patch, box in zip(pixels, boxes, strict=True):
            patch[:] = self._cut(image, box, self.image_size)
        return torch.from_numpy(pixels)

    def _cut(self, image: Image.Image, box: Box, size: int) -> np.ndarray:
        if image.mode != "RGB":
            raise ValueError(f'a view needs an RGB image; this one has the mode {image.mode}. Use image.convert("RGB")')
        # Cropped first, then resized: `resize(box=...)` would blend in pixels from outside the box.
        patch = image.crop(box[:4]).resize((size, size), INTERPOLATIONS[self.interpolation])
        pixels = np.asarray(patch).transpose(2, 0, 1)  # (size, size, 3) -> (3, size, size)
        return pixels[:, :, ::-1] if box.flip else pixels

    def __call__(self, image: Image.Image) -> Tensor:
        """Both steps: an RGB image to 8-bit pixels."""
        return self.render(image, self.boxes(image.size))


def grid_boxes(size: int, num_grid: int, ratio: float) -> list[tuple[int, int]]:
    """The ``num_grid`` cells along an axis of ``size`` pixels (section 3.1, image pyramid): (start, end) in ``0..size``.

    Each cell is ``ratio`` times its share of the axis, about the same centre.
    """
    if num_grid < 1 or num_grid % 1 or not 0 < ratio < float("inf"):
        raise ValueError(f"a grid has 1 or more cells and a ratio above 0; this one has {num_grid} and {ratio}")
    cell = size // num_grid
    half = int(size / num_grid * ratio) // 2
    centres = (cell // 2 + cell * i for i in range(num_grid))
    return [(max(0, centre - half), min(size, centre + half)) for centre in centres]


class FcnView(View):
    """The whole image: ``(3, S, S)``. In training a random crop and flip, otherwise the middle."""

    patches = 1

    def boxes(self, size: tuple[int, int]) -> list[Box]:
        return [_draw_crop(size) if self.train else Box(0, 0, *size)]

    def render(self, image: Image.Image, boxes: Sequence[Box]) -> Tensor:
        if self.train:
            return super().render(image, boxes)[0]
        resized = round(self.image_size * RESIZE_TO / CROP_TO)
        margin = round((resized - self.image_size) / 2)
        middle = slice(margin, margin + self.image_size)
        return torch.from_numpy(self._cut(image, boxes[0], resized)[:, middle, middle].copy())


class GridView(View):
    """The cells of an image pyramid, level by level and row by row: ``(P, 3, S, S)``.

    ``patch_list`` names the cells along an edge per level. A cell is enlarged by ``patch_ratio``; in training by
    ``1 + 2 u`` with u uniform in [0, 1), drawn for each level, and each patch may be flipped.

    ``boxes`` raises :class:`InputError` when the image is too small for a level, so that a cell could have no pixel.
    """

    @property
    def patches(self) -> int:
        return sum(num_grid**2 for num_grid in self.patch_list)

    def boxes(self, size: tuple[int, int]) -> list[Box]:
        # Checked for the smallest ratio that can be drawn, so that chance does not decide which image is refused.
        smallest = 1.0 if self.train else self.patch_ratio
        for num_grid in self.patch_list:
            cells = [cell for pixels in size for cell in grid_boxes(pixels, num_grid, smallest)]
            if min(size) < num_grid or any(start >= end for start, end in cells):
                edges = f"{num_grid} cells along each edge (-patch_list): {size[0]}x{size[1]} pixels leave cells without a pixel"
                raise InputError(f"the image is too small for {edges}. Lower -patch_list or use larger images")
        found = []
        for num_grid in self.patch_list:
            ratio = 1 + 2 * torch.rand(()).item() if self.train else self.patch_ratio
            columns, rows = (grid_boxes(pixels, num_grid, ratio) for pixels in size)
            found += [Box(left, upper, right, lower) for upper, lower in rows for left, right in columns]
        return [box._replace(flip=_draw_flip()) for box in found] if self.train else found


class SamplingView(View):
    """``num_patch`` random crops, flipped at random, in training and in evaluation: ``(P, 3, S, S)``."""

    is_random = True

    @property
    def patches(self) -> int:
        return self.num_patch

    def boxes(self, size: tuple[int, int]) -> list[Box]:
        return [_draw_crop(size) for _ in range(self.patches)]


def _draw_crop(size: tuple[int, int]) -> Box:
    from torchvision.transforms import RandomResizedCrop

    width, height = size
    shape_only = torch.empty((1, height, width), device="meta")
    upper, left, rows, columns = RandomResizedCrop.get_params(shape_only, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
    return Box(left, upper, left + columns, upper + rows, flip=_draw_flip())


def _draw_flip() -> bool:
    return torch.rand(1).item() < 0.5


# What each variant of DeepEMD sees: the class, and the settings that are its own.
VIEWS: dict[str, tuple[type[View], tuple[str, ...]]] = {
    "fcn": (FcnView, ()),
    "grid": (GridView, ("patch_list", "patch_ratio")),
    "sampling": (SamplingView, ("num_patch",)),
}


def make_view(deepemd: str, *, train: bool, **settings: Any) -> View:
    """The view of a variant of DeepEMD, a key of :data:`VIEWS`; ``settings`` are the other fields of :class:`View`."""
    if deepemd not in VIEWS:
        raise ValueError(f"no variant {deepemd!r} of DeepEMD; choose one of {', '.join(VIEWS)}")
    if deepemd == "sampling" or (deepemd == "fcn" and train):
        # Importing it takes seconds: here, before loader processes are forked, each of which would import it otherwise.
        import torchvision.transforms  # noqa: F401
    return VIEWS[deepemd][0](train=train, **settings)
