"""An episode at a glance: the support images of its classes, and queries with their logits."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Rectangle
from torch import Tensor

from pictures.canvas import NEUTRAL, RIGHT, SERIES, WRONG, make_figure, shorten, wrap
from pictures.match import Panel
from pictures.matches import MatchedEpisode

LARGEST_SHEET = 20  # queries
CELL, ROW, THUMB, SUPPORT = 0.86, 0.52, 0.46, 0.76  # inches: width of a class, height of a query, edges of images
KEY = "numbers: logits; shade: softmax probability\nsolid frame: predicted class; "
KEY += "dashed frame: true class, where another was predicted"


def draw_sheet(episode: MatchedEpisode, *, names: Sequence[str], title: str) -> Figure:
    """A contact sheet of an episode of W named classes: all queries, or the first ones of each class, class by class."""
    way, total = len(names), len(episode.queries)
    per_class = min(total // way, max(1, LARGEST_SHEET // way))
    numbers = [way * k + number for number in range(way) for k in range(per_class)]
    labels = [wrap(shorten(name, 30), 11) for name in names]
    width = max(way * CELL + 2.0, 5.2)
    figure = make_figure(width, len(numbers) * ROW + 0.15 * max(label.count("\n") for label in labels) + 2.1)
    figure.suptitle(shorten(title, int(width * 11)), x=0.01, ha="left", fontsize=11, fontweight="bold")
    axes = figure.subplots()
    axes.set_axis_off()
    _draw_table(axes, episode.matching.logits[numbers], [number % way for number in numbers])
    for row, number in enumerate(numbers):
        axes.text(-1.1, row, f"query {number}", fontsize=8, ha="right", va="center")
        _draw_thumbnail(axes, episode.queries[number], THUMB, (-0.8, row))
    for number, (images, label) in enumerate(zip(episode.supports, labels, strict=True)):
        columns = math.ceil(len(images) ** 0.5)
        size = SUPPORT / columns
        upper = -0.6 - size / ROW * -(-len(images) // columns)
        for k, image in enumerate(images):
            across = number + (k % columns - (columns - 1) / 2) * size / CELL
            _draw_thumbnail(axes, image, 0.95 * size, (across, upper + (k // columns + 0.5) * size / ROW))
        axes.text(number, upper - 0.1, label, fontsize=8, ha="center", va="bottom")
    figure.supxlabel(f"{len(numbers)} of {total} queries; {KEY}", x=0.01, ha="left", fontsize=8)
    return figure


def _draw_table(axes: Axes, logits: Tensor, truths: Sequence[int]) -> None:
    """The logits of some queries, a cell of the axes each."""
    count, way = logits.shape
    shades = LinearSegmentedColormap.from_list("probability", ["#FFFFFF", SERIES[5]])
    mesh = {"edgecolors": "#CCCCCC", "linewidth": 0.6, "cmap": shades, "vmin": 0, "vmax": 1.15}
    axes.pcolormesh(np.arange(way + 1) - 0.5, np.arange(count + 1) - 0.5, logits.softmax(1), **mesh)
    axes.set(xlim=(-1.7, way + 0.2), ylim=(count - 0.5, -1.6))
    for row, (values, truth) in enumerate(zip(logits.tolist(), truths, strict=True)):
        predicted = values.index(max(values))
        for number, value in enumerate(values):
            weight = "bold" if number == predicted else "normal"
            axes.text(number, row, f"{value:.2f}", fontsize=9, fontweight=weight, ha="center", va="center")
        word, color = ("right", RIGHT) if truth == predicted else ("wrong", WRONG)
        axes.text(way - 0.38, row, word, fontsize=9, color=color, va="center")
        frames = {truth: (NEUTRAL, 1.6, "dashed"), predicted: (color, 2.2, "solid")}  # one where they are the same
        for number, (edge, line, style) in frames.items():
            frame = {"edgecolor": edge, "linewidth": line, "linestyle": style, "zorder": 4}
            axes.add_patch(Rectangle((number - 0.46, row - 0.43), 0.92, 0.86, fill=False, **frame))


def _draw_thumbnail(axes: Axes, panels: Sequence[Panel], edge: float, place: tuple[float, float]) -> None:
    """An image with its larger edge of that many inches, centred at a place of the axes."""
    pixels = panels[0].pixels
    image = OffsetImage(pixels, zoom=72 * edge / max(pixels.shape[:2]))
    axes.add_artist(AnnotationBbox(image, place, frameon=False, pad=0, annotation_clip=False))
