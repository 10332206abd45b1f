"""From image files to what a picture of a match shows: images as the network sees them, and episodes, matched."""

import math
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dataloader.dataset import ImageDataset
from dataloader.images import read_image
from dataloader.views import GridView, View
from engine.evaluation import encode_images
from Models import DeepEMD
from Models.matching import Matching
from pictures.canvas import to_pixels
from pictures.match import Panel, cell_panels, draw_match, patch_panels
from utils import InputError, named_generator, printable

LARGEST_EDGE = 480  # photographs are drawn no larger than this, in pixels
QUERIES = 4  # of an episode that are drawn by default


class ViewedImage(NamedTuple):
    """An image through a view."""

    pixels: Tensor  # (3, S, S) or (P, 3, S, S), uint8: what the encoder sees
    image: Tensor | None  # (height, width, 3) uint8, at the size it is drawn; None where the nodes are not patches
    boxes: list[tuple[float, ...]]  # left, upper, right, lower of each patch in ``image``


_generator_lock = Lock()  # all threads share torch's global generator


def view_image(image: Image.Image, view: View, seed: int) -> ViewedImage:
    """Apply a view to an RGB image, as :class:`ImageDataset` does for an index and a seed."""
    with _generator_lock:
        boxes = view.seeded_boxes(image.size, seed)
    pixels = view.render(image, boxes)
    if pixels.dim() == 3:
        return ViewedImage(pixels, None, [])
    small = image.copy()
    small.thumbnail((LARGEST_EDGE, LARGEST_EDGE))
    across, down = (new / old for new, old in zip(small.size, image.size, strict=True))
    scaled = [(box.left * across, box.upper * down, box.right * across, box.lower * down) for box in boxes]
    return ViewedImage(pixels, torch.from_numpy(np.array(small)), scaled)


def view_file(path: str, view: View, seed: int, **reading: Any) -> ViewedImage:
    """Read an image file and apply a view to it; ``reading`` as for :func:`read_image`."""
    image = read_image(path, **reading)
    try:
        return view_image(image, view, seed)
    except InputError as error:
        raise InputError(f"{printable(path)}: {error}") from None


def view_items(dataset: ImageDataset, items: Sequence[tuple[int, int]]) -> list[ViewedImage]:
    """Images of a data set, given as pairs (index, seed of the view)."""
    return [view_file(dataset.paths[k], dataset.view, seed, upright=dataset.upright) for k, seed in items]


def panels_of(viewed: ViewedImage, view: View, nodes: int, feature_pyramid: Sequence[int] = ()) -> list[Panel]:
    """What is drawn of an image that became so many nodes."""
    if viewed.image is None:
        cells = math.isqrt(nodes - sum(size**2 for size in feature_pyramid))
        return cell_panels(viewed.pixels, [*feature_pyramid, cells])
    levels = view.patch_list if isinstance(view, GridView) else ()
    return patch_panels(viewed.image, viewed.boxes, viewed.pixels, levels)


class MatchedEpisode(NamedTuple):
    """An episode: how its queries were matched with the prototypes of its classes, and what is drawn of its images."""

    matching: Matching  # logits (Q, W), flow (Q, W, M, N), ...
    supports: list[list[list[Panel]]]  # W lists of K images
    queries: list[list[Panel]]
    nearest: list[int]  # of each class, the shot whose nodes are nearest to those of the prototype

    def draw(self, number: int, *, names: Sequence[str], title: str, flows: int, truth: int | None) -> Figure:
        """A query beside every class. Of several support images, the one nearest to the prototype is shown."""
        shots = len(self.supports[0])
        notes = [f"class shown by shot {k + 1} of {shots}, nearest to its prototype" for k in self.nearest]
        protos = [images[k] for images, k in zip(self.supports, self.nearest, strict=True)]
        matching = Matching(*(part[number] for part in self.matching))
        labels = {"names": names, "title": title, "notes": notes if shots > 1 else ()}
        return draw_match(self.queries[number], protos, matching, truth=truth, top=flows, **labels)


@torch.no_grad()
def match_episode(
    model: DeepEMD,
    view: View,
    viewed: Sequence[ViewedImage],
    *,
    way: int,
    shot: int,
    device: torch.device,
    generator: torch.Generator | None = None,
    solver: str | None = None,
) -> MatchedEpisode:
    """Encode and match the images of an episode, support first, with a model in evaluation mode.

    ``generator`` orders the support images in the structured fully connected layer; ``solver`` overrides the model's own.
    DivergenceError if the encoder's features are not finite.
    """
    nodes = encode_images(model, torch.stack([one.pixels for one in viewed]), device=device)
    support, query = nodes[None, : way * shot], nodes[None, way * shot :]
    proto = model.prototypes(support, way=way, shot=shot, solver=solver, generator=generator)
    matching = Matching(*(part[0].cpu() for part in model.matching(proto, query, solver=solver)))
    similarity = torch.cosine_similarity(support[0].unflatten(0, (shot, way)), proto, dim=2).mean(2)  # (K, W)
    panels = [panels_of(one, view, nodes.shape[-1], model.feature_pyramid) for one in viewed]
    supports = [[panels[k * way + number] for k in range(shot)] for number in range(way)]
    return MatchedEpisode(matching, supports, panels[way * shot :], nearest=similarity.argmax(0).tolist())


def draw_fixed(
    model: DeepEMD,
    dataset: ImageDataset,
    episodes: Sequence[Sequence[tuple[int, int]]],
    *,
    way: int,
    shot: int,
    seed: int,
    device: torch.device,
    solver: str | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and pixels of a picture of query ``k % way`` of each episode k, as :func:`match_episode` matches it.

    ``episodes`` are lists of (index, seed of the view), support first; ``seed`` is that of the run.
    """
    model = model.folded() if episodes else model
    for k, items in enumerate(episodes):
        query, support = k % way, way * shot
        viewed = view_items(dataset, [*items[:support], items[support + query]])
        given = {"device": device, "generator": named_generator(seed, "sfc", 0, k), "solver": solver}
        episode = match_episode(model, dataset.view, viewed, way=way, shot=shot, **given)
        names = [dataset.class_names[dataset.labels[index]] for index, _ in items[:way]]
        figure = episode.draw(0, names=names, title=f"validation episode {k}, query {query}", flows=10, truth=query)
        yield f"episode-{k}-query-{query}", to_pixels(figure)


def check_head(head: str) -> None:
    """Raise InputError for a head that has no flow to draw."""
    if head.partition(":")[0] != "deepemd":
        raise InputError(f"-head {head} computes no flow, so there is no match to draw; only -head deepemd does")


def choose_queries(logits: Tensor, way: int) -> list[int]:
    """The first few queries, wrong ones before right ones."""
    is_right = [int(row.argmax()) == number % way for number, row in enumerate(logits)]
    return sorted(sorted(range(len(logits)), key=is_right.__getitem__)[:QUERIES])
