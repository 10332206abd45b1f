"""Pictures: what was matched with what, an episode at a glance, the curves of runs, evaluations side by side.

Everything here draws plain arrays and computes no flow, no weight and no logit. Colours are those of Okabe and Ito, which
people who are colour-blind can tell apart, and what a colour says is also said by a word or by a line style.

Axes of arguments: W classes, Q queries, M nodes of a query, N nodes of a prototype, P patches, S pixels of an edge.
matplotlib is imported by the functions that draw, without pyplot, so no window system and no global state is involved.
"""

from __future__ import annotations

import colorsys
import math
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG, NEUTRAL = "#0072B2", "#D55E00", "#555555"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FORMATS = {"png": "pixels, 150 per inch", "pdf": "vector graphics"}
DOTS_PER_INCH = 150

# Inches. A unit is the edge of the largest panel of an image.
_UNIT, _LARGE_UNIT, _GAP, _MARGIN = 1.7, 2.6, 0.6, 0.25
_BELOW = 0.06  # between the largest panel and the others
_DARKEST = 0.12  # brightness of a node without weight


# --- What is drawn of an image ----------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """A raster with some nodes of an image in it."""

    pixels: np.ndarray  # (height, width, 3), uint8
    boxes: list[tuple[float, float, float, float]]  # left, upper, right, lower in the raster, one per node
    places: list[tuple[float, float]]  # where each node lies in the image: x and y, 0 to 1
    first: int  # the number of the first of its nodes; the others follow
    is_overview: bool = False  # boxes are outlined, and the nodes drawn in another panel


def cell_panels(pixels: Any, levels: Sequence[int]) -> list[Panel]:
    """An image whose nodes are the cells of its feature map, and of the levels of its feature pyramid.

    Args:
        pixels: ``(3, S, S)`` uint8, what the encoder sees.
        levels: cells along an edge, for each level in the order of the nodes.
    """
    raster = np.ascontiguousarray(np.moveaxis(np.asarray(pixels), 0, -1))
    panels, first = [], 0
    for cells in levels:
        edges = np.linspace(0, 1, cells + 1).tolist()
        shares = [
            (left, upper, right, lower)
            for upper, lower in zip(edges, edges[1:], strict=False)
            for left, right in zip(edges, edges[1:], strict=False)
        ]
        size = raster.shape[0]
        panels.append(Panel(raster, [tuple(size * edge for edge in box) for box in shares], _centres(shares), first))
        first += cells**2
    return panels


