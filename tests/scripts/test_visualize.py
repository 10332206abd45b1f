"""Pictures: that they are there, that they show what was computed, and that what they say is right."""

import contextlib
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_images
from PIL import Image

import visualize
from dataloader.arguments import draw_episodes, open_dataset
from dataloader.views import make_view
from engine.run import RunFolder
from pictures import drawing, matches
from utils import run_script, write_json

SMALL = ["-gpu", "cpu", "-image_size", "32", "-query", "2", "-num_workers", "0", "-way", "3", "-model_dir", "none"]


class Done:
    """What a script did: its exit status, what it printed, and the arguments of each figure that it drew."""

    def __init__(self, script, flags, cwd, monkeypatch=None):
        out, err = io.StringIO(), io.StringIO()
        self.status, self.matches, self.sheets, self.figures = 0, [], [], []
        before = Path.cwd()
        os.chdir(cwd)
        if monkeypatch:
            for place, name, seen in ((matches, "draw_match", self.matches), (drawing, "draw_episode", self.sheets)):
                monkeypatch.setattr(place, name, self.spy(getattr(place, name), seen))
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                run_script(lambda: script.main([str(flag) for flag in flags]))
        except SystemExit as end:
            self.status = end.code
        finally:
            os.chdir(before)
            if monkeypatch:
                monkeypatch.undo()
        self.out, self.err = out.getvalue(), err.getvalue()

    def spy(self, real, seen):
        def draw(*given, **named):
            figure = real(*given, **named)
            seen.append((given, named, texts(figure)))
            return figure

        return draw


def texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def pictures(folder: Path) -> set[str]:
    """The names of the files in a folder, all of which can be read."""
    for path in folder.iterdir():
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
                assert min(image.size) > 100
        else:
            assert path.read_bytes().startswith(b"%PDF")
            assert path.read_bytes().rstrip().endswith(b"%%EOF")
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def data(glyphs) -> list[object]:
    return ["-dataset", "glyphs", "-data_dir", glyphs]


@pytest.mark.parametrize(
    ("variant", "nodes"),
    [
        (["-shot", "1"], 4),
        (["-feature_pyramid", "2,1", "-shot", "2", "-sfc_update_step", "2"], 9),
        (["-image_size", "16", "-deepemd", "grid", "-patch_list", "1,2", "-format", "pdf"], 5),
        (["-image_size", "16", "-deepemd", "sampling", "-num_patch", "3", "-shot", "2", "-sfc_update_step", "2"], 3),
    ],
)
def test_an_episode_is_the_one_that_eval_evaluates(data, tmp_path, monkeypatch, variant, nodes):
    import eval as eval_script

    flags = [*data, *SMALL, *variant, "-seed", 5]
    suffix = "pdf" if "pdf" in variant else "png"
    done = Done(
        visualize,
        ["episode", *flags, "-episode", 2, "-queries", "1,5", "-top", 3, "-out", "new/here"],
        tmp_path,
        monkeypatch,
    )
    assert done.status == 0, done.err
    names = {f"episode-2.{suffix}", f"episode-2-query-1.{suffix}", f"episode-2-query-5.{suffix}"}
    assert pictures(tmp_path / "new/here") == names
    flags = [flag for flag in flags if flag not in ("-format", "pdf")]
    assert Done(eval_script, [*flags, "-test_episode", 3, "-json", "found.json"], tmp_path).status == 0
    accuracy = json.loads((tmp_path / "found.json").read_text())["accuracies"][2]
    assert re.search(r"\((\S+) %\)", done.out)[1] == f"{accuracy:.2f}"

    # The sheet has all logits, class by class; their argmax gives that accuracy.
    ((images, sheet, words),) = done.sheets
    args = visualize.build_parser().parse_args(["episode", *map(str, flags)])
    dataset = open_dataset(args, "test", train=False)
    items = draw_episodes(args, dataset, 3, seed=5, name="test")[2]
    assert sheet["names"] == [dataset.class_names[dataset.labels[index]] for index, _ in items[:3]]
    if args.deepemd == "fcn":  # otherwise the sheet shows whole images
        for number, shots in enumerate(images[0]):
            wanted = [dataset[item][0].permute(1, 2, 0).numpy() for item in items[number : 3 * args.shot : 3]]
            assert np.array_equal(np.stack(shots), np.stack(wanted))
    assert sheet["numbers"] == [0, 3, 1, 4, 2, 5]
    hits = [found == truth for found, truth in zip(sheet["logits"].argmax(1).tolist(), sheet["truths"], strict=True)]
    assert sum(hits) == round(6 * accuracy / 100)
    assert {f"{value:.2f}" for value in sheet["logits"].flatten().tolist()} <= set(words)
    assert words.count("right") == sum(hits)

    for (query, protos), match, words in done.matches:
        number = int(re.search(r"query (\d)", match["title"])[1])
        assert match["truth"] == number % 3
        row = sheet["numbers"].index(number)
        torch.testing.assert_close(match["logits"], sheet["logits"][row])
        assert match["flow"].shape == (3, nodes, nodes)
        # The share of the mass, computed another way.
        for flow in match["flow"].double():
            shares = (flow / flow.sum()).flatten().sort(descending=True).values
            count = int((shares > 1e-6).sum())
            share = f"top 3 of {count} flows: {100 * shares[:3].sum():.0f} % of the mass"
            assert (share if count > 3 else f"all {count} flows: 100 % of the mass") in words
        for panels in (query, *protos):
            assert sorted(k for panel in panels if not panel.is_overview for k in node_numbers(panel)) == list(
                range(nodes)
            )
        right = int(match["logits"].argmax()) == match["truth"]
        assert any(word.startswith("right: " if right else "wrong: ") for word in words)
        assert sum("nearest to its prototype" in word for word in words) == (3 if "-sfc_update_step" in variant else 0)


