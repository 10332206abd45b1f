"""visualize.py: its pictures exist, show what was computed, and what they say is right."""

import contextlib
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_evaluation, write_images, write_run
from matplotlib.text import Text
from PIL import Image

import deepemd
import eval as eval_script
import visualize
from dataloader.arguments import draw_episodes, open_dataset
from engine.run import RunFolder
from pictures import matches, sheet
from utils import run_script

SMALL = ["-gpu", "cpu", "-image_size", "32", "-query", "2", "-num_workers", "0", "-way", "3", "-model_dir", "none"]


class Done:
    """What a script did: its exit status, what it printed, and the arguments of each figure that it drew."""

    def __init__(self, script, flags, cwd, monkeypatch=None):
        out, err = io.StringIO(), io.StringIO()
        self.status, self.matches, self.sheets, self.figures = 0, [], [], []
        before = Path.cwd()
        os.chdir(cwd)
        if monkeypatch:
            for place, name, seen in (
                (matches, "draw_match", self.matches),
                (deepemd, "draw_match", self.matches),
                (sheet, "draw_sheet", self.sheets),
            ):
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
    return [line for text in figure.findobj(Text) for line in text.get_text().split("\n")]


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
        ["episode", *flags, "-episode", 2, "-queries", "1,5", "-flows", 3, "-out", "new/here"],
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
    (((episode,), sheet, words),) = done.sheets
    args = visualize.build_parser().parse_args(["episode", *map(str, flags)])
    dataset = open_dataset(args, "test", train=False)
    items = draw_episodes(args, dataset, 3, seed=5, name="test")[2]
    assert sheet["names"] == [dataset.class_names[dataset.labels[index]] for index, _ in items[:3]]
    if args.deepemd == "fcn":  # otherwise the sheet shows whole images
        for number, shots in enumerate(episode.supports):
            wanted = [dataset[item][0].permute(1, 2, 0).numpy() for item in items[number : 3 * args.shot : 3]]
            assert np.array_equal(np.stack([panels[0].pixels for panels in shots]), np.stack(wanted))
    assert [word for word in words if re.match("query [0-9]", word)] == [f"query {k}" for k in (0, 3, 1, 4, 2, 5)]
    logits = episode.matching.logits
    hits = [found == number % 3 for number, found in enumerate(logits.argmax(1).tolist())]
    assert sum(hits) == round(6 * accuracy / 100)
    assert {f"{value:.2f}" for value in logits.flatten().tolist()} <= set(words)
    assert words.count("right") == sum(hits)

    for (query, protos, matching), match, words in done.matches:
        number = int(re.search(r"query (\d)", match["title"])[1])
        assert match["truth"] == number % 3
        torch.testing.assert_close(matching.logits, logits[number])
        assert matching.flow.shape == (3, nodes, nodes)
        # The share of the mass, computed another way.
        for flow in matching.flow.double():
            shares = (flow / flow.sum()).flatten().sort(descending=True).values
            count = int((shares > 1e-6).sum())
            share = f"top 3 of {count} flows: {100 * shares[:3].sum():.0f} % of the mass"
            assert (share if count > 3 else f"all {count} flows: 100 % of the mass") in words
        for panels in (query, *protos):
            assert sum(len(panel.boxes) for panel in panels if not panel.is_overview) == nodes
        right = int(matching.logits.argmax()) == match["truth"]
        assert any(word.startswith("right: " if right else "wrong: ") for word in words)
        assert sum("nearest to its prototype" in word for word in words) == (3 if "-sfc_update_step" in variant else 0)


def test_pair(tmp_path, monkeypatch):
    first, second = write_images(tmp_path, 2, size=40, suffix=".jpg")
    flags = ["pair", first, second, "-model_dir", "none", "-gpu", "cpu", "-image_size", 32, "-out", "out"]
    done = Done(visualize, flags, tmp_path, monkeypatch)
    assert done.status == 0, done.err
    assert pictures(tmp_path / "out") == {"pair-0000-0001.png"}
    logit, cost = map(float, re.search(r"logit (\S+), cost of the match (\S+)", done.out).groups())
    assert cost == pytest.approx(1 - logit / 12.5, abs=2e-4)
    (((_, _, matching), _, words),) = done.matches
    assert matching.logits.item() == pytest.approx(logit, abs=1e-4)
    assert not any("predicted" in word for word in words)
    sampled = Done(visualize, [*flags, "-deepemd", "sampling"], tmp_path).out
    assert sampled != done.out
    assert Done(visualize, [*flags, "-deepemd", "sampling"], tmp_path).out == sampled


def test_curves(tmp_path):
    runs = [write_run(tmp_path / "a", 3, test_acc=30.0, test_interval=1.0), write_run(tmp_path / "b/c", 1)]
    done = Done(visualize, ["curves", runs[0], runs[1] / "trlog.json", "-out", "out", "-format", "pdf"], tmp_path)
    assert done.status == 0, done.err
    assert pictures(tmp_path / "out") == {"curves.pdf"}


