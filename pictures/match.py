"""One query beside what it was matched with: the nodes of both images, their weights, and the strongest flows.

Axes: W classes, M nodes of the query, N nodes of a prototype, P patches, S pixels of an edge. In the plot of a class, a unit
is the edge of the largest panel of an image; the query is at 0 to 1, the class at ``1 + GAP`` to ``2 + GAP``.
"""

import colorsys
import math
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.patheffects import withStroke

from Models.matching import Matching
from pictures.canvas import NEUTRAL, RIGHT, SERIES, WRONG, make_figure, shorten

GAP = 0.35  # between the images
BELOW = 0.04  # between the largest panel of an image and the others
DARKEST = 0.12  # brightness of a node without weight
BRIGHTEST = 1.5  # the weight that is drawn brightest, and the flow that is drawn widest; the mean weight of a node is 1
INSET = 0.007  # of the frame of a node, so that it does not cover that of its neighbour

Boxes = Sequence[Sequence[float]]  # left, upper, right, lower
Place = tuple[float, float]  # x and y


class Panel(NamedTuple):
    """A raster with some nodes of an image in it, in their order."""

    pixels: np.ndarray  # (height, width, 3), uint8
    boxes: Boxes  # in the raster, one per node
    places: list[Place]  # the centre of each node in the image, 0 to 1
    is_overview: bool = False  # boxes are outlined, and the nodes drawn in another panel


def cell_panels(pixels: Any, levels: Sequence[int]) -> list[Panel]:
    """An image whose nodes are the cells of its feature map, and of the levels of its feature pyramid.

    ``pixels`` are what the encoder sees, ``(3, S, S)`` uint8, else ValueError; ``levels`` are the cells along an edge of
    each level, in the order of the nodes.
    """
    raster = _as_raster(pixels, "(3, S, S)")
    size, panels = len(raster), []
    for cells in levels:
        spans = list(pairwise(k * size / cells for k in range(cells + 1)))
        boxes = [(left, upper, right, lower) for upper, lower in spans for left, right in spans]
        panels.append(Panel(raster, boxes, _centres(boxes, size, size)))
    return panels