def node_numbers(panel):
    return range(panel.first, panel.first + len(panel.boxes))


def test_boxes_are_those_of_the_view(glyphs):
    for deepemd in ("grid", "sampling"):
        args = visualize.build_parser().parse_args(
            ["episode", "-dataset", "glyphs", "-data_dir", str(glyphs), "-deepemd", deepemd, "-image_size", "16"]
        )
        dataset = open_dataset(args, "test", train=False)
        (seen,) = matches.view_items(dataset, [(3, 77)])
        pixels, _ = dataset[3, 77]
        assert torch.equal(seen.pixels, pixels)
        boxes = dataset._boxes((seen.image.shape[1], seen.image.shape[0]), 77)
        overview, *mosaics = matches.panels_of(seen, dataset.view, len(boxes))
        assert overview.boxes == [tuple(map(float, box[:4])) for box in boxes]
        assert np.array_equal(overview.pixels, np.asarray(seen.image))
        shown = [
            panel.pixels[int(upper) : int(lower), int(left) : int(right)]
            for panel in mosaics
            for left, upper, right, lower in panel.boxes
        ]
        assert np.array_equal(np.stack(shown), np.moveaxis(pixels.numpy(), 1, -1))


def test_boxes_of_a_large_image_shrink_with_it():
    view = make_view("grid", train=False, image_size=16, patch_list=(2,), patch_ratio=1)
    seen = matches.view_image(Image.new("RGB", (960, 480)), view, 1)
    overview, _ = matches.panels_of(seen, view, 4)
    assert overview.pixels.shape == (240, 480, 3)
    assert overview.boxes[3] == (240, 120, 480, 240)
    assert overview.places[3] == (0.75, 0.75)


def test_cells_of_a_pyramid():
    coarse, fine = drawing.cell_panels(np.zeros((3, 84, 84), np.uint8), [1, 2])
    assert (coarse.first, coarse.boxes) == (0, [(0, 0, 84, 84)])
    assert (fine.first, fine.boxes[1], fine.boxes[2]) == (1, (42, 0, 84, 42), (0, 42, 42, 84))


