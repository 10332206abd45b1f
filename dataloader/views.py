"""How a PIL image becomes what the encoder sees: one tensor, a grid of patches, or random patches.

A view is called with an RGB image and gives ``(3, S, S)`` (fcn) or ``(P, 3, S, S)`` (grid, sampling), normalised;
S is the image size. ``is_random`` says whether two calls may differ. The random draws come from torch's global
generator, which the data set seeds per image. Sizes of the published system: S = 84, shorter steps in proportion.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms


class View(Protocol):
    """What every view is."""

    is_random: bool

    def __call__(self, image: Image.Image) -> Tensor: ...


# The evaluation view of whole images resizes to 92 and cuts the middle 84.
RESIZE_TO, CROP_TO = 92, 84


def grid_boxes(size: int, num_grid: int, ratio: float) -> list[tuple[int, int]]:
    """Where along one axis the cells of a grid lie (section 3.1, image pyramid).

    Args:
        size: pixels of the axis.
        num_grid: cells along it.
        ratio: how much larger than its share each cell is, about the same centre; at least 1 in use.

    Returns:
        ``num_grid`` pairs (start, end), inside ``0..size``.
    """
    cell = size // num_grid
    half = int(size / num_grid * ratio) // 2
    centres = (cell // 2 + cell * i for i in range(num_grid))
    return [(max(0, centre - half), min(size, centre + half)) for centre in centres]


class FcnView:
    """The whole image: ``(3, S, S)``. In training a random crop and flip, otherwise the middle."""

    def __init__(self, *, train: bool, image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.is_random = train
        if train:
            geometry = [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip()]
        else:
            resized = round(image_size * RESIZE_TO / CROP_TO)
            geometry = [transforms.Resize([resized, resized]), transforms.CenterCrop(image_size)]
        self.transform = transforms.Compose([*geometry, _to_tensor(mean, std)])

    def __call__(self, image: Image.Image) -> Tensor:
        return self.transform(image)


class GridView:
    """The cells of an image pyramid, level by level and row by row: ``(P, 3, S, S)``.

    ``patch_list`` names the cells along an edge per level. A cell is enlarged by ``patch_ratio``; in training by
    ``1 + 2 u`` with u uniform in [0, 1), drawn anew for each level, and each patch may be flipped.
    """

    def __init__(
        self,
        *,
        train: bool,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        patch_list: Sequence[int],
        patch_ratio: float,
    ) -> None:
        self.is_random = train
        self.train, self.patch_list, self.patch_ratio = train, patch_list, patch_ratio
        flip = [transforms.RandomHorizontalFlip()] if train else []
        self.transform = transforms.Compose([transforms.Resize([image_size, image_size]), *flip, _to_tensor(mean, std)])

    def boxes(self, width: int, height: int) -> list[tuple[int, int, int, int]]:
        """The patches as (left, upper, right, lower)."""
        found = []
        for num_grid in self.patch_list:
            ratio = 1 + 2 * torch.rand(()).item() if self.train else self.patch_ratio
            columns, rows = grid_boxes(width, num_grid, ratio), grid_boxes(height, num_grid, ratio)
            found += [(left, upper, right, lower) for upper, lower in rows for left, right in columns]
        return found

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.stack([self.transform(image.crop(box)) for box in self.boxes(*image.size)])


class SamplingView:
    """``num_patch`` random crops, flipped at random, in training and in evaluation: ``(P, 3, S, S)``."""

    def __init__(self, *, image_size: int, mean: Sequence[float], std: Sequence[float], num_patch: int) -> None:
        self.is_random = True
        self.num_patch = num_patch
        self.transform = transforms.Compose(
            [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip(), _to_tensor(mean, std)]
        )

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.stack([self.transform(image) for _ in range(self.num_patch)])


def _to_tensor(mean: Sequence[float], std: Sequence[float]) -> transforms.Compose:
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])


# What each variant of DeepEMD sees: the class, and which settings of make_view it takes beside the common ones.
VIEWS: dict[str, tuple[type, tuple[str, ...]]] = {
    "fcn": (FcnView, ("train",)),
    "grid": (GridView, ("train", "patch_list", "patch_ratio")),
    "sampling": (SamplingView, ("num_patch",)),
}


def make_view(
    deepemd: str,
    *,
    train: bool,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int = CROP_TO,
    patch_list: Sequence[int] = (2, 3),
    patch_ratio: float = 2.0,
    num_patch: int = 9,
) -> View:
    """The view of one variant, a key of :data:`VIEWS`; settings that it has no use for are passed over."""
    if deepemd not in VIEWS:
        raise ValueError(f"expected deepemd to be one of {', '.join(VIEWS)}; got {deepemd!r}")
    view, takes = VIEWS[deepemd]
    settings = {"train": train, "patch_list": patch_list, "patch_ratio": patch_ratio, "num_patch": num_patch}
    return view(image_size=image_size, mean=mean, std=std, **{name: settings[name] for name in takes})
