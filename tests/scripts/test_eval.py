"""eval.py: what it writes where, and the flags of the weights."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import finish, run, start, succeed

from engine.evaluation import Recorder
from engine.results import describe_confusion
from Models.conv4 import Conv4

SMALL = ["-gpu", "cpu", "-image_size", "16", "-query", "2", "-way", "2", "-num_workers", "0", "-test_episode", "4"]


@pytest.fixture
def flags(folder) -> list[object]:
    return ["-dataset", "folder", "-data_dir", folder, *SMALL, "-backbone", "conv4"]


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def save_weights(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"params": Conv4().state_dict()}, path)
    return path


def test_results_of_different_evaluations_are_kept(flags, folder, tmp_path, monkeypatch):
    """Of other flags, weights or images. Their records are as different as their results."""
    records = []
    monkeypatch.setattr(Recorder, "remove", lambda self: records.append(self.path.name))
    shutil.copytree(folder / "test", tmp_path / "data/test")
    (tmp_path / "data/test/class0/0000.png").rename(tmp_path / "data/test/class0/9999.png")
    weights = save_weights(tmp_path / "one.pth", 1)
    changes: list[list[object]] = [
        *([], ["-seed", 2], ["-head", "proto"], ["-shot", 2], ["-test_episode", 3], ["-data_dir", tmp_path / "data"]),
        *(["-model_dir", weights], ["-model_dir", weights]),
    ]
    found, where = [], tmp_path / "checkpoint/eval"
    for number, change in enumerate(changes):
        if number == 7:
            save_weights(weights, 2)  # under the same name
        succeed("eval.py", *flags, "-model_dir", "none", *change, cwd=tmp_path)
        found.append(read(where / "results.json"))  # the newest
    kept = [read(path) for path in where.glob("results-*.json")]
    assert len(kept) == len(found) == len(set(records)) == 8
    assert all(one in kept for one in found)
    assert {path.stem for path in where.glob("results-*.json")} == {
        Path(name).stem.replace("partial", "results") for name in records
    }
    # Where weights lie and how fast they are evaluated does not matter.
    shutil.copy(weights, tmp_path / "two.pth")
    same = ["-model_dir", "two.pth", "-feature_cache", "off", "-episode_batch", 1, "-json", "a.json"]
    succeed("eval.py", *flags, *same, cwd=tmp_path)
    assert records[-1] == records[-2]
    assert read(tmp_path / "a.json")["loss"] == pytest.approx(found[-1]["loss"])


def test_two_evaluations_at_once(flags, tmp_path):
    each = [["eval.py", *flags, "-model_dir", "none", "-seed", seed] for seed in (1, 2, 2)]
    done = [finish(process) for process in [start(words, tmp_path) for words in each]]
    assert [one.status for one in done] == [0, 0, 0], done
    where = tmp_path / "checkpoint/eval"
    assert sorted(read(path)["flags"]["seed"] for path in where.glob("results-*.json")) == [1, 2]
    assert read(where / "results.json")["flags"]["seed"] in (1, 2)
    assert len((where / "results.txt").read_text().splitlines()) == 3


def test_a_damaged_record_does_not_stop_an_evaluation(flags, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "remove", lambda self: self.path.write_text(""))
        whole = succeed("eval.py", *flags, "-model_dir", "none", "-json", "-", cwd=tmp_path)
    done = run("eval.py", *flags, "-model_dir", "none", "-json", "-", "-resume", cwd=tmp_path)
    assert done.status == 0, done.err
    assert "is damaged, or not scores of an evaluation" in done.err
    assert json.loads(done.out)["loss"] == json.loads(whole)["loss"]
    assert not list((tmp_path / "checkpoint/eval").glob("partial-*.json"))


def test_the_line_names_what_is_not_at_its_default(flags, tmp_path):
    extra = ["-head", "knn", "-kshot", "mean", "-shot", 2, "-seed", 7, "-feature_pyramid", "1", "-solver", "simplex"]
    plain, changed = (succeed("eval.py", *flags, "-model_dir", "none", *e, cwd=tmp_path) for e in ([], extra))
    assert plain.startswith("folder test, fcn, 2-way 1-shot, 4 episodes: acc ")
    assert plain.endswith(" s), with -image_size 16 -query 2 -backbone conv4\n")
    for words in ("-head knn", "-kshot mean", "-seed 7", "-feature_pyramid 1", "-solver simplex", "-image_size 16"):
        assert words in changed
    lines = (tmp_path / "checkpoint/eval/results.txt").read_text().splitlines()
    assert lines == [f"{out.strip()}, none" for out in (plain, changed)]


def test_results_go_where_json_says(flags, tmp_path):
    flags = [*flags, "-model_dir", "none"]
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "real.json").chmod(0o600)
    (tmp_path / "link.json").symlink_to("real.json")
    succeed("eval.py", *flags, "-json", "link.json", cwd=tmp_path)
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").stat().st_mode & 0o777 == 0o600
    assert read(tmp_path / "real.json") == read(tmp_path / "checkpoint/eval/results.json")
    succeed("eval.py", *flags, "-json", "/dev/null", cwd=tmp_path)
    assert Path("/dev/null").is_char_device()
    done = run("eval.py", *flags, "-json", tmp_path, cwd=tmp_path)
    assert (done.status, "it is a folder" in done.err, "acc" in done.err + done.out) == (1, True, False)


def test_weights_are_used_as_they_were_trained(flags, folder, tmp_path):
    """The flags of their run are those of the evaluation; -way and -query, which are its own, are not."""
    weights = save_weights(tmp_path / "run/max_acc.pth", 1)
    trained = {"dataset": "folder", "backbone": "conv4", "image_size": 24, "head": "knn", "way": 6, "query": 9}
    (weights.parent / "run.json").write_text(json.dumps({"flags": trained}))
    given = ["-data_dir", folder, "-model_dir", "run", *SMALL[:2], *SMALL[4:], "-json", "-"]
    done = run("eval.py", *given, cwd=tmp_path)
    assert done.status == 0, done.err
    adopted = [line for line in done.err.splitlines() if line.startswith("flags of the run that trained the weights")]
    words = "-dataset folder -backbone conv4 -image_size 24 -head knn"
    assert adopted == [f"flags of the run that trained the weights (run/run.json): {words}"]
    found = json.loads(done.out)
    assert {**found["flags"], **trained, "way": 2, "query": 2} == found["flags"]
    done = run("eval.py", *given, *words.split(), cwd=tmp_path)
    assert json.loads(done.out)["loss"] == found["loss"]
    assert "run.json" not in done.err
    done = run("eval.py", *given, "-image_size", 16, cwd=tmp_path)
    assert "warning: -image_size 16 differs from the run that trained the weights (run/run.json)" in done.err
    assert json.loads(done.out)["loss"] != found["loss"]


def test_nodes_and_episodes_in_files_give_the_same_accuracies(flags, tmp_path):
    def evaluate(*more):
        return json.loads(succeed("eval.py", *more, "-json", "-", cwd=tmp_path))

    given = [*flags, "-model_dir", "none", "-shot", 2, "-kshot", "mean"]
    written = evaluate(*given, "-features_out", "f.npz", "-episodes_out", "e.json", "-csv", "t.csv")
    nodes = [*flags, "-data_dir", "nowhere", "-kshot", "mean", "-features", "f.npz"]
    drawn, listed = evaluate(*nodes, "-shot", 2), evaluate(*nodes, "-episodes_in", "e.json", "-way", 5)
    images = evaluate(*given, "-episodes_in", "e.json", "-test_episode", 3)
    for found in (drawn, listed):
        assert found["accuracies"] == written["accuracies"]
        assert found["loss"] == pytest.approx(written["loss"], abs=1e-6)
        assert found["confusion"] == written["confusion"]
    assert images["accuracies"] == written["accuracies"][:3]
    assert (listed["flags"]["way"], listed["flags"]["shot"], listed["weights"]) == (2, 2, None)
    # Files of nodes hold training images of each class, for the statistics of nodes.
    with np.load(tmp_path / "f.npz") as archive:
        assert {name: archive[name].shape for name in archive} == {
            "nodes": (42, 64, 1),
            **dict.fromkeys(("labels", "files"), (42,)),
            "class_names": (6,),
            "train_nodes": (42, 64, 1),
            "train_labels": (42,),
        }
        assert archive["files"][8] == "class1/0001.png"
        changed = dict(archive)
    # Other nodes in a file of that name are another evaluation.
    np.savez(tmp_path / "f.npz", **changed | {"nodes": changed["nodes"][::-1]})
    assert evaluate(*nodes, "-shot", 2)["data"]["sha256"] != drawn["data"]["sha256"]
    assert len(list((tmp_path / "checkpoint/eval").glob("results-*.json"))) == 5
    with open(tmp_path / "t.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    assert [float(row["accuracy"]) for row in rows] == written["accuracies"]
    assert sum(float(row["loss"]) for row in rows) / 4 == pytest.approx(written["loss"])
    assert [row["classes"].split(";") for row in rows] == [one["classes"] for one in read(tmp_path / "e.json")]


def test_results_have_the_accuracy_of_each_class(flags, tmp_path):
    found = json.loads(succeed("eval.py", *flags, "-model_dir", "none", "-json", "-", cwd=tmp_path))
    classes, counts = found["confusion"]["classes"], np.array(found["confusion"]["counts"])
    assert classes == [f"class{k}" for k in range(6)]
    assert counts.sum() == 4 * 2 * 2
    assert 100 * np.trace(counts) / counts.sum() == pytest.approx(found["accuracy"])
    right = {
        name: 100 * row[k] / row.sum() for k, (name, row) in enumerate(zip(classes, counts, strict=True)) if any(row)
    }
    assert found["class_accuracy"] == right


def test_many_classes_have_no_matrix():
    names = [f"class {k}" for k in range(501)]
    found = describe_confusion(Counter({(0, 0): 3, (0, 500): 1}), names)
    assert found == {"class_accuracy": {"class 0": 75.0}}
    assert "confusion" in describe_confusion(Counter({(0, 0): 3, (0, 499): 1}), names[:500])


@pytest.mark.parametrize(
    ("more", "status", "sentence"),
    [
        (["-features", "f.npz", "-features_out", "g.npz"], 2, "leave out -features_out"),
        (["-csv", "-"], 2, 'argument -csv: a table needs the name of a file; "-" is for -json'),
        (["-episodes_out", "-"], 2, '-features_out and -episodes_out need the name of a file; "-" is for -json'),
        (["-features", "none.npz"], 1, "-features none.npz: there is no such file"),
        (["-features", "f.npz", "-way", 3], 1, "-features f.npz: 3-way episodes need 3 classes"),
        (["-features", "f.npz", "-episodes_out", "e.json"], 1, "no array files"),
        (["-episodes_in", "none.json"], 1, "cannot read a list of episodes from none.json"),
        (["-features_out", "f.npz/g.npz"], 1, "cannot write f.npz/g.npz"),
        (["-csv", "r.json", "-json", "./r.json"], 1, "r.json is named for two outputs"),
    ],
)
def test_files_that_cannot_be_used_are_one_line(flags, tmp_path, more, status, sentence):
    np.savez(tmp_path / "f.npz", nodes=np.ones((8, 2), np.float32), labels=[0, 0, 0, 0, 1, 1, 1, 1])
    done = run("eval.py", *flags, "-model_dir", "none", *more, cwd=tmp_path)
    assert (done.status, done.out) == (status, "")
    assert sentence in done.err.splitlines()[-1]