def test_strongest_flows():
    found = drawing.strongest(np.array([[0.0, 3.0], [1.0, 4.0]]), 2)
    assert found.query == [1, 0]
    assert found.proto == [1, 1]
    assert found.shares == [0.5, 0.375]
    assert (found.share, found.count) == (0.875, 3)
    assert drawing.strongest(np.eye(2), 9).shares == [0.5, 0.5]


def test_queries_that_are_drawn_include_wrong_ones():
    logits = torch.eye(2).repeat(5, 1)
    assert matches.choose_queries(logits, 2) == [0, 1, 2, 3]
    logits[7], logits[9], logits[5] = (logits[row].flip(0) for row in (7, 9, 5))
    assert matches.choose_queries(logits, 2) == [0, 1, 5, 7]
    assert matches.choose_queries(torch.eye(2).flip(0), 2) == [0, 1]


def test_long_names_stay_apart():
    names = [f"{'x' * 40}_{kind}_{'y' * 40}" for kind in ("cat", "dog")] + ["short"]
    short = drawing.short_names(names, 30)
    assert len(set(short)) == 3
    assert max(map(len, short)) <= 30
    for room in (4, 11):
        lines = drawing._wrap("a_rather-long name/of something_and_more", room, 3)
        assert len(lines) <= 3
        assert max(map(len, lines)) <= room


def test_pair(tmp_path, monkeypatch):
    first, second = write_images(tmp_path, 2, size=40, suffix=".jpg")
    flags = ["pair", first, second, "-model_dir", "none", "-gpu", "cpu", "-image_size", 32, "-out", "out"]
    done = Done(visualize, flags, tmp_path, monkeypatch)
    assert done.status == 0, done.err
    assert pictures(tmp_path / "out") == {"pair-0000-0001.png"}
    logit, cost = map(float, re.search(r"logit (\S+), cost of the match (\S+)", done.out).groups())
    assert cost == pytest.approx(1 - logit / 12.5, abs=2e-4)
    ((_, match, words),) = done.matches
    assert match["logits"].item() == pytest.approx(logit, abs=1e-4)
    assert not any("predicted" in word for word in words)
    sampled = Done(visualize, [*flags, "-deepemd", "sampling"], tmp_path).out
    assert sampled != done.out
    assert Done(visualize, [*flags, "-deepemd", "sampling"], tmp_path).out == sampled


# --- Curves and comparisons -------------------------------------------------------------------------------------------


def write_run(folder: Path, epochs: int, **more) -> Path:
    rows = [
        {
            "epoch": k,
            "train_loss": 2 / k,
            "train_acc": 10 * k,
            "val_loss": 1 / k,
            "val_acc": 20 + k,
            "val_interval": 2.0,
        }
        for k in range(1, epochs + 1)
    ]
    write_json(folder / "trlog.json", {"args": {}, "epochs": rows, **more})
    return folder


def test_curves(tmp_path):
    runs = [write_run(tmp_path / "a", 3, test_acc=30.0, test_interval=1.0), write_run(tmp_path / "b/c", 1)]
    done = Done(visualize, ["curves", runs[0], runs[1] / "trlog.json", "-out", "out", "-format", "pdf"], tmp_path)
    assert done.status == 0, done.err
    assert pictures(tmp_path / "out") == {"curves.pdf"}
    run = visualize.read_run(runs[0], "mine")
    assert run.epochs == [1, 2, 3]
    assert run.val_acc == [21, 22, 23]
    assert run.test == (30, 1)
    figure = drawing.draw_curves([run])
    drawn = [line.get_ydata().tolist() for axes in figure.axes for line in axes.lines]
    assert drawn[:4] == [[2, 1, 2 / 3], [1, 0.5, 1 / 3], [10, 20, 30], [21, 22, 23]]


