"""The curves of runs and the accuracies of evaluations, from the files that the scripts write."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pictures.canvas import NEUTRAL, SERIES, make_figure, shorten, wrap
from utils import InputError, mean_confidence_interval, printable, read_json

# What has to be the same in two evaluations for episode k of one to be episode k of the other.
SAME_EPISODES = ("dataset", "set", "way", "shot", "query", "seed", "verify_images")


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """What tells paths apart: without the folders that all of them begin or end with."""
    rows = [path.parts for path in paths]
    while len({row[0] for row in rows}) == 1 and min(map(len, rows)) > 1:
        rows = [row[1:] for row in rows]
    while len({row[-1] for row in rows}) == 1 and min(map(len, rows)) > 1:
        rows = [row[:-1] for row in rows]
    return [str(Path(*row)) for row in rows]


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
    """The curves of a run folder or a ``trlog.json``; InputError where it has none, or is missing or no such file."""
    file = path / "trlog.json" if path.is_dir() else path

    def parse(content: dict[str, Any]) -> Curves:
        rows = content["epochs"]
        test = (float(content["test_acc"]), float(content["test_interval"])) if "test_acc" in content else None
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
    diamond = {"linestyle": "none", "marker": "D", "markersize": 5}
    bars = {"elinewidth": 1.0, "capsize": 3}
    handles = []
    for number, (name, run) in enumerate(zip(names, runs, strict=True)):
        color = SERIES[number % len(SERIES)]
        handles.append(Line2D([], [], color=color, linewidth=3, label=shorten(name, 60)))
        plots[0].plot(run.epochs, run.train_loss, color=color, **hollow)
        plots[0].plot(run.epochs, run.val_loss, color=color, **filled)
        plots[1].plot(run.epochs, run.train_acc, color=color, **hollow)
        plots[1].errorbar(run.epochs, run.val_acc, run.val_interval, color=color, **filled, **bars)
        if run.test:
            place = last + max(0.6, 0.06 * last) + number * max(0.15, 0.015 * last)
            plots[1].errorbar(place, *run.test, color=color, **diamond, **bars)
    for axes, what in zip(plots, ("loss", "accuracy (%)"), strict=True):
        axes.set(xlabel="epoch", ylabel=what)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=handles, loc="outside upper left", fontsize=9, frameon=False)
    kinds = {"training": hollow, "validation, with 95 % interval": filled, "final test": diamond}
    key = [Line2D([], [], color=NEUTRAL, label=kind, **style) for kind, style in kinds.items()]
    figure.legend(handles=key, loc="outside lower center", fontsize=9, frameon=False, ncols=3)
    return figure


class Results(NamedTuple):
    """What ``results.json`` says of an evaluation."""

    accuracies: list[float]  # of the episodes, in percent
    flags: dict[str, Any]
    data: Any = None  # fingerprint of the images


class Compared(NamedTuple):
    """An evaluation beside the first one."""

    name: str
    accuracies: list[float]
    differences: list[float] = []  # from the first, episode by episode
    reason: str = ""  # why there are none


def read_results(file: Path) -> Results:
    """The results of an evaluation; InputError for a missing file, or one that eval.py or train_meta.py did not write."""

    def parse(content: dict[str, Any]) -> Results:
        accuracies = [float(value) for value in content["accuracies"]]
        if not accuracies or not all(map(math.isfinite, accuracies)):
            raise ValueError("it has no accuracies, or some that are not finite")
        flags = dict(content["flags"])
        if "pretrain_dir" in flags:  # the final test of train_meta.py is on the test split, whatever -set validated on
            flags["set"] = "test"
        return Results(accuracies, flags, content.get("data"))

    return read_json(file, "the results of an evaluation", parse)


def why_not_paired(base: Results, other: Results) -> str:
    """What keeps episode k of one evaluation from being episode k of the other; empty where nothing does."""
    data = [one.data if isinstance(one.data, dict) else {} for one in (base, other)]
    listed = [one.get("episodes") for one in data]
    # Where the images have another form, as their nodes, they are compared by their names.
    key = "order" if all("order" in one for one in data) else "sha256"
    differ = all(data) and data[0].get(key, data[0]) != data[1].get(key, data[1])
    if all(listed) and not differ:
        return "" if listed[0] == listed[1] else "other episodes"
    if any(one.flags.get("episodes_in") for one in (base, other)):
        return "other images" if all(listed) else "the episodes of one are those of a file"
    for name in SAME_EPISODES:
        wanted, found = base.flags.get(name), other.flags.get(name)
        if wanted != found:
            return f"-{name} {found}, not {wanted}"
    return "other images" if differ else ""


def compare(names: Sequence[str], results: Sequence[Results]) -> list[Compared]:
    """Evaluations beside the first of them, paired where they used the same episodes."""
    compared = [Compared(printable(names[0]), results[0].accuracies)]
    for name, one in zip(names[1:], results[1:], strict=True):
        reason = why_not_paired(results[0], one)
        # The longer evaluation has more episodes after the same ones.
        pairs = [] if reason else zip(one.accuracies, results[0].accuracies, strict=False)
        differences = [accuracy - base for accuracy, base in pairs]
        compared.append(Compared(printable(name), one.accuracies, differences, reason and f"not paired: {reason}"))
    return compared


def table(evaluations: Sequence[Compared]) -> list[str]:
    """A line per evaluation: its name, episodes, accuracy with interval, and the paired difference or why there is none."""
    width = max(len("evaluation"), *(len(one.name) for one in evaluations))
    minus = f"minus {evaluations[0].name}" if len(evaluations) > 1 else ""
    lines = [f"{'evaluation':{width}}  episodes  accuracy (%)    {minus}"]
    for name, accuracies, differences, remark in evaluations:
        if differences:
            mean, interval = mean_confidence_interval(differences)
            remark = f"{mean:+.2f} +- {interval:.2f}  ({len(differences)} episodes, paired)"
        mean, interval = mean_confidence_interval(accuracies)
        lines.append(f"{name:{width}}  {len(accuracies):8}  {f'{mean:.2f} +- {interval:.2f}':14}  {remark}")
    return [line.rstrip() for line in lines]


def draw_comparison(evaluations: Sequence[Compared]) -> Figure:
    """The distributions of the accuracies of episodes, with means and paired differences from the first evaluation."""
    figure = make_figure(8.2, 1.5 + 0.5 * len(evaluations))
    axes = figure.subplots()
    for row, one in enumerate(evaluations):
        color = SERIES[row % len(SERIES)]
        mean, interval = mean_confidence_interval(one.accuracies)
        lowest, low, high, highest = np.quantile(one.accuracies, (0.05, 0.25, 0.75, 0.95))
        axes.hlines(row, lowest, highest, color=color, linewidth=1, alpha=0.6)
        axes.barh(row, high - low, left=low, height=0.5, color=color, alpha=0.35)
        axes.errorbar(mean, row, xerr=interval, color=color, marker="D", markersize=5, capsize=3, linewidth=1.8)
        text = f"{mean:.2f} ± {interval:.2f}"
        if one.differences:
            difference, interval = mean_confidence_interval(one.differences)
            text += f"\n({difference:+.2f} ± {interval:.2f})"
        place = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
        axes.annotate(text, (1.01, row), fontsize=9, color=color, **place)
    axes.set_yticks(range(len(evaluations)), [wrap(shorten(one.name, 56), 28) for one in evaluations])
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="accuracy of an episode (%)", ylim=(len(evaluations) - 0.4, -0.6))
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    key = "line: from 5 % to 95 % of the episodes; bar: the middle half; mark: mean with its 95 % interval"
    key += "\nin brackets: difference from the first evaluation, on the same episodes"
    figure.supxlabel(key, x=0.01, ha="left", fontsize=9)
    return figure


MOST_NAMED = 80  # classes of a confusion matrix whose names can be read


class Confusion(NamedTuple):
    """Which classes were taken for which."""

    classes: list[str]
    counts: np.ndarray  # (true class, predicted class): queries

    @property
    def shares(self) -> np.ndarray:
        """The counts in percent of the queries of the true class; NaN for a class that had none."""
        totals = self.counts.sum(1, keepdims=True)
        return np.where(totals > 0, 100 * self.counts / np.maximum(totals, 1), np.nan)


def read_confusion(file: Path) -> Confusion:
    """The confusion matrix of an evaluation; InputError where there is none."""

    def parse(content: dict[str, Any]) -> Confusion:
        if "accuracies" in content and "confusion" not in content:
            reason = "an earlier version wrote it, or the data has too many classes"
            raise InputError(f"{file} has no confusion matrix: {reason}. Evaluate again, or read its class_accuracy")
        classes, counts = content["confusion"]["classes"], np.array(content["confusion"]["counts"])
        fits = counts.dtype.kind == "i" and counts.shape == (len(classes), len(classes)) and counts.min() >= 0
        if not (fits and counts.any() and all(isinstance(name, str) for name in classes)):
            raise ValueError("its matrix has other sizes than its classes, or no counts")
        return Confusion(classes, counts)

    return read_json(file, "the results of an evaluation", parse)


def worst_pairs(confusion: Confusion, most: int = 10) -> list[str]:
    """A line for each of the classes that are most often taken for another, and for which."""
    shares = np.nan_to_num(confusion.shares)
    np.fill_diagonal(shares, 0)
    names = [shorten(name, 40) for name in confusion.classes]
    order = np.argsort(-shares, axis=None, kind="stable")[:most]
    pairs = [(true, found) for true, found in zip(*np.unravel_index(order, shares.shape), strict=True)]
    pairs = [pair for pair in pairs if shares[pair] > 0]
    if not pairs:
        return ["no class was taken for another"]
    width = max(len("class"), *(len(names[true]) for true, _ in pairs))
    second = max(len("taken for"), *(len(names[found]) for _, found in pairs))
    lines = [f"{'class':{width}}  {'taken for':{second}}    share"]
    for true, found in pairs:
        count = f"{confusion.counts[true, found]} of {confusion.counts[true].sum()}"
        lines.append(f"{names[true]:{width}}  {names[found]:{second}}  {shares[true, found]:5.1f} %  ({count})")
    return lines


def draw_confusion(confusion: Confusion) -> Figure:
    """True classes in rows, predicted ones in columns; colours are shares of a row, and of few classes numbers as well.

    Of more than 80 classes, only some are named.
    """
    count = len(confusion.classes)
    cell = 0.55 if count <= 12 else 0.3 if count <= 32 else 0.2 if count <= MOST_NAMED else 16 / count
    figure = make_figure(cell * count + 3.2, cell * count + 2.4)
    axes = figure.subplots()
    shares = confusion.shares
    # By the root of the share, which shows what is rare.
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    size, named = 9 if count <= 32 else 7, range(0, count, -(-count // MOST_NAMED))
    names = [shorten(confusion.classes[number], 24) for number in named]
    axes.set_xticks(named, names, rotation=90, fontsize=size)
    axes.set_yticks(named, names, fontsize=size)
    axes.tick_params(length=0)
    if count <= 32:
        for true, found in zip(*np.nonzero(np.nan_to_num(shares) >= 0.5), strict=True):
            color = "white" if shares[true, found] > 30 else "black"
            text = f"{shares[true, found]:.0f}"
            axes.text(found, true, text, ha="center", va="center", fontsize=9 if count <= 12 else 7, color=color)
    right = 100 * np.trace(confusion.counts) / confusion.counts.sum()
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(f"{right:.2f} % of {confusion.counts.sum()} queries right", fontsize=10, loc="left")
    bar = figure.colorbar(picture, ax=axes, shrink=min(1.0, 3 / (cell * count)), label="% of the true class")
    bar.outline.set_visible(False)
    axes.spines[:].set_color(NEUTRAL)
    return figure