def patch_panels(image: Any, boxes: Sequence[Sequence[float]], patches: Any, levels: Sequence[int]) -> list[Panel]:
    """An image whose nodes are patches: the image with their boxes, and the patches as the encoder sees them.

    Args:
        image: ``(height, width, 3)`` uint8, the whole image.
        boxes: left, upper, right, lower of each patch in the image; more values are ignored.
        patches: ``(P, 3, S, S)`` uint8.
        levels: patches along an edge of each level of a grid, or ``()`` for patches in no order.
    """
    image, patches = np.asarray(image), np.moveaxis(np.asarray(patches), 1, -1)
    height, width = image.shape[:2]
    boxes = [tuple(float(edge) for edge in box[:4]) for box in boxes]
    places = _centres([(left / width, up / height, right / width, low / height) for left, up, right, low in boxes])
    panels = [Panel(image, boxes, places, 0, is_overview=True)]
    counts = [(cells, cells**2) for cells in levels] or [(math.ceil(len(boxes) ** 0.5), len(boxes))]
    first, size = 0, patches.shape[1]
    for cells, count in counts:
        rows = -(-count // cells)
        mosaic = np.full((rows * size, cells * size, 3), 255, np.uint8)
        tiles = [(k % cells * size, k // cells * size) for k in range(count)]
        for (left, upper), patch in zip(tiles, patches[first : first + count], strict=True):
            mosaic[upper : upper + size, left : left + size] = patch
        found = [(left, upper, left + size, upper + size) for left, upper in tiles]
        panels.append(Panel(mosaic, found, places[first : first + count], first))
        first += count
    return panels


def _centres(boxes: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    return [((left + right) / 2, (upper + lower) / 2) for left, upper, right, lower in boxes]


def place_color(x: float, y: float) -> tuple[float, float, float]:
    """The colour of a place in the image (0 to 1): hue by direction from the centre, paler towards the centre."""
    across, down = 2 * x - 1, 2 * y - 1
    distance = min(1.0, math.hypot(across, down) / 0.8)
    hue = math.atan2(down, across) / (2 * math.pi) % 1
    return colorsys.hsv_to_rgb(hue, 0.45 + 0.55 * distance if distance > 0.1 else 0.0, 1.0)


# --- One query and what it was matched with ---------------------------------------------------------------------------


class Scales(NamedTuple):
    """What is drawn brightest and widest, so that pictures of one episode can be compared."""

    weight: float  # of a node, or more; the mean is 1
    flow: float  # as a share of the mass


def scales_of(flow: Any, supply: Any, demand: Any) -> Scales:
    """The scales for flows ``(..., M, N)`` and weights ``(..., M)`` and ``(..., N)``.

    That of flows is the largest. That of weights is exceeded by one in thirty, so that a few do not darken all the others.
    """
    flow, supply, demand = (np.asarray(values, np.float64) for values in (flow, supply, demand))
    shares = flow / np.maximum(flow.sum((-2, -1), keepdims=True), 1e-12)
    weights = [values / np.maximum(values.mean(-1, keepdims=True), 1e-12) for values in (supply, demand)]
    return Scales(
        float(np.quantile(np.concatenate([values.ravel() for values in weights]), 29 / 30)), float(shares.max())
    )


class Strongest(NamedTuple):
    """The largest entries of a flow, the largest first."""

    query: list[int]
    proto: list[int]
    shares: list[float]  # of the mass
    count: int  # flows above zero, drawn or not

    @property
    def share(self) -> float:
        return sum(self.shares)


def strongest(flow: Any, top: int) -> Strongest:
    """The ``top`` largest entries of a flow ``(M, N)``, as shares of its sum."""
    flow = np.asarray(flow, np.float64)
    shares = (flow / max(flow.sum(), 1e-12)).ravel()
    there = shares > 1e-6  # an iterative solver leaves dust
    order = np.argsort(-shares, kind="stable")[: min(top, int(there.sum()))]
    rows, columns = np.unravel_index(order, flow.shape)
    return Strongest(rows.tolist(), columns.tolist(), shares[order].tolist(), int(there.sum()))


def draw_match(
    query: Sequence[Panel],
    protos: Sequence[Sequence[Panel]],
    *,
    names: Sequence[str],
    logits: Any,
    flow: Any,
    supply: Any,
    demand: Any,
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
        names: W names.
        logits: ``(W,)``; with one prototype alone, nothing is said of a prediction.
        flow: ``(W, M, N)``.
        supply, demand: ``(W, M)`` and ``(W, N)``, the weights of the nodes.
        truth: the number of the true class, if known.
        notes: W remarks on the images of the prototypes, or none.
        top: flows drawn per prototype.
        scales: of the episode; of this picture when not given.
    """
    logits, flow, supply, demand = (np.asarray(values, np.float64) for values in (logits, flow, supply, demand))
    scales = scales or scales_of(flow, supply, demand)
    way = len(protos)
    unit = _UNIT if way > 1 else _LARGE_UNIT
    columns = {1: 1, 2: 2, 4: 2}.get(way, 3)
    rows = -(-way // columns)
    height = max(_height(panels, unit) for panels in (query, *protos))
    header = (0.78 if way > 1 else 0.5) if title else 0.25
    caption = 0.52 if way > 1 else 0.34
    slot_width = 2 * unit + _GAP + 0.35
    slot_height = caption + height + (0.46 if any(notes) else 0.28) + 0.2
    has_room = way < rows * columns  # for the key, in the last slot
    width = 2 * _MARGIN + columns * slot_width - 0.35
    key_height = 0 if has_room else _KEY_HEIGHT if columns > 1 else 1.6 * _KEY_HEIGHT
    full_height = header + rows * slot_height + key_height + 0.05
    figure, axes = _canvas(width, full_height)

    names = short_names(names, 44)
    predicted = int(logits.argmax()) if way > 1 else None
    if title:
        axes.text(_MARGIN, 0.3, _shorten(title, int(width * 9.5)), fontsize=11, fontweight="bold", va="center")
        if predicted is not None:
            words, color = _verdict(names, predicted, truth)
            axes.text(_MARGIN, 0.57, words, fontsize=10, color=color, va="center")
    for number, proto in enumerate(protos):
        left = _MARGIN + number % columns * slot_width
        upper = header + number // columns * slot_height
        role, color = _role(number, predicted, truth)
        if way > 1:
            axes.text(left, upper + 0.13, names[number], fontsize=9.5, fontweight="bold", va="center")
        words = f"logit {logits[number]:.2f}" + (f"   {role}" if role else "")
        axes.text(left, upper + caption - 0.18, words, fontsize=9, color=color, va="center")
        upper += caption
        right = left + unit + _GAP
        drawn = strongest(flow[number], top)
        starts = _draw_image(axes, query, left, upper, supply[number], scales, unit, in_color=set(drawn.query))
        ends = _draw_image(axes, proto, right, upper, demand[number], scales, unit)
        if role:
            style = "solid" if number == predicted else "dashed"
            frame = (left - 0.07, upper - 0.07, 2 * unit + _GAP + 0.14, height + 0.14)
            _rectangle(axes, *frame, edge=color, linewidth=2.2, linestyle=style)
        _draw_flows(axes, drawn, query, starts, ends, scales)
        below = upper + height + 0.19
        axes.text(left, below, _share_drawn(drawn), fontsize=8.5, color="#222222", va="center")
        if any(notes):
            axes.text(left, below + 0.18, _shorten(notes[number], 54), fontsize=8, color=NEUTRAL, va="center")
    if has_room:
        _draw_key(axes, _MARGIN + way % columns * slot_width, full_height - slot_height + 0.1, scales, None)
    else:
        _draw_key(axes, _MARGIN, full_height - key_height, scales, slot_width if columns > 1 else None)
    return figure


def _share_drawn(drawn: Strongest) -> str:
    if len(drawn.shares) == drawn.count:
        return f"all {drawn.count} flows: 100 % of the mass" if drawn.count > 1 else "1 flow: 100 % of the mass"
    many = f"top {len(drawn.shares)} of {drawn.count} flows"
    return f"{many}: {100 * drawn.share:.0f} % of the mass"


def _role(number: int, predicted: int | None, truth: int | None) -> tuple[str, str]:
    """What a class is to the query, in words and as a colour."""
    if predicted is None or number not in (predicted, truth):
        return "", "#222222"
    if number == predicted:
        if truth is None:
            return "predicted", RIGHT
        return ("predicted: right", RIGHT) if predicted == truth else ("predicted: wrong", WRONG)
    return "true class", NEUTRAL


def _verdict(names: Sequence[str], predicted: int, truth: int | None) -> tuple[str, str]:
    if truth is None:
        return f"predicted {names[predicted]}", RIGHT
    if truth == predicted:
        return f"right: predicted {names[predicted]}", RIGHT
    return f"wrong: predicted {names[predicted]}, true class {names[truth]}", WRONG


def _draw_image(
    axes: Axes,
    panels: Sequence[Panel],
    left: float,
    upper: float,
    weights: np.ndarray,
    scales: Scales,
    unit: float,
    *,
    in_color: Collection[int] = (),
) -> dict[int, tuple[float, float]]:
    """Draw the panels of an image, some nodes outlined in their colour; returns where nodes are: number to centre."""
    weights = weights / max(weights.mean(), 1e-12)
    centres = {}
    for panel, (x, y, edge) in zip(panels, _layout(panels, left, upper, unit), strict=True):
        box_left, box_upper, scale = _place(axes, panel.pixels, x, y, edge)
        for number, (box, place) in enumerate(zip(panel.boxes, panel.places, strict=True), start=panel.first):
            where = (box_left + scale * box[0], box_upper + scale * box[1])
            size = (scale * (box[2] - box[0]), scale * (box[3] - box[1]))
            is_colored = number in in_color
            color = place_color(*place) if is_colored else "#FFFFFF"
            if not panel.is_overview:
                dark = 1 - _brightness(weights[number], scales)
                _rectangle(axes, *where, *size, face=(0, 0, 0, dark), edge="none", zorder=2)
                centres[number] = (where[0] + size[0] / 2, where[1] + size[1] / 2)
            if (
                panel.is_overview
            ):  # boxes overlap, so each is one thin line, in a colour to be seen on black and on white
                _rectangle(
                    axes,
                    *where,
                    *size,
                    edge=tuple(0.85 * part for part in color) if is_colored else SERIES[4],
                    linewidth=0.9,
                    zorder=3,
                )
                continue
            # A dark line outside a bright one.
            inset = 0.012
            _rectangle(axes, *where, *size, edge="#00000090", linewidth=0.8, zorder=3)
            where, size = (where[0] + inset, where[1] + inset), (size[0] - 2 * inset, size[1] - 2 * inset)
            _rectangle(axes, *where, *size, edge=color, linewidth=1.3 if is_colored else 0.6, zorder=3)
    return centres


def _brightness(weight: float, scales: Scales) -> float:
    return _DARKEST + (1 - _DARKEST) * min(1.0, weight / scales.weight)


def _layout(panels: Sequence[Panel], left: float, upper: float, unit: float) -> list[tuple[float, float, float]]:
    """Left, upper and edge of each panel: the one with the most nodes large, the others in a row below."""
    largest = _largest(panels)
    rest = len(panels) - 1
    edge = (unit - (rest - 1) * _BELOW) / rest if rest else 0
    found, number = [], 0
    for index in range(len(panels)):
        if index == largest:
            found.append((left, upper, unit))
        else:
            found.append((left + number * (edge + _BELOW), upper + unit + _BELOW, edge))
            number += 1
    return found


def _largest(panels: Sequence[Panel]) -> int:
    return max(range(len(panels)), key=lambda k: (not panels[k].is_overview, len(panels[k].boxes)))


def _height(panels: Sequence[Panel], unit: float) -> float:
    return max(y + edge for _, y, edge in _layout(panels, 0, 0, unit))


def _draw_flows(
    axes: Axes,
    drawn: Strongest,
    query: Sequence[Panel],
    starts: dict[int, tuple[float, float]],
    ends: dict[int, tuple[float, float]],
    scales: Scales,
) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    places = {panel.first + k: place for panel in query for k, place in enumerate(panel.places)}
    # The strongest last, so that it lies on top.
    for start, end, share in reversed(list(zip(drawn.query, drawn.proto, drawn.shares, strict=True))):
        (x0, y0), (x1, y1) = starts[start], ends[end]
        across, down = places[start]
        bend = 0.45 * (across - 0.5) * (1 if down < 0.5 else -1)  # cells of a row leave it on curves of their own
        third = (x1 - x0) / 3
        curve = Curve([(x0, y0), (x0 + third, y0 + bend), (x1 - third, y1 + bend), (x1, y1)], [1, 4, 4, 4])
        strength = min(1.0, share / scales.flow)
        line, alpha, color = _line_width(strength), 0.4 + 0.6 * strength, place_color(across, down)
        axes.add_patch(PathPatch(curve, fill=False, edgecolor=(0, 0, 0, 0.75 * alpha), linewidth=line + 1.2, zorder=4))
        axes.add_patch(PathPatch(curve, fill=False, edgecolor=(*color, alpha), linewidth=line, zorder=4))
        for x, y, face in ((x0, y0, color), (x1, y1, "#FFFFFF")):
            size = 3.0 + line
            axes.plot(
                x,
                y,
                "o",
                markersize=size,
                markerfacecolor=face,
                markeredgecolor="#000000",
                markeredgewidth=0.7,
                zorder=5,
            )


def _line_width(strength: float) -> float:
    return 0.7 + 3.3 * strength


_KEY_HEIGHT = 0.85


def _draw_key(axes: Axes, left: float, upper: float, scales: Scales, across: float | None) -> None:
    """The scale of brightness, the scale of widths, and what the other marks mean; a second part ``across`` or below."""
    width = 2 * _UNIT + _GAP
    steps = np.linspace(0, scales.weight, 128)
    ramp = np.array([[_brightness(weight, scales)] * 3 for weight in steps])[None]
    y = upper + 0.26
    axes.text(left, upper + 0.12, "brightness: weight of a node (mean 1)", fontsize=8.5, va="center")
    axes.imshow(ramp, extent=(left, left + width, y + 0.14, y), aspect="auto", interpolation="bilinear")
    _rectangle(axes, left, y, width, 0.14, edge="#000000", linewidth=0.6)
    step = next(size for size in (0.25, 0.5, 1, 2, 5, 10, 25, 50, 100) if scales.weight / size <= 6 or size == 100)
    for tick in np.arange(0, scales.weight, step):
        if tick < 0.75 * scales.weight:
            _draw_tick(axes, left + width * tick / scales.weight, y + 0.14, f"{tick:g}", "center")
    _draw_tick(axes, left + width, y + 0.14, f"{scales.weight:.2g} or more", "right")
    left, y = (left, upper + 0.78) if across is None else (left + across, upper + 0.12)
    axes.text(left, y, "width: flow, in % of the mass", fontsize=8.5, va="center")
    for number, strength in enumerate((0.25, 0.5, 1.0)):
        x = left + 1.95 + 0.68 * number
        axes.plot([x, x + 0.22], [y, y], color="#000000", alpha=0.4 + 0.6 * strength, linewidth=_line_width(strength))
        axes.text(x + 0.27, y, f"{100 * strength * scales.flow:.2g}", fontsize=8, va="center")
    words = "Left: the query; right: what it is matched with. A line\nhas the colour of the query's node that it starts from."
    axes.text(left, y + 0.32, words, fontsize=8.5, va="center", linespacing=1.35)


def _draw_tick(axes: Axes, x: float, y: float, text: str, align: str) -> None:
    axes.plot([x, x], [y, y + 0.04], color="#000000", linewidth=0.6)
    axes.text(x, y + 0.13, text, fontsize=8, ha=align, va="center")


# --- An episode at a glance -------------------------------------------------------------------------------------------


def draw_episode(
    supports: Sequence[Sequence[Any]],
    queries: Sequence[Any],
    *,
    names: Sequence[str],
    numbers: Sequence[int],
    truths: Sequence[int],
    logits: Any,
    title: str,
    subtitle: str = "",
) -> Figure:
    """A contact sheet: the support of each class, and queries with their logits.

    Args:
        supports: W lists of K images ``(height, width, 3)``.
        queries: the images of the queries that are shown.
        names: W names.
        numbers: of those queries in the episode.
        truths: the numbers of their true classes.
        logits: ``(Q, W)``, theirs.
    """
    logits = np.asarray(logits, np.float64)
    way, count = len(names), len(queries)
    blocks = 2 if count > 13 and way <= 6 else 1
    rows = -(-count // blocks)
    cell, row, thumb, label = 0.86, 0.52, 0.46, 0.62
    block_width = label + thumb + 0.12 + way * cell + 0.62
    lines = [_wrap(name, 11, 3) for name in short_names(names, 30)]
    head = 0.95 + 0.15 * max(map(len, lines))
    width = max(2 * _MARGIN + blocks * block_width + (blocks - 1) * 0.3, 5.2)
    height = 0.5 + head + rows * row + 0.75
    figure, axes = _canvas(width, height)
    axes.text(_MARGIN, 0.28, _shorten(title, int(width * 11)), fontsize=11, fontweight="bold", va="center")
    probability = np.exp(logits - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    for block in range(blocks):
        left = _MARGIN + block * (block_width + 0.3)
        first_cell = left + label + thumb + 0.12
        for number in range(way):
            x = first_cell + number * cell
            _draw_shots(axes, supports[number], x + (cell - 0.76) / 2, 0.55, 0.76)
            text = "\n".join(lines[number])
            axes.text(x + cell / 2, 1.37, text, fontsize=8, ha="center", va="top", linespacing=1.15)
        for line, k in enumerate(range(block * rows, min((block + 1) * rows, count))):
            y = 0.5 + head + line * row
            truth, predicted = truths[k], int(logits[k].argmax())
            axes.text(left, y + row / 2, f"query {numbers[k]}", fontsize=8, va="center", color="#222222")
            _place(axes, queries[k], left + label, y + (row - thumb) / 2, thumb)
            for number in range(way):
                x = first_cell + number * cell
                shade = (*_rgb(SERIES[5]), 0.85 * probability[k, number])
                _rectangle(axes, x, y, cell, row, face=shade, edge="#CCCCCC", linewidth=0.6)
                weight = "bold" if number == predicted else "normal"
                words = f"{logits[k, number]:.2f}"
                axes.text(x + cell / 2, y + row / 2, words, fontsize=9, fontweight=weight, ha="center", va="center")
            color = RIGHT if truth == predicted else WRONG
            frame = (y + 0.035, cell - 0.07, row - 0.07)
            _rectangle(axes, first_cell + predicted * cell + 0.035, *frame, edge=color, linewidth=2.2, zorder=4)
            if truth != predicted:
                place = first_cell + truth * cell + 0.035
                _rectangle(axes, place, *frame, edge=NEUTRAL, linewidth=1.6, linestyle="dashed", zorder=4)
            word = "right" if truth == predicted else "wrong"
            axes.text(first_cell + way * cell + 0.1, y + row / 2, word, fontsize=9, color=color, va="center")
    words = (f"{subtitle}; " if subtitle else "") + (
        "numbers: logits; shade: softmax probability\nsolid frame: predicted class; "
        "dashed frame: true class, where another was predicted"
    )
    axes.text(_MARGIN, height - 0.38, words, fontsize=8, va="center", color="#222222", linespacing=1.35)
    return figure


def _draw_shots(axes: Axes, images: Sequence[Any], left: float, upper: float, edge: float) -> None:
    columns = math.ceil(len(images) ** 0.5)
    size = edge / columns
    for number, image in enumerate(images):
        _place(axes, image, left + number % columns * size, upper + number // columns * size, size * 0.96)


# --- Runs and evaluations ---------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """The curves of a run; an entry per epoch, NaN where there is none."""

    name: str
    epochs: Sequence[float]
    train_loss: Sequence[float]
    train_acc: Sequence[float]
    val_loss: Sequence[float]
    val_acc: Sequence[float]
    val_interval: Sequence[float]
    test: tuple[float, float] | None = None  # accuracy of the final test and the half width of its interval


def draw_curves(runs: Sequence[Run]) -> Figure:
    """Loss and accuracy of runs over their epochs: training dashed, validation solid with its 95 % interval."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    names = [_shorten(run.name, 60) for run in runs]
    figure = Figure(figsize=(9.5, 3.9 + 0.22 * len(runs)), dpi=DOTS_PER_INCH, layout="constrained")
    plots = figure.subplots(1, 2)
    last = max(max(run.epochs) for run in runs)
    for number, run in enumerate(runs):
        color = SERIES[number % len(SERIES)]
        marker = {"color": color, "markersize": 4}
        for axes, train, val in zip(plots, (run.train_loss, run.train_acc), (run.val_loss, run.val_acc), strict=True):
            axes.plot(
                run.epochs,
                train,
                linestyle="dashed",
                marker="o",
                markerfacecolor="white",
                **marker | {"linewidth": 1.1},
            )
            axes.plot(run.epochs, val, "o-", linewidth=1.6, **marker)
        low, high = (np.add(run.val_acc, sign * np.asarray(run.val_interval)) for sign in (-1, 1))
        if len(run.epochs) > 1:
            plots[1].fill_between(run.epochs, low, high, color=color, alpha=0.15, linewidth=0)
        else:
            plots[1].errorbar(run.epochs, run.val_acc, run.val_interval, color=color, capsize=3)
        if run.test:
            place = last + max(0.6, 0.06 * last) + number * max(0.15, 0.015 * last)
            plots[1].errorbar(place, *run.test, color=color, marker="D", markersize=5, capsize=3, linewidth=1.6)
    for axes, what in zip(plots, ("loss", "accuracy (%)"), strict=True):
        axes.set_xlabel("epoch")
        axes.set_ylabel(what)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    lines = [Line2D([], [], color=SERIES[k % len(SERIES)], linewidth=3, label=name) for k, name in enumerate(names)]
    grey = {"color": NEUTRAL, "marker": "o", "markersize": 4}
    kinds = [
        Line2D([], [], linestyle="dashed", markerfacecolor="white", label="training", **grey),
        Line2D([], [], label="validation, with 95 % interval", **grey),
    ]
    if any(run.test for run in runs):
        kinds.append(Line2D([], [], color=NEUTRAL, marker="D", linestyle="none", markersize=5, label="final test"))
    figure.legend(handles=lines, loc="outside upper left", fontsize=9, frameon=False, ncols=1)
    figure.legend(handles=kinds, loc="outside lower center", fontsize=9, frameon=False, ncols=3)
    return figure


class Difference(NamedTuple):
    """The accuracies of one evaluation minus those of the first, episode by episode."""

    name: str
    values: Sequence[float]
    mean: float
    interval: float


def draw_comparison(
    evaluations: Sequence[tuple[str, Sequence[float], float, float]], differences: Sequence[Difference], first: str
) -> Figure:
    """Distributions of episode accuracies, and paired differences.

    Args:
        evaluations: of each its name, the accuracies of its episodes, their mean, and the half width of its interval.
        differences: to the evaluation named ``first``, of those that saw the same episodes.
    """
    from matplotlib.figure import Figure

    rows = len(evaluations), len(differences)
    heights = [0.62 * rows[0] + 0.5, *([0.62 * rows[1] + 0.5] if rows[1] else [])]
    figure = Figure(figsize=(8.2, 1.3 + sum(heights)), dpi=DOTS_PER_INCH, layout="constrained")
    plots = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _distributions(plots[0], evaluations, [SERIES[k % len(SERIES)] for k in range(rows[0])])
    plots[0].set_xlabel("accuracy of an episode (%)")
    title = "bars: how many episodes; mark: mean with its 95 % interval"
    plots[0].set_title(title, fontsize=9, loc="left", color="#222222")
    if differences:
        names = [name for name, *_ in evaluations]
        colors = [SERIES[names.index(difference.name) % len(SERIES)] for difference in differences]
        _distributions(plots[1], differences, colors, sign="+")
        plots[1].axvline(0, color="#000000", linewidth=1)
        plots[1].set_xlabel(f"accuracy minus that of {_shorten(first, 40)}, on the same episodes (points)")
    return figure


def _distributions(
    axes: Axes, rows: Sequence[tuple[str, Sequence[float], float, float]], colors: Sequence[str], sign: str = ""
) -> None:
    values = np.concatenate([np.asarray(row[1], np.float64) for row in rows])
    low, high = float(values.min()), float(values.max())
    low, high = (low - 1, high + 1) if low == high else (low, high)
    # As many bins as an episode has possible accuracies, where those are few: otherwise the bars show the rounding.
    distinct = np.unique(values.round(6))
    step = max(float(np.diff(distinct).min()) if len(distinct) > 1 else 1.0, (high - low) / 30)
    if len(distinct) > 1:
        step = float(np.diff(distinct).min()) * math.ceil(step / float(np.diff(distinct).min()) - 1e-6)
    edges = np.arange(low - step / 2, high + step, step)
    for number, ((_, of_row, mean, interval), color) in enumerate(zip(rows, colors, strict=True)):
        counts, _ = np.histogram(of_row, edges)
        base = -number
        axes.bar(
            edges[:-1] + step / 2,
            0.62 * counts / max(1, counts.max()),
            0.92 * step,
            bottom=base,
            color=color,
            alpha=0.35,
            linewidth=0,
        )
        axes.errorbar(mean, base - 0.11, xerr=interval, color=color, marker="D", markersize=5, capsize=3, linewidth=1.8)
        axes.annotate(
            f"{mean:{sign}.2f} ± {interval:.2f}",
            (1.01, base + 0.12),
            xycoords=("axes fraction", "data"),
            fontsize=9,
            color=color,
            va="center",
            annotation_clip=False,
        )
    axes.set_yticks([0.12 - number for number in range(len(rows))])
    axes.set_yticklabels(["\n".join(_wrap(row[0], 28, 3)) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-len(rows) + 0.68, 0.75)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)


# --- From a figure to a file ------------------------------------------------------------------------------------------


def save(figure: Figure, path: Path) -> Path:
    """Write a figure, in the format of its suffix.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    _take_literally(figure)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white")
    except OSError as error:
        raise InputError(f"expected to write {path}; it cannot be written ({error.strerror})") from error
    return path


def to_pixels(figure: Figure) -> np.ndarray:
    """A figure as ``(height, width, 3)`` uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    _take_literally(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _take_literally(figure: Figure) -> None:
    """Names of files and classes may have dollar signs, between which matplotlib would read a formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose only axes count inches from the upper left corner."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    return figure, axes


def _place(axes: Axes, pixels: Any, left: float, upper: float, edge: float) -> tuple[float, float, float]:
    """Draw a raster as large as fits in a square; returns its left, its upper, and inches per pixel."""
    pixels = np.asarray(pixels)
    height, width = pixels.shape[:2]
    scale = edge / max(height, width)
    left, upper = left + (edge - scale * width) / 2, upper + (edge - scale * height) / 2
    extent = (left, left + scale * width, upper + scale * height, upper)
    axes.imshow(
        pixels, extent=extent, aspect="auto", interpolation="nearest" if max(height, width) < 200 else "antialiased"
    )
    return left, upper, scale


def _rectangle(
    axes: Axes,
    left: float,
    upper: float,
    width: float,
    height: float,
    *,
    edge: Any,
    face: Any = "none",
    linewidth: float = 1.0,
    linestyle: str = "solid",
    zorder: float = 3,
) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle(
            (left, upper),
            width,
            height,
            edgecolor=edge,
            facecolor=face,
            linewidth=linewidth,
            linestyle=linestyle,
            zorder=zorder,
        )
    )


def _rgb(color: str) -> tuple[float, float, float]:
    return tuple(int(color[k : k + 2], 16) / 255 for k in (1, 3, 5))


def _shorten(text: str, room: int, *, from_end: bool = False) -> str:
    """Cut the middle (or the end) out of what is too long."""
    if len(text) <= room:
        return text
    head = room - 1 if from_end else -(-(room - 1) // 2)
    return text[:head] + "…" + text[len(text) - (room - 1 - head) :]


def short_names(names: Sequence[str], room: int) -> list[str]:
    """Names of up to ``room`` characters; if the cut takes away what tells them apart, their common beginning goes too."""
    short = [_shorten(name, room) for name in names]
    if len(set(short)) == len(set(names)):
        return short
    alike = [name for name, cut in zip(names, short, strict=True) if short.count(cut) > 1]
    common = len(os.path.commonprefix(alike))
    return [
        _shorten(name, room) if name not in alike else "…" + _shorten(name[common:], room - 1, from_end=True)
        for name in names
    ]


def _wrap(text: str, room: int, most: int) -> list[str]:
    """Lines of up to ``room`` characters, broken behind blanks, underscores, hyphens and slashes where possible."""
    lines = [""]
    for part in re.split(r"(?<=[\s_/-])", text):
        for piece in (part[k : k + room] for k in range(0, len(part), room)):
            if len(lines[-1]) + len(piece.rstrip()) <= room:
                lines[-1] += piece
            else:
                lines.append(piece)
    if len(lines) > most:  # as in _shorten: keep both ends
        head = most // 2
        lines = [*lines[:head], "…" + "".join(lines[head - most :])[-(room * (most - head) - 1) :]]
        return [*lines[:head], *(lines[head][k : k + room] for k in range(0, len(lines[head]), room))][:most]
    return [line.strip() for line in lines]