def test_curves_of_a_run_before_and_after_a_stop(tmp_path):
    """What RunFolder wrote is read, and a resumed run shows each epoch once."""
    values = {"train_loss": 1.0, "train_acc": 5.0, "val_loss": 1.0, "val_acc": 3.0, "val_interval": 0.5}
    run = RunFolder(tmp_path / "run", {})
    run.record(epoch=1, **values)
    run.save_state({})
    run.record(epoch=2, **values)
    run.writer.close()
    again = RunFolder(tmp_path / "run", {}, resume=True)
    again.record(epoch=2, **values)
    again.finish(test_acc=4.0, test_interval=0.25)
    found = visualize.read_run(tmp_path / "run", "run")
    assert found.epochs == [1, 2]
    assert found.test == (4, 0.25)


def write_evaluation(path: Path, accuracies, *, data=None, **flags) -> Path:
    flags = {
        "dataset": "glyphs",
        "set": "test",
        "way": 5,
        "shot": 1,
        "query": 5,
        "seed": 1,
        "verify_images": False,
        **flags,
    }
    write_json(path, {"accuracies": [float(value) for value in accuracies], "flags": flags, "data": data})
    return path


def test_compare(tmp_path):
    random = np.random.RandomState(0)
    first, second = 4 * random.randint(5, 20, 50), 4 * random.randint(5, 20, 40)
    same = {"classes": 5}
    files = [
        write_evaluation(tmp_path / "runs/first/results.json", first, data=same),
        write_evaluation(tmp_path / "runs/second/results.json", second),
        write_evaluation(tmp_path / "runs/seed/results.json", second, seed=2),
        write_evaluation(tmp_path / "runs/final/results.json", first, set="val", pretrain_dir="x", data=same),
        write_evaluation(tmp_path / "runs/other/results.json", second, data={"classes": 6}),
    ]
    done = Done(visualize, ["compare", *files, "-out", "out"], tmp_path)
    assert done.status == 0, done.err
    assert pictures(tmp_path / "out") == {"compare.png"}
    rows = {line.split()[0]: line for line in done.out.splitlines()}
    values = second - first[:40]
    expected = f"{values.mean():+.2f} +- {1.96 * values.std() / 40**0.5:.2f}  (40 episodes, paired)"
    assert rows["second"].endswith(expected)
    assert f"{second.mean():.2f} +- {1.96 * second.std() / 40**0.5:.2f}" in rows["second"]
    assert rows["seed"].endswith("not paired: -seed 2, not 1")
    assert "+0.00 +- 0.00  (50 episodes, paired)" in rows["final"]
    assert rows["other"].endswith("not paired: other images")
    assert "minus first" in rows["evaluation"]
    assert Done(visualize, ["compare", files[0], "-out", "out"], tmp_path).status == 0


