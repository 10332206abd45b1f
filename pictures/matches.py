"""From image files to what a picture of a match shows: images as the network sees them, and episodes, matched."""

import math
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import NamedTuple

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
from pictures.match import Panel, Scales, cell_panels, draw_match, patch_panels, scales_of
from utils import InputError, named_generator, printable

LARGEST_EDGE = 480  # photographs are drawn no larger than this, in pixels
# Queries of an episode that are drawn by default: so many, of which at most so many are wrong where right ones remain.
QUERIES, WRONG_QUERIES = 4, 2


class ViewedImage(NamedTuple):
    """An image through a view.

    Attributes:
        pixels: ``(3, S, S)`` or ``(P, 3, S, S)``, uint8: what the encoder sees.
        image: ``(height, width, 3)`` uint8, the whole image at the size it is drawn; None where the nodes are not patches.
        boxes: left, upper, right, lower of each patch in ``image``.
    """

    pixels: Tensor
    image: Tensor | None
    boxes: list[tuple[float, ...]]


_generator_lock = Lock()  # all threads share torch's global generator


def view_image(image: Image.Image, view: View, seed: int) -> ViewedImage:
    """Apply a view to an RGB image, with random draws from ``seed`` alone, as :class:`ImageDataset` does."""
    with _generator_lock, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        boxes = view.boxes(image.size)
    pixels = view.render(image, boxes)
    if pixels.dim() == 3:
        return ViewedImage(pixels, None, [])
    small = image.copy()
    small.thumbnail((LARGEST_EDGE, LARGEST_EDGE))
    across, down = (new / old for new, old in zip(small.size, image.size, strict=True))
    scaled = [(box.left * across, box.upper * down, box.right * across, box.lower * down) for box in boxes]
    return ViewedImage(pixels, torch.from_numpy(np.array(small)), scaled)


def view_items(dataset: ImageDataset, items: Sequence[tuple[int, int]]) -> list[ViewedImage]:
    """Images of a data set, given as pairs (index, seed of the view)."""
    viewed = []
    for index, seed in items:
        path = dataset.paths[index]
        image = read_image(path, upright=dataset.upright)
        try:
            viewed.append(view_image(image, dataset.view, seed))
        except InputError as error:
            raise InputError(f"{printable(path)}: {error}") from None
    return viewed


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
    scales: Scales

    def draw(self, number: int, *, names: Sequence[str], title: str, flows: int, truth: int | None) -> Figure:
        """A query beside every class. Of several support images, the one nearest to the prototype is shown."""
        shots = len(self.supports[0])
        notes = [f"class shown by shot {k + 1} of {shots}, nearest to its prototype" for k in self.nearest]
        return draw_match(
            self.queries[number],
            [images[k] for images, k in zip(self.supports, self.nearest, strict=True)],
            Matching(*(part[number] for part in self.matching)),
            names=names,
            truth=truth,
            title=title,
            notes=notes if shots > 1 else (),
            top=flows,
            scales=self.scales,
        )


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
    """Encode and match the images of an episode, support first.

    Args:
        model: in evaluation mode.
        generator: of the order of the support images in the structured fully connected layer.
        solver: overrides the model's own.

    Raises:
        DivergenceError: the encoder's features are not finite.
    """
    nodes = encode_images(model, torch.stack([one.pixels for one in viewed]), device=device)
    support, query = nodes[None, : way * shot], nodes[None, way * shot :]
    proto = model.prototypes(support, way=way, shot=shot, solver=solver, generator=generator)
    matching = Matching(*(part[0].cpu() for part in model.matching(proto, query, solver=solver)))
    similarity = torch.cosine_similarity(support[0].unflatten(0, (shot, way)), proto, dim=2).mean(2)  # (K, W)
    panels = [panels_of(one, view, nodes.shape[-1], model.feature_pyramid) for one in viewed]
    supports = [[panels[k * way + number] for k in range(shot)] for number in range(way)]
    nearest = similarity.argmax(0).tolist()
    return MatchedEpisode(matching, supports, panels[way * shot :], nearest, scales_of(matching))


class FixedMatches:
    """The same query of each of the same episodes, drawn with whatever weights a model has at the time.

    Args:
        dataset: of the episodes.
        episodes: lists of (index, seed of the view), support first. Of episode k, query ``k % way`` is drawn.
        solver: overrides the model's own.
        seed: of the run.
        top: flows drawn per class.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        episodes: Sequence[Sequence[tuple[int, int]]],
        *,
        way: int,
        shot: int,
        seed: int,
        device: torch.device,
        solver: str | None = None,
        top: int = 10,
    ) -> None:
        self.view, self.way, self.shot, self.seed, self.top = dataset.view, way, shot, seed, top
        self.device, self.solver = device, solver
        support = way * shot
        chosen = [[*items[:support], items[support + k % way]] for k, items in enumerate(episodes)]
        self.viewed = [view_items(dataset, items) for items in chosen]
        self.names = [[dataset.class_names[dataset.labels[index]] for index, _ in items[:way]] for items in chosen]

    def draw(self, model: DeepEMD) -> Iterator[tuple[str, np.ndarray]]:
        """Name and pixels of each picture."""
        model = model.folded() if self.viewed else model
        for k, (viewed, names) in enumerate(zip(self.viewed, self.names, strict=True)):
            episode = match_episode(
                model,
                self.view,
                viewed,
                way=self.way,
                shot=self.shot,
                device=self.device,
                solver=self.solver,
                generator=named_generator(self.seed, "sfc", 0, k),
            )
            query = k % self.way
            title = f"validation episode {k}, query {query}"
            figure = episode.draw(0, names=names, title=title, flows=self.top, truth=query)
            yield f"episode-{k}-query-{query}", to_pixels(figure)


def check_head(head: str) -> None:
    """Raise InputError for a head that has no flow to draw."""
    if head.partition(":")[0] != "deepemd":
        raise InputError(f"-head {head} computes no flow, so there is no match to draw; only -head deepemd does")


def choose_queries(logits: Tensor, way: int) -> list[int]:
    """A few queries: up to :data:`WRONG_QUERIES` wrong ones, then right ones, of different classes where possible."""
    truths = [number % way for number in range(len(logits))]
    is_right = [predicted == truth for predicted, truth in zip(logits.argmax(1).tolist(), truths, strict=True)]
    wrong = [number for number, right in enumerate(is_right) if not right]
    right = [number for number, right in enumerate(is_right) if right]
    chosen: list[int] = []
    for numbers, most in ((wrong, WRONG_QUERIES), (right, QUERIES), (wrong, QUERIES)):
        for distinct in (True, False):
            for number in numbers:
                is_repeat = distinct and truths[number] in {truths[k] for k in chosen}
                if len(chosen) < most and number not in chosen and not is_repeat:
                    chosen.append(number)
    return sorted(chosen)
