"""Curves and comparisons, read from the files that the scripts write."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import ODD_NAMES, write_evaluation, write_run
from matplotlib.text import Text

from engine.run import RunFolder
from pictures import plots
from pictures.canvas import to_pixels
from utils import InputError, write_json


def test_curves_are_those_of_the_file(tmp_path):
    run = plots.read_curves(write_run(tmp_path / "a", 3, test_acc=30.0, test_interval=1.0))
    assert run == plots.read_curves(tmp_path / "a/trlog.json")
    assert run.epochs == [1, 2, 3]
    assert run.val_acc == [21, 22, 23]
    assert run.test == (30, 1)
    figure = plots.draw_curves(["mine"], [run])
    drawn = [line.get_ydata().tolist() for axes in figure.axes for line in axes.lines]
    assert drawn[:4] == [[2, 1, 2 / 3], [1, 0.5, 1 / 3], [10, 20, 30], [21, 22, 23]]


def test_curves_of_a_resumed_run_have_each_epoch_once(tmp_path):
    values = {"train_loss": 1.0, "train_acc": 5.0, "val_loss": 1.0, "val_acc": 3.0, "val_interval": 0.5}
    run = RunFolder(tmp_path / "run", {})
    run.record(epoch=1, **values)
    run.save_state({"progress": {"epoch": 1}})
    run.record(epoch=2, **values)
    run.writer.close()
    resumed = RunFolder(tmp_path / "run", {}, resume=True)
    resumed.record(epoch=2, **values)
    resumed.finish(test_acc=4.0, test_interval=0.25)
    found = plots.read_curves(tmp_path / "run")
    assert found.epochs == [1, 2]
    assert found.test == (4, 0.25)


def test_evaluations_of_the_same_episodes_are_paired(tmp_path):
    random = np.random.RandomState(0)
    first, second = 4 * random.randint(5, 20, 50), 4 * random.randint(5, 20, 40)
    same = {"classes": 5}
    files = {
        "base": write_evaluation(tmp_path / "1", first, data=same),
        "short": write_evaluation(tmp_path / "2", second),
        "seed": write_evaluation(tmp_path / "3", second, seed=2),
        "final": write_evaluation(tmp_path / "4", first, set="val", pretrain_dir="x", data=same),
        "other": write_evaluation(tmp_path / "5", second, data={"classes": 6}),
        "shot": write_evaluation(tmp_path / "6", second, shot=5, seed=3),
    }
    results = list(map(plots.read_results, files.values()))
    header, *rows = plots.table(plots.compare(list(files), results))
    assert header.split() == ["evaluation", "episodes", "accuracy", "(%)", "minus", "base"]
    rows = dict(zip(files, rows, strict=True))
    values = second - first[:40]
    interval = 1.96 * values.std() / 40**0.5
    assert rows["short"].endswith(f"{values.mean():+.2f} +- {interval:.2f}  (40 episodes, paired)")
    assert f"{second.mean():.2f} +- {1.96 * second.std() / 40**0.5:.2f}" in rows["short"]
    assert rows["seed"].endswith("not paired: -seed 2, not 1")
    assert rows["final"].endswith("+0.00 +- 0.00  (50 episodes, paired)")
    assert rows["other"].endswith("not paired: other images")
    assert rows["shot"].endswith("not paired: -shot 5, not 1")
    assert len({re.search(r" \d\d\.\d\d \+-", row).start() for row in rows.values()}) == 1  # columns


def test_evaluations_are_paired_by_their_images_and_episodes():
    """Nodes of images have another hash than the images, and the same order; episodes of a file have a hash."""

    def reason(one, other, **flags):
        results = plots.Results([1.0], {"seed": 1}, one)
        return plots.why_not_paired(results, plots.Results([1.0], {"seed": 1} | flags, other))

    images, nodes = {"sha256": "a", "order": "x"}, {"sha256": "b", "order": "x"}
    assert reason(images, nodes) == ""
    assert reason(images, nodes | {"order": "y"}) == "other images"
    assert reason(images, {"sha256": "b"}) == "other images"
    assert reason({"sha256": "a"}, images) == ""
    assert reason(images, nodes, seed=2) == "-seed 2, not 1"
    listed = images | {"episodes": "e"}
    assert reason(listed, nodes | {"episodes": "e"}, seed=2, episodes_in="file") == ""
    assert reason(listed, nodes | {"episodes": "f"}, episodes_in="file") == "other episodes"
    assert reason(images, listed, episodes_in="file") == "the episodes of one are those of a file"
    assert reason(images, listed) == ""  # drawn, and written to a file


def write_confusion(path, classes, counts):
    write_json(path, {"accuracies": [1.0], "flags": {}, "confusion": {"classes": classes, "counts": counts}})
    return path


def test_confusion_is_by_true_class(tmp_path):
    counts = [[8, 2, 0], [0, 0, 0], [1, 3, 0]]
    confusion = plots.read_confusion(write_confusion(tmp_path / "r.json", ["ant", "bee", "a\nb"], counts))
    assert np.array_equal(confusion.shares, [[80, 20, 0], [np.nan] * 3, [25, 75, 0]], equal_nan=True)
    assert [line.split() for line in plots.worst_pairs(confusion)] == [
        ["class", "taken", "for", "share"],
        ["a?b", "bee", "75.0", "%", "(3", "of", "4)"],
        ["a?b", "ant", "25.0", "%", "(1", "of", "4)"],
        ["ant", "bee", "20.0", "%", "(2", "of", "10)"],
    ]
    assert len(plots.worst_pairs(confusion, most=1)) == 2
    figure = plots.draw_confusion(confusion)
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert {"80", "20", "25", "75", "57.14 % of 14 queries right", "true class", "predicted class"} <= {*texts}
    right = plots.Confusion(["a", "b"], np.eye(2, dtype=int))
    assert plots.worst_pairs(right) == ["no class was taken for another"]


@pytest.mark.parametrize("count", [1, 64, 200])
def test_confusion_of_any_number_of_classes_can_be_read(count):
    counts = np.ones((count, count), dtype=int)
    names = [f"{name}{k}" for k, name in enumerate((ODD_NAMES * 30)[:count])]
    figure = plots.draw_confusion(plots.Confusion(names, counts))
    pixels = to_pixels(figure)
    assert 200 < min(pixels.shape[:2]) <= max(pixels.shape[:2]) < 3500
    for labels in (figure.axes[0].get_xticklabels(), figure.axes[0].get_yticklabels()):
        boxes = [label.get_window_extent() for label in labels]
        assert len(boxes) == (count if count < 100 else 67)
        assert not any(one.overlaps(other) for one, other in zip(boxes, boxes[1:], strict=False))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"accuracies": [1.0]}, "has no confusion matrix: an earlier version wrote it"),
        ({"confusion": {"classes": ["a"], "counts": [[1, 2]]}}, "is damaged"),
        ({"confusion": {"classes": ["a"], "counts": [[0.5]]}}, "is damaged"),
        ({"confusion": {"classes": ["a"], "counts": [[0]]}}, "is damaged"),
        ({"confusion": {"classes": [7], "counts": [[1]]}}, "is damaged"),
        ({"confusion": 3}, "is damaged"),
    ],
)
def test_results_without_a_matrix_are_named(tmp_path, content, sentence):
    write_json(tmp_path / "r.json", content)
    with pytest.raises(InputError, match=rf"r\.json {sentence}"):
        plots.read_confusion(tmp_path / "r.json")


def test_a_comparison_of_any_names_has_a_line_each(capfd, recwarn):
    results = [plots.Results([20.0, 40.0, 60.0], {}), *[plots.Results([20.0, 20.0, 20.0], {})] * (len(ODD_NAMES) - 1)]
    evaluations = plots.compare(ODD_NAMES, results)
    assert len("\n".join(plots.table(evaluations)).splitlines()) == len(ODD_NAMES) + 1
    figure = plots.draw_comparison(evaluations)
    assert to_pixels(figure).std() > 0
    assert any(text.get_text() == "caf?" for text in figure.findobj(Text))
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert "40.00 ± 18.48" in texts
    assert "20.00 ± 0.00\n(-20.00 ± 18.48)" in texts
    curves = plots.Curves([1.0], *[[float("nan")]] * 5)
    assert to_pixels(plots.draw_curves(ODD_NAMES, [curves] * len(ODD_NAMES))).std() > 0
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_names_that_tell_paths_apart():
    def names(*paths):
        return plots.distinct_names([Path(path) for path in paths])

    assert names("runs/a/results.json", "runs/b/results.json") == ["a", "b"]
    assert names("a/x", "a/x/y") == ["x", "x/y"]
    assert names("a/x.json", "a/x.json") == ["x.json", "x.json"]
    assert names("a/x.json") == ["x.json"]


@pytest.mark.parametrize(
    "content", ["[1]", "{", '{"accuracies": [], "flags": {}}', '{"accuracies": [1e999], "flags": {}}']
)
def test_files_of_something_else_are_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    for read in (plots.read_curves, plots.read_results):
        with pytest.raises(InputError, match=r"x\.json"):
            read(tmp_path / "x.json")
    write_run(tmp_path, 0)
    with pytest.raises(InputError, match="no epoch of the run is finished"):
        plots.read_curves(tmp_path)
