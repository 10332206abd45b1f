"""The curves of runs and the accuracies of evaluations, from the files that the scripts write."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pictures.canvas import NEUTRAL, SERIES, display_names, make_figure, shorten, wrap
from utils import InputError, mean_confidence_interval, printable, read_json

# What has to be the same in two evaluations for episode k of one to be episode k of the other.
SAME_EPISODES = ("dataset", "set", "way", "shot", "query", "seed", "verify_images")


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """What tells paths apart: without the folders that all of them begin or end with."""
    rows = [list(path.parts) for path in paths]
    if len(rows) > 1:
        for end in (0, -1):
            while all(len(row) > 1 for row in rows) and len({row[end] for row in rows}) == 1:
                for row in rows:
                    row.pop(end)
    names = [str(Path(*row)) for row in rows]
    return [name if names.count(name) == 1 else f"{name} ({k + 1})" for k, name in enumerate(names)]


# --- Curves of runs ---------------------------------------------------------------------------------------------------


class Curves(NamedTuple):
    """The curves of a run; an entry per epoch, NaN where there is none."""

    epochs: list[float]
    train_loss: list[float]
    train_acc: list[float]
    val_loss: list[float]
    val_acc: list[float]
    val_interval: list[float]
    test: tuple[float, float] | None = None  # accuracy of the final test and the half width of its interval


def read_curves(path: Path) -> Curves:
    """The curves of a run folder, or of a ``trlog.json``.

    Raises:
        InputError: the file is missing, is not one that a training script writes, or no epoch is finished.
    """
    file = path / "trlog.json" if path.is_dir() else path

    def parse(content: dict[str, Any]) -> Curves:
        rows, test = content["epochs"], None
        if "test_acc" in content:
            test = float(content["test_acc"]), float(content["test_interval"])
        columns = ([float(row.get(key, "nan")) for row in rows] for key in Curves._fields[1:-1])
        return Curves([float(row["epoch"]) for row in rows], *columns, test=test)

    curves = read_json(file, "the curves of a run", parse)
    if not curves.epochs:
        raise InputError(f"{file} has no curves yet: no epoch of the run is finished")
    return curves


def draw_curves(names: Sequence[str], runs: Sequence[Curves]) -> Figure:
    """Loss and accuracy of runs over their epochs: training dashed, validation solid with its 95 % interval."""
    figure = make_figure(9.5, 3.9 + 0.22 * len(runs))
    plots = figure.subplots(1, 2)
    last = max(max(run.epochs) for run in runs)
    hollow = {"linestyle": "dashed", "linewidth": 1.1, "marker": "o", "markersize": 4, "markerfacecolor": "white"}
    filled = {"linewidth": 1.6, "marker": "o", "markersize": 4}
    diamond = {"marker": "D", "markersize": 5, "capsize": 3, "linewidth": 1.6}
    for number, run in enumerate(runs):
        color = SERIES[number % len(SERIES)]
        for axes, train, val in zip(plots, (run.train_loss, run.train_acc), (run.val_loss, run.val_acc), strict=True):
            axes.plot(run.epochs, train, color=color, **hollow)
            axes.plot(run.epochs, val, color=color, **filled)
        low, high = (np.add(run.val_acc, sign * np.asarray(run.val_interval)) for sign in (-1, 1))
        if len(run.epochs) > 1:
            plots[1].fill_between(run.epochs, low, high, color=color, alpha=0.15, linewidth=0)
        else:
            plots[1].errorbar(run.epochs, run.val_acc, run.val_interval, color=color, capsize=3)
        if run.test:
            place = last + max(0.6, 0.06 * last) + number * max(0.15, 0.015 * last)
            plots[1].errorbar(place, *run.test, color=color, **diamond)
    for axes, what in zip(plots, ("loss", "accuracy (%)"), strict=True):
        axes.set(xlabel="epoch", ylabel=what)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    names = display_names(names, 60)
    lines = [Line2D([], [], color=SERIES[k % len(SERIES)], linewidth=3, label=name) for k, name in enumerate(names)]
    kinds = [
        Line2D([], [], color=NEUTRAL, label="training", **hollow),
        Line2D([], [], color=NEUTRAL, label="validation, with 95 % interval", **filled),
    ]
    if any(run.test for run in runs):
        kinds.append(Line2D([], [], color=NEUTRAL, marker="D", linestyle="none", markersize=5, label="final test"))
    figure.legend(handles=lines, loc="outside upper left", fontsize=9, frameon=False, ncols=1)
    figure.legend(handles=kinds, loc="outside lower center", fontsize=9, frameon=False, ncols=3)
    return figure


# --- Evaluations side by side -----------------------------------------------------------------------------------------


class Results(NamedTuple):
    """What ``results.json`` says of an evaluation."""

    accuracies: list[float]  # of the episodes, in percent
    flags: dict[str, Any]
    data: Any = None  # fingerprint of the images


class Sample(NamedTuple):
    """Values of episodes, with their mean and the half width of its 95 % interval."""

    values: list[float]
    mean: float
    interval: float


class Compared(NamedTuple):
    """An evaluation beside the first one."""

    name: str
    accuracies: Sample
    difference: Sample | None = None  # from the first, episode by episode
    reason: str = ""  # why there is no difference


def read_results(file: Path) -> Results:
    """The results of an evaluation.

    Raises:
        InputError: the file is missing, or is not one that eval.py or train_meta.py writes.
    """

    def parse(content: dict[str, Any]) -> Results:
        accuracies = [float(value) for value in content["accuracies"]]
        if not accuracies or not all(map(math.isfinite, accuracies)):
            raise ValueError("it has no accuracies, or some that are not finite")
        return Results(accuracies, dict(content["flags"]), content.get("data"))

    return read_json(file, "the results of an evaluation", parse)


def why_not_paired(base: Results, other: Results) -> str:
    """What keeps episode k of one evaluation from being episode k of the other; empty where nothing does."""
    for name in SAME_EPISODES:
        # The final test of train_meta.py is on the test split, whatever -set validated on.
        wanted, found = (
            "test" if name == "set" and "pretrain_dir" in one.flags else one.flags.get(name) for one in (base, other)
        )
        if wanted != found:
            return f"-{name} {found}, not {wanted}"
    return "other images" if base.data and other.data and base.data != other.data else ""


def compare(names: Sequence[str], results: Sequence[Results]) -> list[Compared]:
    """Evaluations beside the first of them, paired where they used the same episodes."""

    def sample(values: list[float]) -> Sample:
        return Sample(values, *mean_confidence_interval(values))

    compared = []
    for name, one in zip(map(printable, names), results, strict=True):
        accuracies = sample(one.accuracies)
        if not compared:
            compared.append(Compared(name, accuracies))
        elif reason := why_not_paired(results[0], one):
            compared.append(Compared(name, accuracies, reason=f"not paired: {reason}"))
        else:  # the longer evaluation has more episodes after the same ones
            pairs = zip(one.accuracies, results[0].accuracies, strict=False)
            compared.append(Compared(name, accuracies, sample([mine - base for mine, base in pairs])))
    return compared


def table(evaluations: Sequence[Compared]) -> list[str]:
    """A line per evaluation: its name, episodes, accuracy with interval, and the paired difference or why there is none."""
    width = max(len("evaluation"), *(len(one.name) for one in evaluations))
    minus = f"minus {evaluations[0].name}" if len(evaluations) > 1 else ""
    lines = [f"{'evaluation':{width}}  episodes  accuracy (%)    {minus}"]
    for name, (values, mean, interval), difference, remark in evaluations:
        if difference:
            paired = f"({len(difference.values)} episodes, paired)"
            remark = f"{difference.mean:+.2f} +- {difference.interval:.2f}  {paired}"
        lines.append(f"{name:{width}}  {len(values):8}  {f'{mean:.2f} +- {interval:.2f}':14}  {remark}")
    return [line.rstrip() for line in lines]


def draw_comparison(evaluations: Sequence[Compared]) -> Figure:
    """Distributions of the accuracies of episodes, and of the paired differences from the first evaluation."""
    names = display_names([one.name for one in evaluations], 56)
    rows = [(name, SERIES[k % len(SERIES)]) for k, name in enumerate(names)]
    upper = [(*row, one.accuracies) for row, one in zip(rows, evaluations, strict=True)]
    lower = [(*row, one.difference) for row, one in zip(rows, evaluations, strict=True) if one.difference]
    heights = [0.62 * len(part) + 0.5 for part in (upper, lower) if part]
    figure = make_figure(8.2, 1.3 + sum(heights))
    plots = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_distributions(plots[0], upper)
    title = "bars: how many episodes; mark: mean with its 95 % interval"
    plots[0].set_title(title, fontsize=9, loc="left", color="#222222")
    plots[0].set_xlabel("accuracy of an episode (%)")
    if lower:
        _draw_distributions(plots[1], lower, sign="+")
        plots[1].axvline(0, color="#000000", linewidth=1)
        plots[1].set_xlabel(f"accuracy minus that of {shorten(names[0], 40)}, on the same episodes (points)")
    return figure


def _draw_distributions(axes: Axes, rows: Sequence[tuple[str, str, Sample]], sign: str = "") -> None:
    """A row each of name, colour and values."""
    edges = _bin_edges(np.concatenate([sample.values for *_, sample in rows]))
    centres, width = (edges[:-1] + edges[1:]) / 2, 0.92 * np.diff(edges)
    mark = {"marker": "D", "markersize": 5, "capsize": 3, "linewidth": 1.8}
    for number, (_, color, (values, mean, interval)) in enumerate(rows):
        counts = np.histogram(values, edges)[0]
        axes.bar(centres, 0.62 * counts / max(1, counts.max()), width, bottom=-number, color=color, alpha=0.35)
        axes.errorbar(mean, -number - 0.11, xerr=interval, color=color, **mark)
        place = {"xy": (1.01, 0.12 - number), "xycoords": ("axes fraction", "data"), "annotation_clip": False}
        axes.annotate(f"{mean:{sign}.2f} ± {interval:.2f}", fontsize=9, color=color, va="center", **place)
    axes.set_yticks([0.12 - number for number in range(len(rows))], [wrap(name, 28) for name, *_ in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(0.68 - len(rows), 0.75)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _bin_edges(values: np.ndarray) -> np.ndarray:
    """As many bins as an episode has possible accuracies, where those are few: otherwise the bars show the rounding."""
    distinct = np.unique(values.round(6))
    if len(distinct) == 1:
        return distinct[0] + np.array([-0.5, 0.5])
    smallest = float(np.diff(distinct).min())
    step = smallest * max(1, math.ceil((distinct[-1] - distinct[0]) / 30 / smallest - 1e-6))
    return np.arange(distinct[0] - step / 2, distinct[-1] + step, step)