def test_compare(tmp_path):
    """Evaluations of different protocols stand in one table."""
    files = [
        write_evaluation(tmp_path / "runs/first/results.json", [20, 40, 60]),
        write_evaluation(tmp_path / "runs/second/results.json", [40, 40, 40]),
        write_evaluation(tmp_path / "runs/third/results.json", [80], shot=5),
    ]
    done = Done(visualize, ["compare", *files], tmp_path)
    assert done.status == 0, done.err
    assert [line.split()[0] for line in done.out.splitlines()[:4]] == ["evaluation", "first", "second", "third"]
    assert pictures(tmp_path / "checkpoint/pictures") == {"compare.png"}
    done = Done(visualize, ["compare", *files, "-names", "before it,after it,5-shot", "-out", "out"], tmp_path)
    assert done.out.splitlines() == [
        "evaluation  episodes  accuracy (%)    minus before it",
        "before it          3  40.00 +- 18.48",
        "after it           3  40.00 +- 0.00   +0.00 +- 18.48  (3 episodes, paired)",
        "5-shot             1  80.00 +- 0.00   not paired: -shot 5, not 1",
        "out/compare.png",
    ]
    assert Done(visualize, ["compare", files[0], "-out", "out"], tmp_path).status == 0
    refused = Done(visualize, ["compare", *files, "-names", "a,b"], tmp_path)
    assert refused.err == "error: -names has 2 names for 3 files; give one for each, joined by commas\n"


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["episode", "-head", "proto"], "error: -head proto computes no flow"),
        (["episode", "-queries", "6"], "error: there is no query 6: -way times -query are 6, numbered from 0"),
        (["episode", "-queries", "1,-2"], "is not whole numbers of 0 or more joined by commas"),
        (
            ["episode", "-episode", "5", "-test_episode", "5"],
            "error: there is no -episode 5: the evaluation has -test_episode 5",
        ),
        (["episode", "-model_dir", "nowhere"], "error: no checkpoint at nowhere"),
        (["episode", "-out", "file"], "error: cannot write file/episode-0.png"),
        (["episode", "-format", "gif"], "argument -format"),
        (["pair", "good.png", "bad.png"], "error: bad.png cannot be read as an image"),
        (["pair", "good.png", "good.png", "-head", "knn"], "error: -head knn computes no flow"),
        (["curves", "nowhere"], "error: cannot read the curves of a run from nowhere"),
        (["curves", "empty"], "error: empty/trlog.json has no curves yet: no epoch of the run is finished"),
        (["curves", "good.json"], "error: good.json is damaged, or not the curves of a run"),
        (["curves", "list.json"], "error: list.json is damaged, or not the curves of a run"),
        (["compare", "list.json"], "error: list.json is damaged, or not the results of an evaluation"),
        (["compare", "good.json", "bad.png"], "error: bad.png is damaged, or not the results of an evaluation"),
        (
            ["compare", "none.json"],
            "error: none.json is damaged, or not the results of an evaluation (ValueError: it has no accuracies",
        ),
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
    # Files of the same second are read in the order of their names, in which 10 is before 9.
    return {tag: sorted(event.step for event in events.Images(tag)) for tag in events.Tags()["images"]}


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


def test_pictures_of_a_repeated_epoch_replace_the_earlier_ones(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    run = RunFolder(tmp_path / "run", {})
    run.image("one", pixels, 1)
    run.record(epoch=1)
    run.save_state({"progress": {"epoch": 1}})
    run.image("one", pixels + 1, 2)
    run.writer.close()
    again = RunFolder(tmp_path / "run", {}, resume=True)
    again.writer.flush()
    assert tensorboard_images(tmp_path / "run") == {"images/one": [1]}
    again.image("one", pixels + 2, 2)
    again.writer.close()
    assert tensorboard_images(tmp_path / "run") == {"images/one": [1, 2]}
    with Image.open(tmp_path / "run/images/one/epoch-2.png") as image:
        assert np.array_equal(np.asarray(image), pixels + 2)
    RunFolder(tmp_path / "run", {}).writer.close()
    assert not (tmp_path / "run/images").exists()
    assert (tmp_path / "run/previous-1/images/one/epoch-1.png").is_file()


def test_confusion_of_an_evaluation_is_drawn(glyphs, tmp_path):
    flags = [*SMALL, "-image_size", 16, "-dataset", "glyphs", "-data_dir", glyphs, "-test_episode", 2]
    evaluated = Done(eval_script, flags, tmp_path)
    assert evaluated.status == 0, evaluated.err
    done = Done(visualize, ["confusion", "checkpoint/eval/results.json", "-out", "pictures"], tmp_path)
    assert done.status == 0, done.err
    header, *pairs, path = done.out.splitlines()
    assert header.split() == ["class", "taken", "for", "share"]
    assert all(re.search(r" %  \(\d+ of \d+\)$", pair) for pair in pairs)
    assert path == "pictures/confusion.png"
    with Image.open(tmp_path / path) as image:
        assert np.asarray(image).std() > 0
    done = Done(visualize, ["confusion", "none.json"], tmp_path)
    assert (done.status, done.out) == (1, "")
    assert done.err == "error: cannot read the results of an evaluation from none.json (No such file or directory)\n"
