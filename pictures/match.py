"""One query beside what it was matched with: the nodes of both images, their weights, and the strongest flows.

Axes: W classes, M nodes of the query, N nodes of a prototype, P patches, S pixels of an edge. In the plot of a class, a unit
is the edge of the largest panel of an image; the query is at 0 to 1, the class at ``1 + GAP`` to ``2 + GAP``.
"""

import colorsys
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from Models.matching import Matching
from pictures.canvas import NEUTRAL, RIGHT, SERIES, WRONG, display_names, image_settings, make_figure

GAP = 0.35  # between the images
BELOW = 0.04  # between the largest panel of an image and the others
DARKEST = 0.12  # brightness of a node without weight


# --- What is drawn of an image ----------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """A raster with some nodes of an image in it."""

    pixels: np.ndarray  # (height, width, 3), uint8
    boxes: list[tuple[float, float, float, float]]  # left, upper, right, lower in the raster, one per node
    places: list[tuple[float, float]]  # the centre of each node in the image: x and y, 0 to 1
    first: int  # the number of the first of its nodes; the others follow
    is_overview: bool = False  # boxes are outlined, and the nodes drawn in another panel


def cell_panels(pixels: Any, levels: Sequence[int]) -> list[Panel]:
    """An image whose nodes are the cells of its feature map, and of the levels of its feature pyramid.

    Args:
        pixels: ``(3, S, S)`` uint8, what the encoder sees.
        levels: cells along an edge, for each level in the order of the nodes.

    Raises:
        ValueError: pixels of another shape or type.
    """
    raster = _as_raster(pixels, 3)
    panels, first = [], 0
    for cells in levels:
        edges = [(k / cells, (k + 1) / cells) for k in range(cells)]
        shares = [(left, upper, right, lower) for upper, lower in edges for left, right in edges]
        boxes = [tuple(raster.shape[0] * edge for edge in box) for box in shares]
        panels.append(Panel(raster, boxes, _centres(shares), first))
        first += cells**2
    return panels


