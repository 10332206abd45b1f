"""The three scripts as a user runs them: end to end on small data, repeatable, and clear about bad input."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_images

from Models import ResNet12

ROOT = Path(__file__).parents[1]
SMALL = ["-gpu", "cpu", "-image_size", "16", "-query", "2", "-num_workers", "0"]


def run(script: str, *flags: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def succeed(script: str, *flags: object, cwd: Path) -> str:
    done = run(script, *flags, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory, glyphs) -> tuple[Path, str]:
    """A folder in which all three stages ran, each by the command that the one before printed; and the output."""
    cwd = tmp_path_factory.mktemp("trained")
    data = ["-dataset", "glyphs", "-data_dir", glyphs]
    out = succeed(
        "train_pretrain.py", *data, *SMALL, "-max_epoch", 2, "-num_episode", 3, "-bs", 64, "-lr", 0.01, cwd=cwd
    )
    for extra in (["-max_epoch", 2, "-val_frequency", 2, "-bs", 2, "-val_episode", 3, "-test_episode", 4], []):
        command = shlex.split(re.search(r"^next: python (.*)$", out, re.M)[1])
        out = succeed(*command, *extra, cwd=cwd)
    return cwd, out


def test_three_stages(trained):
    cwd, out = trained
    assert re.search(r"glyphs test, fcn, 5-way 1-shot, 4 episodes: acc \d+\.\d+ \+- \d+\.\d+ %", out)
    pretrain, meta = cwd / "checkpoint/pre_train/glyphs/64-0.0100-30-0.20", cwd / "checkpoint/glyphs/fcn/1shot-5way"
    for folder, prefix in ((pretrain, ""), (meta, "encoder.")):
        params = torch.load(folder / "max_acc.pth", weights_only=True)["params"]
        assert list(params) == [prefix + key for key in ResNet12().state_dict()]
        assert len(json.loads((folder / "trlog.json").read_text())["epochs"]) == 2
        assert list((folder / "tf").iterdir())
    results = (meta / "results.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in results[:2]] == ["epoch 1/2", "epoch 2/2"]
    assert results[2].startswith("test, best model, 5-way 1-shot, 4 episodes: acc")
    assert not list(cwd.rglob("*.part"))


def test_tensorboard_scalars(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0] / "checkpoint/glyphs/fcn/1shot-5way/tf"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        f"data/{name}" for name in ("loss", "acc", "total_loss", "val_loss", "val_acc")
    }
    assert [event.step for event in events.Scalars("data/loss")] == list(range(1, 9))  # 2 epochs x 2 steps x 2 tasks
    assert [event.step for event in events.Scalars("data/val_acc")] == [1, 2]


@pytest.mark.parametrize(
    ("variant", "shot"),
    [
        (["-deepemd", "fcn", "-feature_pyramid", "1"], 3),
        (["-deepemd", "grid", "-patch_list", "1,2"], 1),
        (["-deepemd", "grid", "-patch_list", "1,2"], 3),
        (["-deepemd", "sampling", "-num_patch", "3"], 3),
    ],
)
def test_every_variant_trains_and_evaluates(trained, glyphs, tmp_path, variant, shot):
    weights = trained[0] / "checkpoint/pre_train/glyphs/64-0.0100-30-0.20/max_acc.pth"
    flags = [
        "-dataset",
        "glyphs",
        "-data_dir",
        glyphs,
        *SMALL,
        *variant,
        "-shot",
        shot,
        "-way",
        3,
        "-sfc_update_step",
        2,
    ]
    out = succeed(
        "train_meta.py",
        *flags,
        "-pretrain_dir",
        weights,
        "-max_epoch",
        1,
        "-val_frequency",
        1,
        "-val_episode",
        1,
        "-test_episode",
        1,
        "-solver",
        "qpth",
        cwd=tmp_path,
    )
    command = shlex.split(re.search(r"^next: python (.*)$", out, re.M)[1])
    assert f"3-way {shot}-shot, 1 episodes" in succeed(*command, cwd=tmp_path)


def test_pretraining_of_k_shot_and_pyramid(glyphs, tmp_path):
    succeed(
        "train_pretrain.py",
        "-dataset",
        "glyphs",
        "-data_dir",
        glyphs,
        *SMALL,
        "-shot",
        3,
        "-feature_pyramid",
        1,
        "-max_epoch",
        1,
        "-num_episode",
        1,
        "-bs",
        256,
        "-sfc_update_step",
        2,
        "-lr",
        0.01,
        cwd=tmp_path,
    )


def test_repeatable_to_the_bit_with_any_number_of_workers(glyphs, tmp_path):
    found = []
    for workers in (0, 2):
        flags = ["-dataset", "glyphs", "-data_dir", glyphs, *SMALL, "-deepemd", "sampling", "-num_patch", 2, "-way", 3]
        succeed(
            "train_meta.py",
            *flags,
            "-num_workers",
            workers,
            "-pretrain_dir",
            "none",
            "-max_epoch",
            2,
            "-val_frequency",
            2,
            "-val_episode",
            2,
            "-test_episode",
            3,
            "-extra_dir",
            workers,
            cwd=tmp_path,
        )
        folder = tmp_path / f"checkpoint/glyphs/sampling/1shot-3way/{workers}"
        curves = json.loads((folder / "trlog.json").read_text())
        found.append(
            (curves["epochs"], curves["test_loss"], torch.load(folder / "max_acc.pth", weights_only=True)["params"])
        )
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(value, found[1][2][key]) for key, value in found[0][2].items())


def test_eval_needs_only_its_split_and_shows_the_running_mean(tmp_path):
    for number in range(5):
        write_images(tmp_path / "own" / "val" / f"class{number}", 3, seed=number)
    done = run(
        "eval.py",
        "-dataset",
        "folder",
        "-data_dir",
        "own",
        "-set",
        "val",
        "-model_dir",
        "none",
        *SMALL,
        "-test_episode",
        20,
        "-extra_dir",
        "mine",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"acc \d+\.\d\d \+- \d+\.\d\d %", done.stderr)
    assert (tmp_path / "checkpoint/eval/mine/results.txt").read_text() == done.stdout.strip() + ", none\n"


@pytest.mark.parametrize(
    "variant",
    [[], ["-deepemd", "grid", "-patch_list", "1,2"], ["-deepemd", "sampling", "-num_patch", "2", "-fixed_patches"]],
)
def test_cache_and_batches_change_no_accuracy(trained, glyphs, variant):
    cwd, _ = trained
    weights = cwd / "checkpoint/pre_train/glyphs/64-0.0100-30-0.20"
    flags = [
        "-dataset",
        "glyphs",
        "-data_dir",
        glyphs,
        *SMALL,
        "-model_dir",
        weights,
        "-test_episode",
        12,
        "-way",
        3,
        *variant,
    ]
    ways = [[], ["-feature_cache", "off", "-episode_batch", 5, "-num_workers", 1]]
    found = [re.search(r"acc .*%", succeed("eval.py", *flags, *extra, cwd=cwd))[0] for extra in ways]
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def bad_place(tmp_path_factory, folder) -> Path:
    """A working folder with a good data set beside several bad ones."""
    cwd = tmp_path_factory.mktemp("bad")
    (cwd / "good").symlink_to(folder)
    write_images(cwd / "few" / "test" / "a", 2)
    write_images(cwd / "broken" / "test" / "a", 3)
    for path in (cwd / "broken" / "test" / "a").iterdir():
        path.write_bytes(path.read_bytes()[:70])
    (cwd / "miniimagenet").mkdir()
    torch.save({"params": {"conv1.weight": torch.zeros(64, 3, 7, 7)}}, cwd / "resnet18.pth")
    return cwd


GOOD = ["-dataset", "folder", "-data_dir", "good", "-model_dir", "none", *SMALL]


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["-data_dir", "nowhere"], 1, "-data_dir nowhere: expected a folder"),
        (["-dataset", "miniimagenet", "-data_dir", "."], 1, "list of test images in miniimagenet/split/test.csv"),
        (["-dataset", "cub"], 1, "expected the data set in good/cub"),
        (
            ["-data_dir", "few", "-way", "1"],
            1,
            "at least 3 images in every class (shot + query); the smallest class has 2",
        ),
        (["-way", "7"], 1, "at least 7 classes for 7-way episodes; the split has 6"),
        (["-shot", "6"], 1, "at least 8 images in every class"),
        (["-data_dir", "broken", "-way", "1"], 1, "it cannot be read"),
        (["-data_dir", "broken", "-way", "1", "-num_workers", "1"], 1, "it cannot be read"),
        (["-data_dir", "broken", "-way", "1", "-verify_images"], 1, "no image of class a can be read"),
        (["-model_dir", "nowhere.pth"], 1, "expected a checkpoint in nowhere.pth"),
        (["-model_dir", "resnet18.pth"], 1, "expected the weights of ResNet12 in resnet18.pth; it lacks"),
        (["-patch_list", "a,b"], 2, "whole numbers above 0 joined by commas, as in 2,3; got 'a,b'"),
        (["-gpu", "99"], 1, "there is no GPU 99"),
        (["-gpu", "one"], 1, "expected GPU numbers"),
        (["-dataset", "imagenet"], 2, "invalid choice: 'imagenet'"),
        (["-shot", "0"], 2, "expected a whole number of 1 or more; got '0'"),
        (["-sfc_lr", "nan"], 2, "expected a number above 0; got 'nan'"),
        (["-image_size", "8"], 2, "16 or more; got '8'"),
        (["-deepemd", "grid", "-feature_pyramid", "2,1"], 1, "-feature_pyramid goes with -deepemd fcn"),
    ],
)
def test_bad_input(bad_place, flags, status, message):
    done = run("eval.py", *GOOD, *flags, cwd=bad_place)
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error:", "eval.py:"))]
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert len(errors) == 1
    assert message in errors[0]


def test_bad_input_of_training_is_told_before_it_starts(bad_place):
    for script in ("train_pretrain.py", "train_meta.py"):
        done = run(script, "-dataset", "folder", "-data_dir", "few", *SMALL, cwd=bad_place)
        assert done.returncode == 1
        assert done.stderr.startswith("error: expected")
        assert not (bad_place / "checkpoint").exists()