def test_names_that_tell_paths_apart():
    def names(*paths):
        return visualize.distinct_names([Path(path) for path in paths])

    assert names("runs/a/results.json", "runs/b/results.json") == ["a", "b"]
    assert names("a/x", "a/x/y") == ["x", "x/y"]
    assert names("a/x.json", "a/x.json") == ["x.json (1)", "x.json (2)"]
    assert names("a/x.json") == ["a/x.json"]


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["episode", "-head", "proto"], "error: -head proto computes no flow"),
        (["episode", "-queries", "6"], "error: -queries: expected numbers from 0 to 5 (-way times -query); got 6"),
        (["episode", "-queries", "1,-2"], "expected whole numbers of 0 or more joined by commas"),
        (
            ["episode", "-episode", "5", "-test_episode", "5"],
            "error: -episode 5: expected a number below -test_episode 5",
        ),
        (["episode", "-model_dir", "nowhere"], "error: expected a checkpoint in nowhere"),
        (["episode", "-out", "file"], "error: cannot write file/episode-0.png"),
        (["episode", "-format", "gif"], "argument -format"),
        (["pair", "good.png", "bad.png"], "error: expected an image in bad.png"),
        (["pair", "good.png", "good.png", "-head", "knn"], "error: -head knn computes no flow"),
        (["curves", "nowhere"], "error: expected the curves of a run in nowhere; it cannot be read"),
        (["curves", "empty"], "error: expected the curves of a run in empty/trlog.json; no epoch of it is finished"),
        (["curves", "good.json"], "error: expected the curves of a run in good.json; it has another content"),
        (["curves", "list.json"], "error: expected the curves of a run in list.json; it has another content"),
        (["compare", "list.json"], "error: expected the results of an evaluation in list.json; it has another content"),
        (
            ["compare", "good.json", "bad.png"],
            "error: expected the results of an evaluation in bad.png; it is not JSON",
        ),
        (["compare", "none.json"], "error: expected the results of an evaluation in none.json; it has no accuracies"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_errors_are_one_line(data, tmp_path, flags, message):
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "file").write_text("")
    (tmp_path / "list.json").write_text("[1]")
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    write_evaluation(tmp_path / "good.json", [20, 40])
    write_evaluation(tmp_path / "none.json", [])
    write_run(tmp_path / "empty", 0)
    more = {"episode": [*data, *SMALL, *flags[1:]], "pair": ["-gpu", "cpu", "-image_size", 32, "-model_dir", "none"]}
    done = Done(visualize, [*flags, *more.get(flags[0], [])] if flags else [], tmp_path)
    assert done.status in (1, 2)
    lines = [line for line in done.err.splitlines() if not line.startswith(("device:", "weights:"))]
    assert len(lines) == 1
    assert message in lines[0]


# --- Pictures of a training run ---------------------------------------------------------------------------------------


def tensorboard_images(folder: Path) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tf"), size_guidance={"images": 0})
    events.Reload()
    return {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}


def test_log_images(data, tmp_path):
    import train_meta

    flags = [
        *data,
        *SMALL[:-2],
        "-image_size",
        "16",
        "-pretrain_dir",
        "none",
        "-val_frequency",
        1,
        "-val_episode",
        1,
        "-test_episode",
        1,
    ]
    done = Done(train_meta, [*flags, "-max_epoch", 1, "-log_images", 2], tmp_path)
    assert done.status == 0, done.err
    folder = tmp_path / "checkpoint/glyphs/fcn/1shot-3way"
    names = ("episode-0-query-0", "episode-1-query-1")
    assert tensorboard_images(folder) == {f"images/{name}": [1] for name in names}
    # Drawing changes nothing, and a run that is resumed keeps its pictures.
    plain = Done(train_meta, [*flags, "-max_epoch", 1, "-extra_dir", "plain"], tmp_path)
    assert plain.status == 0, plain.err
    weights = [torch.load(place / "max_acc.pth", weights_only=True)["params"] for place in (folder, folder / "plain")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not (folder / "plain/images").exists()
    done = Done(train_meta, [*flags, "-max_epoch", 2, "-resume", "-log_images", 1], tmp_path)
    assert done.status == 0, done.err
    assert tensorboard_images(folder) == {f"images/{names[0]}": [1, 2], f"images/{names[1]}": [1]}
    refused = Done(train_meta, [*flags, "-head", "proto", "-log_images", 1], tmp_path)
    assert refused.status == 1
    assert refused.err.startswith("error: -head proto computes no flow")


def test_pictures_of_an_epoch_that_is_done_again(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    run = RunFolder(tmp_path / "run", {})
    run.image("one", pixels, 1)
    run.record(epoch=1)
    run.save_state({})
    run.image("one", pixels + 1, 2)
    run.writer.close()
    again = RunFolder(tmp_path / "run", {}, resume=True)
    again.writer.flush()
    assert tensorboard_images(tmp_path / "run") == {"images/one": [1]}
    again.writer.close()
    assert [path.name for path in (tmp_path / "run/images/one").iterdir()] == ["epoch-1.png"]
    RunFolder(tmp_path / "run", {}).writer.close()
    assert not (tmp_path / "run/images").exists()
    assert (tmp_path / "run/previous-1/images/one/epoch-1.png").is_file()