def patch_panels(image: Any, boxes: Sequence[Sequence[float]], patches: Any, levels: Sequence[int]) -> list[Panel]:
    """An image whose nodes are patches: the image with their boxes, and the patches as the encoder sees them.

    Args:
        image: ``(height, width, 3)`` uint8, the whole image.
        boxes: left, upper, right, lower of each patch in the image; more values are ignored.
        patches: ``(P, 3, S, S)`` uint8.
        levels: patches along an edge of each level of a grid, or ``()`` for patches in no order.

    Raises:
        ValueError: patches of another shape or type.
    """
    image, patches = np.asarray(image), _as_raster(patches, 4)
    height, width = image.shape[:2]
    boxes = [tuple(float(edge) for edge in box[:4]) for box in boxes]
    places = _centres([(left / width, up / height, right / width, low / height) for left, up, right, low in boxes])
    panels = [Panel(image, boxes, places, 0, is_overview=True)]
    counts = [(cells, cells**2) for cells in levels] or [(math.ceil(len(boxes) ** 0.5), len(boxes))]
    first, size = 0, patches.shape[1]
    for cells, count in counts:
        mosaic = np.full((-(-count // cells) * size, cells * size, 3), 255, np.uint8)
        tiles = [(k % cells * size, k // cells * size) for k in range(count)]
        for (left, upper), patch in zip(tiles, patches[first : first + count], strict=True):
            mosaic[upper : upper + size, left : left + size] = patch
        tile_boxes = [(left, upper, left + size, upper + size) for left, upper in tiles]
        panels.append(Panel(mosaic, tile_boxes, places[first : first + count], first))
        first += count
    return panels


def _as_raster(pixels: Any, axes: int) -> np.ndarray:
    """8-bit pixels ``(..., 3, S, S)`` with the colours last."""
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != axes or pixels.shape[-3] != 3:
        shape = "(3, S, S)" if axes == 3 else "(P, 3, S, S)"
        raise ValueError(f"expected 8-bit pixels of shape {shape}; got {pixels.dtype} of shape {pixels.shape}")
    return np.ascontiguousarray(np.moveaxis(pixels, -3, -1))


def _centres(boxes: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    return [((left + right) / 2, (upper + lower) / 2) for left, upper, right, lower in boxes]


# --- What is drawn of a flow ------------------------------------------------------------------------------------------


class Scales(NamedTuple):
    """What is drawn brightest and widest, so that pictures of one episode can be compared."""

    weight: float  # of a node, or more; the mean is 1
    flow: float  # as a share of the mass


def scales_of(matching: Matching) -> Scales:
    """The scales for matched queries. That of flows is the largest; one in thirty weights exceeds that of weights."""
    flow, supply, demand = (np.asarray(part, np.float64) for part in (matching.flow, matching.supply, matching.demand))
    shares = flow / np.maximum(flow.sum((-2, -1), keepdims=True), 1e-12)
    weights = np.concatenate([_relative(supply).ravel(), _relative(demand).ravel()])
    return Scales(float(np.quantile(weights, 29 / 30)), float(shares.max()))


def _relative(weights: np.ndarray) -> np.ndarray:
    return weights / np.maximum(weights.mean(-1, keepdims=True), 1e-12)


class Strongest(NamedTuple):
    """The largest entries of a flow, the largest first."""

    query: list[int]
    proto: list[int]
    shares: list[float]  # of the mass
    count: int  # flows above zero, drawn or not

    def __str__(self) -> str:
        if len(self.shares) < self.count:
            return f"top {len(self.shares)} of {self.count} flows: {100 * sum(self.shares):.0f} % of the mass"
        return f"all {self.count} flows: 100 % of the mass" if self.count > 1 else "1 flow: 100 % of the mass"


def strongest(flow: Any, top: int) -> Strongest:
    """The ``top`` largest entries of a flow ``(M, N)``, as shares of its sum."""
    flow = np.asarray(flow, np.float64)
    shares = (flow / max(flow.sum(), 1e-12)).ravel()
    count = int((shares > 1e-6).sum())  # iterative solvers leave traces everywhere
    order = np.argsort(-shares, kind="stable")[: min(top, count)]
    rows, columns = np.unravel_index(order, flow.shape)
    return Strongest(rows.tolist(), columns.tolist(), shares[order].tolist(), count)


def place_color(x: float, y: float) -> tuple[float, float, float]:
    """The colour of a place in the image (0 to 1): hue by direction from the centre, paler towards the centre."""
    across, down = 2 * x - 1, 2 * y - 1
    distance = min(1.0, math.hypot(across, down) / 0.8)
    hue = math.atan2(down, across) / (2 * math.pi) % 1
    return colorsys.hsv_to_rgb(hue, 0.45 + 0.55 * distance if distance > 0.1 else 0.0, 1.0)


# --- The picture ------------------------------------------------------------------------------------------------------


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
    scales: Scales | None = None,
) -> Figure:
    """A query beside each of its W prototypes, with the weights of their nodes and the strongest flows between them.

    Args:
        query: from :func:`cell_panels` or :func:`patch_panels`.
        protos: W images that stand for the classes.
        matching: of that query: logits ``(W,)``, flow ``(W, M, N)``, supply ``(W, M)``, demand ``(W, N)``.
        names: W names.
        truth: the number of the true class, if known.
        title: one line; with several classes, the prediction is written below it.
        notes: W remarks on the images of the prototypes, or none.
        top: flows drawn per prototype.
        scales: of the episode; of this picture when not given.
    """
    matching = Matching(*(np.asarray(part, np.float64) for part in matching))
    scales = scales or scales_of(matching)
    way = len(protos)
    predicted = int(matching.logits.argmax()) if way > 1 else None
    columns = {1: 1, 2: 2, 4: 2}.get(way, 3)
    rows = -(-way // columns)
    unit = 1.7 if way > 1 else 2.6  # inches
    height = max(lower for panels in (query, *protos) for *_, lower in _layout(panels, 0))
    text = 0.2 * (2 + (way > 1) + any(notes)) + 0.3
    width, full_height = columns * ((2 + GAP) * unit + 0.35), rows * (height * unit + text) + (0.6 if way > 1 else 0.4)
    figure = make_figure(width, full_height + 0.85)
    classes, key = figure.subfigures(2, 1, height_ratios=(full_height, 0.85))
    names = display_names(names, 44)
    title = display_names([title], int(width * 9))[0]
    words, color = _verdict(names, predicted, truth)
    classes.suptitle(f"{title}\n{words}".strip(), x=0.01, ha="left", fontsize=11, fontweight="bold", color=color)
    plots = classes.subplots(rows, columns, squeeze=False).ravel()
    for plot in plots[way:]:
        plot.set_axis_off()
    for number, (axes, proto) in enumerate(zip(plots, protos, strict=False)):
        axes.set(xlim=(-0.05, 2.05 + GAP), ylim=(height + 0.05, -0.05), xticks=[], yticks=[], aspect="equal")
        drawn = strongest(matching.flow[number], top)
        starts = _draw_image(axes, query, 0, matching.supply[number], scales, colored=set(drawn.query))
        ends = _draw_image(axes, proto, 1 + GAP, matching.demand[number], scales)
        _draw_flows(axes, drawn, query, starts, ends, scales)
        role, color = _role(number, predicted, truth)
        for spine in axes.spines.values():
            style = "solid" if number == predicted else "dashed"
            spine.set(visible=bool(role), color=color, linewidth=2.2, linestyle=style)
        label = [names[number], f"logit {matching.logits[number]:.2f}" + (f"   {role}" if role else "")]
        axes.set_title("\n".join(label if way > 1 else label[1:]), loc="left", fontsize=9.5, color=color)
        caption = f"{drawn}\n{display_names([notes[number]], 58)[0]}" if any(notes) else str(drawn)
        axes.set_xlabel(caption, loc="left", fontsize=8.5)
    _draw_key(key, scales, width)
    return figure


def _role(number: int, predicted: int | None, truth: int | None) -> tuple[str, str]:
    """What a class is to the query, in words and as a colour."""
    if predicted is None or number not in (predicted, truth):
        return "", "#222222"
    if number != predicted:
        return "true class", NEUTRAL
    if truth is None:
        return "predicted", RIGHT
    return ("predicted: right", RIGHT) if predicted == truth else ("predicted: wrong", WRONG)


def _verdict(names: Sequence[str], predicted: int | None, truth: int | None) -> tuple[str, str]:
    if predicted is None:
        return "", "#222222"
    if truth is None:
        return f"predicted {names[predicted]}", RIGHT
    if truth == predicted:
        return f"right: predicted {names[predicted]}", RIGHT
    return f"wrong: predicted {names[predicted]}, true class {names[truth]}", WRONG


def _layout(panels: Sequence[Panel], left: float) -> list[tuple[float, float, float, float]]:
    """Left, upper, edge and lower of each panel: the one with the most nodes large, the others in a row below."""
    largest = max(range(len(panels)), key=lambda k: (not panels[k].is_overview, len(panels[k].boxes)))
    others = len(panels) - 1
    edge = (1 - (others - 1) * BELOW) / max(1, others)
    upper = 1 + BELOW
    places = [(left + k * (edge + BELOW), upper, edge, upper + edge) for k in range(others)]
    return [*places[:largest], (left, 0, 1, 1), *places[largest:]]


def _draw_image(
    axes: Axes,
    panels: Sequence[Panel],
    left: float,
    weights: np.ndarray,
    scales: Scales,
    *,
    colored: Collection[int] = (),
) -> dict[int, tuple[float, float]]:
    """Draw the panels of an image, some nodes outlined in their colour; returns the centres of nodes by number."""
    brightness = _brightness(_relative(weights), scales)
    centres = {}
    for panel, (x, y, edge, _) in zip(panels, _layout(panels, left), strict=True):
        height, width = panel.pixels.shape[:2]
        scale = edge / max(height, width)
        x, y = x + (edge - scale * width) / 2, y + (edge - scale * height) / 2
        pixels = panel.pixels.astype(np.float32) / 255
        for number, (box, place) in enumerate(zip(panel.boxes, panel.places, strict=True), start=panel.first):
            corner, size = (
                (x + scale * box[0], y + scale * box[1]),
                (scale * (box[2] - box[0]), scale * (box[3] - box[1])),
            )
            color, is_colored = place_color(*place), number in colored
            if panel.is_overview:  # boxes overlap: thin lines that can be seen on black and on white
                color = [0.85 * part for part in color] if is_colored else SERIES[4]
                _outline(axes, corner, *size, color, 0.9)
                continue
            upper, lower, begin, end = (round(box[k]) for k in (1, 3, 0, 2))
            pixels[upper:lower, begin:end] *= brightness[number]
            centres[number] = (corner[0] + size[0] / 2, corner[1] + size[1] / 2)
            inset = 0.007  # a bright line inside a dark one
            _outline(axes, corner, *size, "#00000090", 0.8)
            inner = (corner[0] + inset, corner[1] + inset)
            line = (color, 1.3) if is_colored else ("#FFFFFF", 0.6)
            _outline(axes, inner, size[0] - 2 * inset, size[1] - 2 * inset, *line)
        extent = (x, x + scale * width, y + scale * height, y)
        axes.imshow(pixels, extent=extent, **image_settings(pixels))
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    return centres


def _outline(axes: Axes, corner: tuple[float, float], width: float, height: float, color: Any, line: float) -> None:
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=color, linewidth=line, zorder=3))


def _brightness(weights: np.ndarray, scales: Scales) -> np.ndarray:
    return DARKEST + (1 - DARKEST) * np.minimum(1.0, weights / scales.weight)


def _draw_flows(
    axes: Axes,
    drawn: Strongest,
    query: Sequence[Panel],
    starts: dict[int, tuple[float, float]],
    ends: dict[int, tuple[float, float]],
    scales: Scales,
) -> None:
    places = {panel.first + k: place for panel in query for k, place in enumerate(panel.places)}
    # The strongest last, so that it is on top.
    for start, end, share in reversed(list(zip(drawn.query, drawn.proto, drawn.shares, strict=True))):
        (x0, y0), (x1, y1) = starts[start], ends[end]
        across, down = places[start]
        bend = 0.27 * (across - 0.5) * (1 if down < 0.5 else -1)  # cells of a row leave it on curves of their own
        third = (x1 - x0) / 3
        curve = Path([(x0, y0), (x0 + third, y0 + bend), (x1 - third, y1 + bend), (x1, y1)], [1, 4, 4, 4])
        strength = min(1.0, share / scales.flow)
        line, alpha, color = _line_width(strength), 0.4 + 0.6 * strength, place_color(across, down)
        for width, edge in ((line + 1.2, (0, 0, 0, 0.75 * alpha)), (line, (*color, alpha))):
            axes.add_patch(PathPatch(curve, fill=False, edgecolor=edge, linewidth=width, zorder=4))
        marker = {"markersize": 3.0 + line, "markeredgecolor": "#000000", "markeredgewidth": 0.7, "zorder": 5}
        axes.plot(x0, y0, "o", markerfacecolor=color, **marker)
        axes.plot(x1, y1, "o", markerfacecolor="#FFFFFF", **marker)


def _line_width(strength: float) -> float:
    return 0.7 + 3.3 * strength


def _draw_key(figure: SubFigure, scales: Scales, width: float) -> None:
    """The scale of brightness and the scale of widths."""
    bar, lines = figure.subplots(1, 2)
    grey = LinearSegmentedColormap.from_list("weight", [(DARKEST,) * 3, (1, 1, 1)])
    figure.colorbar(ScalarMappable(Normalize(0, scales.weight), grey), cax=bar, orientation="horizontal", extend="max")
    bar.set_box_aspect(0.25 / width)
    bar.tick_params(labelsize=8)
    bar.set_title("brightness: weight of a node (mean 1)", loc="left", fontsize=8.5)
    lines.set_axis_off()
    handles = [
        Line2D([], [], color="#000000", alpha=0.4 + 0.6 * strength, linewidth=_line_width(strength), label=label)
        for strength in (0.25, 0.5, 1.0)
        for label in [f"{100 * strength * scales.flow:.2g}"]
    ]
    title = "width: flow, in % of the mass; colour: where it\nleaves the query (left of the class it is matched with)"
    legend = lines.legend(handles=handles, title=title, ncols=3, loc="upper left", frameon=False, fontsize=8)
    legend.set(alignment="left")
    legend.get_title().set_fontsize(8.5)