def patch_panels(image: Any, boxes: Boxes, patches: Any, levels: Sequence[int]) -> list[Panel]:
    """An image whose nodes are patches: the image with their boxes, and the patches as the encoder sees them.

    Args:
        image: ``(height, width, 3)`` uint8, the whole image.
        boxes: of each patch in the image.
        patches: ``(P, 3, S, S)`` uint8, else ValueError.
        levels: patches along an edge of each level of a grid, or ``()`` for patches in no order.
    """
    image, patches = np.asarray(image), _as_raster(patches, "(P, 3, S, S)")
    places = _centres(boxes, image.shape[1], image.shape[0])
    panels, first, size = [Panel(image, boxes, places, is_overview=True)], 0, patches.shape[1]
    for cells, count in [(cells, cells**2) for cells in levels] or [(math.ceil(len(boxes) ** 0.5), len(boxes))]:
        shown = slice(first, first + count)
        mosaic = np.full((-(-count // cells) * size, cells * size, 3), 255, np.uint8)
        corners = [(k % cells * size, k // cells * size) for k in range(count)]
        for (left, upper), patch in zip(corners, patches[shown], strict=True):
            mosaic[upper : upper + size, left : left + size] = patch
        panels.append(Panel(mosaic, [(x, y, x + size, y + size) for x, y in corners], places[shown]))
        first += count
    return panels


def _as_raster(pixels: Any, shape: str) -> np.ndarray:
    """8-bit pixels of that shape with the colours last."""
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != len(shape.split(",")) or pixels.shape[-3] != 3:
        raise ValueError(f"pixels must be uint8 of shape {shape}; these are {pixels.dtype} of shape {pixels.shape}")
    return np.ascontiguousarray(np.moveaxis(pixels, -3, -1))


def _centres(boxes: Boxes, width: int, height: int) -> list[Place]:
    return [((left + right) / 2 / width, (upper + lower) / 2 / height) for left, upper, right, lower in boxes]


def strongest(flow: Any, top: int) -> tuple[list[tuple[int, int, float]], str]:
    """The ``top`` largest entries of a flow ``(M, N)`` as (row, column, share of the mass), and what they are, in words."""
    flow = np.asarray(flow, np.float64)
    shares = flow / max(flow.sum(), 1e-12)
    count = int((shares > 1e-6).sum())  # iterative solvers leave traces everywhere
    order = np.argsort(-shares, axis=None, kind="stable")[: min(top, count)]
    found = [(*divmod(int(k), flow.shape[1]), float(shares.flat[k])) for k in order]
    which = f"top {top} of" if top < count else "all"
    return found, f"{which} {count} flows: {100 * shares.flat[order].sum():.0f} % of the mass"


def place_color(x: float, y: float) -> tuple[float, float, float]:
    """The colour of a place in the image (0 to 1): hue by direction from the centre, paler towards the centre."""
    across, down = 2 * x - 1, 2 * y - 1
    distance = min(1.0, math.hypot(across, down) / 0.8)
    hue = math.atan2(down, across) / (2 * math.pi) % 1
    return colorsys.hsv_to_rgb(hue, 0.45 + 0.55 * distance if distance > 0.1 else 0.0, 1.0)


def draw_match(
    query: Sequence[Panel],
    protos: Sequence[Sequence[Panel]],
    matching: Matching,
    *,
    names: Sequence[str],
    truth: int | None = None,
    title: str = "",
    notes: Sequence[str] = (),
    top: int = 10,
) -> Figure:
    """A query beside each of its W prototypes, with the weights of their nodes and the strongest flows between them.

    Args:
        query, protos: an image, and W that stand for the classes, from :func:`cell_panels` or :func:`patch_panels`.
        matching: of that query: logits ``(W,)``, flow ``(W, M, N)``, supply ``(W, M)``, demand ``(W, N)``.
        truth: the number of the true class, if known.
        names, notes: W names, and W remarks on the images of the prototypes or none.
        top: flows drawn per prototype.
    """
    matching = Matching(*(np.asarray(part, np.float64) for part in matching))
    way, nodes = len(protos), matching.supply.shape[-1]
    predicted = int(matching.logits.argmax()) if way > 1 else None
    columns, rows = min(way, 3), -(-way // 3)
    unit = 1.7 if way > 1 else 2.6  # inches
    height = max(upper + edge for panels in (query, *protos) for _, upper, edge in _layout(panels, 0))
    text = 0.7 + 0.2 * (way > 1) + 0.2 * bool(notes)
    width, full_height = columns * ((2 + GAP) * unit + 0.35), rows * (height * unit + text) + 0.5
    figure = make_figure(width, full_height + 0.85)
    classes, key = figure.subfigures(2, 1, height_ratios=(full_height, 0.85))
    names, title = [shorten(name, 44) for name in names], shorten(title, int(width * 9))
    if predicted is not None:
        words = f"predicted {names[predicted]}"
        if truth is not None:
            words = f"right: {words}" if truth == predicted else f"wrong: {words}, true class {names[truth]}"
        title = f"{title}\n{words}"
    color = _role(predicted, predicted, truth)[1]
    classes.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=color)
    plots = classes.subplots(rows, columns, squeeze=False).ravel()
    for plot in plots[way:]:
        plot.remove()
    places = [place for panel in query if not panel.is_overview for place in panel.places]
    for number, (axes, proto) in enumerate(zip(plots, protos, strict=False)):
        axes.set(xlim=(-0.05, 2.05 + GAP), ylim=(height + 0.05, -0.05), xticks=[], yticks=[], aspect="equal")
        drawn, caption = strongest(matching.flow[number], top)
        colored = {start for start, *_ in drawn}
        starts = _draw_image(axes, query, 0, matching.supply[number], colored)
        ends = _draw_image(axes, proto, 1 + GAP, matching.demand[number])
        for start, end, share in reversed(drawn):  # the strongest on top
            _draw_flow(axes, starts[start], ends[end], places[start], min(1.0, share * nodes / BRIGHTEST))
        role, color = _role(number, predicted, truth)
        style = "solid" if number == predicted else "dashed"
        axes.spines[:].set(visible=bool(role), color=color, linewidth=2.2, linestyle=style)
        label = f"{names[number]}\n" if way > 1 else ""
        label += f"logit {matching.logits[number]:.2f}   {role}".rstrip()
        axes.set_title(label, loc="left", fontsize=9.5, color=color)
        caption += f"\n{shorten(notes[number], 58)}" if notes else ""
        axes.set_xlabel(caption, loc="left", fontsize=8.5)
    _draw_key(key)
    return figure


def _role(number: int | None, predicted: int | None, truth: int | None) -> tuple[str, str]:
    """What a class is to the query, in words and as a colour."""
    if predicted is None or number not in (predicted, truth):
        return "", "#222222"
    if number != predicted:
        return "true class", NEUTRAL
    if truth is None:
        return "predicted", RIGHT
    return ("predicted: right", RIGHT) if predicted == truth else ("predicted: wrong", WRONG)


def _layout(panels: Sequence[Panel], left: float) -> list[tuple[float, float, float]]:
    """Left, upper and edge of each panel: the one with the most nodes large, the others in a row below."""
    largest = max(range(len(panels)), key=lambda k: (not panels[k].is_overview, len(panels[k].boxes)))
    others = len(panels) - 1
    edge = (1 - (others - 1) * BELOW) / max(1, others)
    places = [(left + k * (edge + BELOW), 1 + BELOW, edge) for k in range(others)]
    places.insert(largest, (left, 0, 1))
    return places


def _draw_image(
    axes: Axes, panels: Sequence[Panel], left: float, weights: np.ndarray, colored: Collection[int] = ()
) -> list[Place]:
    """Draw the panels of an image, some nodes outlined in their colour; returns the centres of the nodes."""
    brightness = DARKEST + (1 - DARKEST) * np.minimum(1.0, weights / max(weights.mean(), 1e-12) / BRIGHTEST)
    centres = []
    for panel, (x, y, edge) in zip(panels, _layout(panels, left), strict=True):
        height, width = panel.pixels.shape[:2]
        scale = edge / max(height, width)
        x, y = x + (edge - scale * width) / 2, y + (edge - scale * height) / 2
        pixels = panel.pixels.astype(np.float32) / 255
        for number, (box, place) in enumerate(zip(panel.boxes, panel.places, strict=True), start=len(centres)):
            x0, y0, x1, y1 = x + scale * box[0], y + scale * box[1], x + scale * box[2], y + scale * box[3]
            color = place_color(*place) if number in colored else None
            if panel.is_overview:  # boxes overlap: thin lines that can be seen on black and on white
                line = {"edgecolor": [0.85 * part for part in color] if color else SERIES[4], "linewidth": 0.9}
                axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, zorder=3, **line))
                continue
            begin, upper, end, lower = map(round, box)
            pixels[upper:lower, begin:end] *= brightness[number]
            line = {"edgecolor": color or "#FFFFFF", "linewidth": 1.3 if color else 0.6}
            line["path_effects"] = [withStroke(linewidth=line["linewidth"] + 0.6, foreground="#000000", alpha=0.5)]
            corner, size = (x0 + INSET, y0 + INSET), (x1 - x0 - 2 * INSET, y1 - y0 - 2 * INSET)
            axes.add_patch(Rectangle(corner, *size, fill=False, zorder=3, **line))
            centres.append(((x0 + x1) / 2, (y0 + y1) / 2))
        axes.imshow(pixels, extent=(x, x + scale * width, y + scale * height, y))
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    return centres


def _draw_flow(axes: Axes, start: Place, end: Place, place: Place, strength: float) -> None:
    """A curve from one node to another, with a strength of up to 1."""
    bend = 0.27 * (place[0] - 0.5) * (1 if place[1] < 0.5 else -1)  # cells of a row leave it on curves of their own
    third = (end[0] - start[0]) / 3
    curve = Path([start, (start[0] + third, start[1] + bend), (end[0] - third, end[1] + bend), end], [1, 4, 4, 4])
    line, color = _line(strength), place_color(*place)
    dark = [withStroke(linewidth=line["linewidth"] + 1.2, foreground="#000000", alpha=0.75 * line["alpha"])]
    axes.add_patch(PathPatch(curve, fill=False, edgecolor=color, path_effects=dark, zorder=4, **line))
    marker = {"markersize": 3.0 + line["linewidth"], "markeredgecolor": "#000000", "markeredgewidth": 0.7, "zorder": 5}
    axes.plot(*start, "o", markerfacecolor=color, **marker)
    axes.plot(*end, "o", markerfacecolor="#FFFFFF", **marker)


def _line(strength: float) -> dict[str, float]:
    return {"linewidth": 0.7 + 3.3 * strength, "alpha": 0.4 + 0.6 * strength}


def _draw_key(figure: SubFigure) -> None:
    """The scale of brightness and the scale of widths."""
    bar, lines = figure.subplots(1, 2)
    shades = np.linspace(DARKEST, 1, 256)[None]
    bar.imshow(shades, cmap="gray", vmin=0, vmax=1, extent=(0, BRIGHTEST, 0, 1), aspect="auto")
    bar.set(yticks=[], box_aspect=0.03)
    bar.tick_params(labelsize=8)
    bar.set_title(f"brightness: weight of a node (mean 1); white: {BRIGHTEST:g} or more", loc="left", fontsize=8.5)
    lines.set_axis_off()
    flows = {"0.5": 0.5, "1": 1.0, f"{BRIGHTEST:g} or more": BRIGHTEST}
    handles = [Line2D([], [], color="#000000", label=name, **_line(flow / BRIGHTEST)) for name, flow in flows.items()]
    title = "width: flow, in the same unit; colour: where it\nleaves the query (left of the class it is matched with)"
    style = {"title_fontsize": 8.5, "fontsize": 8, "alignment": "left", "frameon": False}
    lines.legend(handles=handles, title=title, ncols=3, loc="upper left", **style)
