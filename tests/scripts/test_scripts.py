"""The three scripts as a user runs them: end to end on small data, repeatable, and clear about bad input.

``main()`` is called in this process, because importing torch anew takes seconds; a few tests need a process of their own.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run, succeed, write_images
from tqdm import tqdm

import engine.run
import eval as eval_script
import Models.matching
import train_meta
import train_pretrain
from engine.arguments import STAGE_FLAGS
from engine.evaluation import Evaluation, Evaluator
from Models import ResNet12
from Models.conv4 import Conv4

SMALL = ["-gpu", "cpu", "-image_size", "16", "-query", "2", "-num_workers", "0", "-backbone", "conv4"]


def next_command(out: str) -> list[str]:
    return shlex.split(re.search(r"^next: python (.*)$", out, re.M)[1])


@pytest.fixture(scope="module")
def data(glyphs) -> list[object]:
    return ["-dataset", "glyphs", "-data_dir", glyphs]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data) -> tuple[Path, list[str]]:
    """A folder in which all three stages ran, each by the command that the one before printed; and their output."""
    cwd = tmp_path_factory.mktemp("trained")
    outs = [
        succeed("train_pretrain.py", *data, *SMALL, "-max_epoch", 2, "-num_episode", 3, "-bs", 64, "-lr", 0.01, cwd=cwd)
    ]
    for extra in (["-max_epoch", 2, "-val_frequency", 2, "-bs", 2, "-val_episode", 3, "-test_episode", 4], []):
        outs.append(succeed(*next_command(outs[-1]), *extra, cwd=cwd))
    return cwd, outs


PRETRAINED = "checkpoint/pre_train/glyphs/64-0.0100-30-0.20-conv4/max_acc.pth"


def test_processes_that_load_images_end_with_the_script(data, tmp_path):
    """Also where nothing has collected the cycles of frames by then, through which libraries hold the loaders."""
    flags = [*data, *SMALL, "-num_workers", 1, "-bs", 999, "-max_epoch", 1]
    code = (
        "import gc; gc.disable(); import train_pretrain; from utils import run_script; run_script(train_pretrain.main)"
    )
    command = [sys.executable, "-c", code, *flags, "-num_episode", 1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_three_stages(trained):
    cwd, (_, meta_out, eval_out) = trained
    pretrain, meta = cwd / PRETRAINED, cwd / "checkpoint/glyphs/fcn/1shot-5way-conv4"
    for folder, prefix in ((pretrain.parent, ""), (meta, "encoder.")):
        params = torch.load(folder / "max_acc.pth", weights_only=True)["params"]
        assert list(params) == [prefix + key for key in Conv4().state_dict()]
        assert len(json.loads((folder / "trlog.json").read_text())["epochs"]) == 2
        assert list((folder / "tf").iterdir())
    results = (meta / "results.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in results[:2]] == ["epoch 1/2", "epoch 2/2"]
    assert results[2].startswith("test, best model, 5-way 1-shot, 4 episodes: acc")
    assert not list(cwd.rglob("*.part"))
    # The final test and the command it prints draw the same episodes and find the same.
    accuracy = re.compile(r"4 episodes: acc (\d+\.\d+ \+- \d+\.\d+ %)")
    assert accuracy.search(meta_out)[1] == accuracy.search(eval_out)[1]
    assert "glyphs test, fcn, 5-way 1-shot" in eval_out


def test_tensorboard_scalars(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0] / "checkpoint/glyphs/fcn/1shot-5way-conv4/tf"))
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
        (["-deepemd", "sampling", "-num_patch", "3", "-fixed_patches"], 3),
    ],
)
def test_every_variant_trains_and_evaluates(trained, data, tmp_path, variant, shot):
    weights = trained[0] / PRETRAINED
    flags = [*data, *SMALL, *variant, "-shot", shot, "-way", 3, "-sfc_update_step", 2, "-sfc_lr", 0.2]
    flags += ["-pretrain_dir", weights]
    counts = ["-max_epoch", 1, "-val_frequency", 1, "-val_episode", 1, "-test_episode", 2]
    out = succeed("train_meta.py", *flags, *counts, "-solver", "qpth", cwd=tmp_path)
    found = succeed(*next_command(out), cwd=tmp_path)
    assert f"3-way {shot}-shot, 2 episodes" in found
    assert re.search(r"acc .* %", out.splitlines()[-2])[0] == re.search(r"acc .* %", found)[0]


@pytest.mark.parametrize(("stage", "following"), [(train_pretrain, train_meta), (train_meta, eval_script)])
def test_the_next_stage_accepts_every_flag_that_it_is_given(stage, following):
    names, accepted = (set(vars(script.build_parser().parse_args([]))) for script in (stage, following))
    assert names - set(STAGE_FLAGS) - set(stage.OWN_FLAGS) <= accepted
    assert set(stage.OWN_FLAGS) <= names


def test_validation_uses_its_solver_for_the_prototypes_too(data, tmp_path, monkeypatch):
    solvers: dict[bool, set[str]] = {True: set(), False: set()}
    real_emd, real_call = Models.matching.emd, Evaluator.__call__
    evaluating = []

    def emd(*values, solver, **options):
        solvers[bool(evaluating)].add(solver)
        return real_emd(*values, solver=solver, **options)

    def evaluate(self, *values, **settings):
        evaluating.append(1)
        try:
            return real_call(self, *values, **settings)
        finally:
            evaluating.pop()

    monkeypatch.setattr(Models.matching, "emd", emd)
    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    counts = ["-max_epoch", 1, "-val_frequency", 1, "-val_episode", 1, "-test_episode", 1, "-way", 2, "-shot", 2]
    flags = ["-solver", "ipm", "-val_solver", "simplex", "-sfc_update_step", 1, "-pretrain_dir", "none"]
    succeed("train_meta.py", *data, *SMALL, *counts, *flags, cwd=tmp_path)
    assert solvers == {True: {"simplex"}, False: {"ipm"}}


def test_next_names_every_flag_that_matters(folder, tmp_path):
    """From stage to stage, for settings that are at their default in no script."""
    given = {
        **{
            "dataset": "folder",
            "data_dir": str(folder),
            "image_size": "16",
            "query": "2",
            "num_workers": "0",
            "way": "3",
        },
        **{"head": "knn", "kshot": "mean", "backbone": "conv4"},
        **{"shot": "2", "sfc_update_step": "2", "sfc_lr": "0.3", "temperature": "5.0", "norm": "none", "gpu": "cpu"},
        **{"solver": "ipm", "form": "QP", "l2_strength": "0.1", "amp": "bfloat16", "episode_batch": "3"},
        **{"deepemd": "grid", "patch_list": "1", "patch_ratio": "1.5", "num_patch": "4", "extra_dir": "mine"},
    }
    switches = ["-fixed_patches", "-verify_images", "-deterministic"]
    flags = [word for name, value in given.items() for word in (f"-{name}", value)]
    stage = ["-max_epoch", 1, "-num_episode", 1, "-bs", 50, "-lr", 0.01]
    out = succeed("train_pretrain.py", *flags, *switches, *stage, "-seed", 0, cwd=tmp_path)

    def check(command):
        assert {name: command[command.index(f"-{name}") + 1] for name in given} == given
        assert set(switches) <= set(command)

    found = next_command(out)
    check(found)
    assert not {"-bs", "-lr", "-max_epoch", "-num_episode"} & set(found)
    seed = found[found.index("-seed") + 1]  # the one that was drawn
    assert int(seed) > 0
    curves = json.loads(next(tmp_path.rglob("trlog.json")).read_text())
    assert curves["args"]["seed"] == int(seed)

    counts = ["-max_epoch", 1, "-val_frequency", 1, "-val_episode", 1, "-test_episode", 1, "-val_solver", "simplex"]
    found = next_command(succeed(*found, *counts, "-set", "test", cwd=tmp_path))
    given["solver"] = "simplex"
    check(found)
    assert found[found.index("-seed") + 1] == seed
    assert "-set" not in found


def test_pretraining_of_k_shot_and_pyramid(data, tmp_path):
    flags = ["-shot", 3, "-feature_pyramid", 1, "-max_epoch", 1, "-num_episode", 1, "-bs", 256, "-sfc_update_step", 2]
    succeed("train_pretrain.py", *data, *SMALL, *flags, "-lr", 0.00003, "-backbone", "resnet12", cwd=tmp_path)
    weights = tmp_path / "checkpoint/pre_train/glyphs/256-3e-05-30-0.20/max_acc.pth"
    assert list(torch.load(weights, weights_only=True)["params"]) == list(ResNet12().state_dict())


@pytest.mark.parametrize(
    "flags",
    [
        ["-amp", "bfloat16", "-save_all"],
        ["-compile"],
        ["-checkpoint_activations", "-solver", "simplex", "-emd_gradient", "cost"],
        ["-deterministic", "-solver", "ipm"],
    ],
)
def test_ways_to_train(trained, data, tmp_path, monkeypatch, flags):
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend="eager"))
    counts = ["-max_epoch", 2, "-val_frequency", 1, "-val_episode", 1, "-test_episode", 1, "-way", 2]
    out = succeed(
        "train_meta.py", *data, *SMALL, *counts, *flags, "-pretrain_dir", trained[0] / PRETRAINED, cwd=tmp_path
    )
    assert "epoch 2/2: train loss" in out
    assert "nan" not in out
    run_folder = tmp_path / "checkpoint/glyphs/fcn/1shot-2way-conv4"
    assert sorted(path.name for path in run_folder.glob("epoch-*.pth")) == (
        ["epoch-1.pth", "epoch-2.pth"] if "-save_all" in flags else []
    )


@pytest.mark.parametrize("random_val_task", [False, True])
def test_what_validation_and_final_test_are_given(trained, data, tmp_path, monkeypatch, random_val_task):
    """Fixed validation episodes unless asked otherwise, -val_solver, and the best weights for the final test."""
    calls = []
    accuracies = iter([60.0, 40.0, 50.0, 1.0])  # three epochs, of which the first is best, then the test

    def evaluate(self, model, episodes, *, solver=None, title="", **_):
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        calls.append((list(episodes), solver, title, weights))
        return Evaluation(1.0, next(accuracies), 1.0, [])

    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    counts = ["-max_epoch", 3, "-val_frequency", 1, "-val_episode", 2, "-test_episode", 3, "-way", 2]
    flags = [*counts, "-val_solver", "simplex", *(["-random_val_task"] if random_val_task else [])]
    succeed("train_meta.py", *data, *SMALL, *flags, "-pretrain_dir", trained[0] / PRETRAINED, cwd=tmp_path)
    assert [call[1:3] for call in calls] == [("simplex", "val")] * 3 + [("simplex", "test")]
    assert (calls[0][0] != calls[1][0]) == random_val_task
    assert (calls[1][0] != calls[2][0]) == random_val_task
    best, last, tested = calls[0][3], calls[2][3], calls[3][3]
    assert all(torch.equal(value, best[key]) for key, value in tested.items())
    assert not all(torch.equal(value, last[key]) for key, value in tested.items())


@pytest.mark.parametrize("random_val_task", [False, True])
def test_validation_episodes_of_pretraining(folder, tmp_path, monkeypatch, random_val_task):
    calls = []

    def evaluate(self, model, episodes, *, title=""):
        calls.append(list(episodes))
        return Evaluation(1.0, 50.0, 1.0, [])

    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    flags = [
        "-dataset",
        "folder",
        "-data_dir",
        folder,
        *SMALL,
        "-max_epoch",
        2,
        "-bs",
        42,
        "-num_episode",
        2,
        "-way",
        2,
    ]
    succeed("train_pretrain.py", *flags, *(["-random_val_task"] if random_val_task else []), cwd=tmp_path)
    assert (calls[0] != calls[1]) == random_val_task


def test_repeatable_to_the_bit_with_any_number_of_workers(data, tmp_path):
    found = []
    flags = [*data, *SMALL, "-deepemd", "sampling", "-num_patch", 2, "-way", 3, "-pretrain_dir", "none"]
    counts = ["-max_epoch", 2, "-val_frequency", 2, "-val_episode", 2, "-test_episode", 3]
    for workers in (0, 2):
        succeed("train_meta.py", *flags, *counts, "-num_workers", workers, "-extra_dir", workers, cwd=tmp_path)
        folder = tmp_path / f"checkpoint/glyphs/sampling/1shot-3way-conv4/{workers}"
        curves = json.loads((folder / "trlog.json").read_text())
        weights = torch.load(folder / "max_acc.pth", weights_only=True)["params"]
        found.append((curves["epochs"], curves["test_loss"], weights))
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(value, found[1][2][key]) for key, value in found[0][2].items())


def test_eval_needs_only_its_split_and_says_what_it_does(tmp_path):
    for number in range(5):
        write_images(tmp_path / "own" / "val" / f"class{number}", 3, seed=number)
    own = ["-dataset", "folder", "-data_dir", "own", "-set", "val"]
    done = run("eval.py", *own, "-model_dir", "none", *SMALL, "-test_episode", 20, "-extra_dir", "mine", cwd=tmp_path)
    assert done.status == 0, done.err
    assert done.err.startswith("device: cpu\nweights: none\n")
    assert (tmp_path / "checkpoint/eval/mine/results.txt").read_text() == done.out.strip() + ", none\n"


def test_published_weights_are_those_of_the_variant(trained, data, tmp_path):
    """Without -model_dir, eval.py takes the published model of the data set and the variant."""
    for variant in ("fcn", "grid"):
        place = tmp_path / "deepemd_trained_model/glyphs" / variant
        place.mkdir(parents=True)
        shutil.copy(trained[0] / PRETRAINED, place)
    for variant in ("fcn", "grid", "sampling"):
        done = run("eval.py", *data, *SMALL, "-test_episode", 1, "-patch_list", 1, "-deepemd", variant, cwd=tmp_path)
        assert f"weights: deepemd_trained_model/glyphs/{variant}/max_acc.pth" in done.err
        assert done.status == (variant == "sampling")
    assert "download the published weights (bash download_trained_model.sh), or use a pretrained network" in done.err
    done = run("train_meta.py", *data, *SMALL, cwd=tmp_path)
    assert "no checkpoint at deepemd_pretrain_model/glyphs/conv4/max_acc.pth" in done.err
    assert "bash download_pretrain_model.sh" in done.err


@pytest.mark.parametrize(
    "variant",
    [[], ["-deepemd", "grid", "-patch_list", "1,2"], ["-deepemd", "sampling", "-num_patch", "2", "-fixed_patches"]],
)
def test_cache_and_batches_change_no_accuracy(trained, data, variant):
    cwd, _ = trained
    flags = [*data, *SMALL, "-model_dir", cwd / PRETRAINED, "-test_episode", 12, "-way", 3, *variant]
    ways = [[], ["-feature_cache", "off", "-episode_batch", 5, "-num_workers", 1]]
    found = [re.search(r"acc .*%", succeed("eval.py", *flags, *extra, cwd=cwd))[0] for extra in ways]
    assert found[0] == found[1]


# --- bad input ---


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
    (cwd / "file").write_text("")
    torch.save({"params": {"conv1.weight": torch.zeros(64, 3, 7, 7)}}, cwd / "resnet18.pth")
    return cwd


GOOD = ["-dataset", "folder", "-data_dir", "good", "-model_dir", "none", *SMALL, "-backbone", "resnet12"]


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["-data_dir", "nowhere"], 1, "there is no folder nowhere. Set -data_dir"),
        (["-dataset", "miniimagenet", "-data_dir", "."], 1, "there is no file miniimagenet/split/test.csv"),
        (["-dataset", "cub"], 1, "no data set in good/cub"),
        (["-data_dir", "few", "-way", "1"], 1, "at least 3 images in every class (shot + query); the smallest class has 2"),
        (["-way", "7"], 1, "7-way episodes need 7 classes; the split has 6"),
        (["-shot", "6"], 1, "at least 8 images in every class"),
        (["-data_dir", "broken", "-way", "1"], 1, "cannot be read as an image"),
        (["-data_dir", "broken", "-way", "1", "-num_workers", "1"], 1, "cannot be read as an image"),
        (["-data_dir", "broken", "-way", "1", "-verify_images"], 1, "no image of class a can be read"),
        (["-model_dir", "nowhere.pth"], 1, "no checkpoint at nowhere.pth"),
        (["-model_dir", "resnet18.pth"], 1, "resnet18.pth does not hold the weights of ResNet12: it lacks"),
        (["-patch_list", "a,b"], 2, "'a,b' is not whole numbers above 0 joined by commas, as in 2,3"),
        (["-patch_list", "33", "-deepemd", "grid"], 2, "33 makes 1089 patches"),
        (["-gpu", "99"], 1, "there is no GPU 99"),
        (["-gpu", "one"], 1, "is neither GPU numbers"),
        (["-dataset", "imagenet"], 2, "invalid choice: 'imagenet'"),
        (["-shot", "0"], 2, "'0' is not a whole number from 1 to 1000"),
        (["-sfc_lr", "nan"], 2, "'nan' is not a number from 1e-12 to 1000000.0"),
        (["-image_size", "8"], 2, "'8' is not a whole number from 16 to 1024"),
        (["-image_size", "100000"], 2, "'100000' is not a whole number from 16 to 1024"),
        (["-seed", "9" * 24], 2, "is not a whole number from 0 to 9223372036854775807"),
        (["-test_episode", "9" * 5000], 2, "is not a whole number from 1 to 1000000000"),
        (["-deepemd", "grid", "-feature_pyramid", "2,1"], 1, "-feature_pyramid requires -deepemd fcn"),
        (["-compile", "-checkpoint_activations"], 1, "-compile and -checkpoint_activations exclude each other"),
        (["-extra_dir", "../elsewhere"], 2, "is not the name of a folder below checkpoint/"),
        (["-extra_dir", "n" * 300], 1, "cannot write checkpoint/eval/nnn"),
    ],
)  # fmt: skip
def test_bad_input(bad_place, flags, status, message):
    done = run("eval.py", *GOOD, *flags, cwd=bad_place)
    errors = [line for line in done.err.splitlines() if line.startswith(("error:", "eval.py:"))]
    assert done.status == status, done.err
    assert "Traceback" not in done.err
    assert len(errors) == 1
    assert message in errors[0]
    assert "acc" not in done.err  # told before the work
    assert not (bad_place / "elsewhere").exists()


def test_an_error_has_a_line_of_its_own(bad_place, monkeypatch):
    """Not glued to the progress bar of a terminal."""
    monkeypatch.setattr("engine.loading._Lines", tqdm)

    def fails(self, *args, **settings):
        raise engine.run.InputError("it broke")

    monkeypatch.setattr(Evaluator, "_score", fails)
    done = run("eval.py", *GOOD, cwd=bad_place)
    assert "test:   0%" in done.err
    assert done.err.replace("\r", "\n").splitlines()[-1] == "error: it broke"


def test_compile_on_several_gpus_is_refused(bad_place, monkeypatch):
    monkeypatch.setattr("engine.start.choose_device", lambda gpu: (torch.device("cpu"), [0, 1]))
    done = run("eval.py", *GOOD, "-compile", "-gpu", "0,1", cwd=bad_place)
    assert done.err.endswith("-compile works on one GPU. Name one with -gpu instead of 0,1, or leave -compile out\n")


def test_a_missing_library_is_told_before_the_run(bad_place, monkeypatch):
    for name in ("qpth", "qpth.qp"):
        monkeypatch.setitem(sys.modules, name, None)
    done = run("eval.py", *GOOD, "-solver", "qpth", cwd=bad_place)
    assert (done.status, 'error: solver "qpth" needs qpth: pip install qpth' in done.err) == (1, True)
    meta = ["train_meta.py", *GOOD[:4], *SMALL, "-pretrain_dir", "none", "-test_episode", 1, "-query", 1]
    done = run(*meta, "-val_solver", "qpth", cwd=bad_place)
    assert (done.status, 'error: solver "qpth" needs qpth: pip install qpth' in done.err) == (1, True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    done = run(*meta, cwd=bad_place)
    assert (done.status, "error: the logs of a run need TensorBoard: pip install tensorboard" in done.err) == (1, True)


def test_bad_input_of_training_is_told_before_it_starts(bad_place, folder, tmp_path):
    for script in ("train_pretrain.py", "train_meta.py"):
        done = run(script, "-dataset", "folder", "-data_dir", "few", *SMALL, "-pretrain_dir", "none", cwd=bad_place)
        assert done.status in (1, 2)
        assert not (bad_place / "checkpoint/folder").exists()
    shutil.copytree(folder, tmp_path / "data")
    for split, script in (("val", "train_pretrain.py"), ("test", "train_meta.py"), ("train", "train_meta.py")):
        broken = tmp_path / "data" / split / "class0" / "0000.png"
        whole = broken.read_bytes()
        broken.write_bytes(whole[:70])
        stage = ["-pretrain_dir", "none"] if script == "train_meta.py" else []
        done = run(script, "-dataset", "folder", "-data_dir", "data", *SMALL, *stage, cwd=tmp_path)
        assert (done.status, f"{broken.relative_to(tmp_path)} cannot be read as an image" in done.err) == (1, True)
        assert not (tmp_path / "checkpoint").exists()
        broken.write_bytes(whole)


def test_a_failing_final_test_costs_nothing_but_itself(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    for path in (tmp_path / "data/test").glob("*/*.png"):
        if path.name != "0000.png":  # the first image of a split is looked at before the first step
            path.write_bytes(path.read_bytes()[:70])
    counts = ["-max_epoch", 1, "-val_frequency", 1, "-val_episode", 1, "-test_episode", 1, "-way", 2]
    flags = ["-dataset", "folder", "-data_dir", "data", *SMALL[:-2], *counts, "-pretrain_dir", "none"]
    done = run("train_meta.py", *flags, cwd=tmp_path)
    assert (done.status, "cannot be read as an image" in done.err) == (1, True)
    assert (tmp_path / "checkpoint/folder/fcn/1shot-2way/max_acc.pth").is_file()
    assert "to test them, run: python eval.py " in done.err
    weights = torch.load(tmp_path / "checkpoint/folder/fcn/1shot-2way/max_acc.pth", weights_only=True)["params"]
    assert list(weights) == [f"encoder.{key}" for key in ResNet12().state_dict()]


def test_sync_bn_needs_processes_on_gpus(data, tmp_path):
    done = run("train_pretrain.py", *data, *SMALL, "-sync_bn", cwd=tmp_path)
    assert (done.status, "-sync_bn requires several processes on GPUs" in done.err) == (1, True)


def test_divergence_says_so(data, tmp_path):
    flags = ["-max_epoch", 1, "-num_episode", 1, "-bs", 200, "-lr", "1e6", "-way", 2, "-backbone", "resnet12"]
    done = run("train_pretrain.py", *data, *SMALL, *flags, cwd=tmp_path)
    assert done.status == 1
    last = done.err.splitlines()[-1]
    assert re.search(r"diverged.*skipped since epoch 1, batch \d+. Lower -lr", last), done.err


# --- benchmarks/gpu.sh and gpu.py ---


def test_what_a_gpu_is_worth_is_measured_once(tmp_path, monkeypatch):
    """A case that fails is a row with the error, and is measured by the next call."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    real, calls = gpu.emd, []

    def emd(*problem, solver):
        calls.append((len(problem[1][0]), solver))
        if solver == "opencv" and len(calls) < 7:
            raise RuntimeError("no such\nlibrary")
        return real(*problem, solver=solver)

    monkeypatch.setattr(gpu, "emd", emd)
    flags = ["-gpu", "cpu", "-quick", "-out", "out"]
    done = run("gpu.py", "solver", *flags, cwd=tmp_path)
    assert (done.status, "error: of part solver, 2 failed: 9 20 opencv (cpu), 25 20" in done.err) == (1, True)
    assert (
        "| 9 | 20 | opencv (cpu) |  | RuntimeError: no such library |"
        in run("gpu.py", "table", *flags, cwd=tmp_path).out
    )
    calls.clear()
    monkeypatch.setattr(gpu, "emd", lambda *problem, solver: calls.append(solver) or real(*problem, solver=solver))
    succeed("gpu.py", "solver", *flags, cwd=tmp_path)
    assert set(calls) == {"opencv"}
    table = succeed("gpu.py", "table", *flags, cwd=tmp_path)
    assert "error" not in table
    assert table.count("| 20 | opencv (cpu) |") == 3
    done = run("gpu.py", "solver", cwd=tmp_path)
    assert (done.status, "finds no CUDA device" in done.err) == (1, True)


def test_the_steps_of_gpu_sh_are_done_in_parts(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\ncase "$*" in *"$FAILS") exit 3 ;; esac\n')
    python.chmod(0o755)

    def call(*flags: str, **settings: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        (tmp_path / "calls").write_text("")
        environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), "FAILS": "-", **settings}
        command = ["bash", str(ROOT / "benchmarks/gpu.sh"), *flags]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return done, [line.split()[-1] for line in (tmp_path / "calls").read_text().splitlines()]

    steps = ["tests/test_cuda.py", "solver", "encoder", "episodes", "fit"]
    done, calls = call(LIMIT="20")
    assert (done.returncode, calls) == (0, ["device", steps[0], "table"])
    assert done.stdout.endswith("run the same command again. Left: solver encoder episodes fit\n")
    done, calls = call(FAILS="episodes")
    assert (done.returncode, calls) == (1, ["device", *steps[1:], "table"])
    assert "Failed: episodes." in done.stdout
    done, calls = call()
    assert (done.returncode, calls) == (0, ["device", "episodes", "table"])
    done, calls = call(FAILS="device")
    assert (done.returncode, calls) == (3, ["device"])
    done, calls = call("-h")
    assert (done.returncode, calls, "-data_dir DIR" in done.stdout) == (0, [], True)
    assert call("-quack")[0].returncode == 2


# --- in a process of its own ---


def start(*words: object, cwd: Path, **settings: object) -> subprocess.Popen:
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


def test_a_closed_pipe_is_quiet(bad_place):
    process = start(ROOT / "eval.py", *GOOD, "-test_episode", 1, cwd=bad_place)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(60) == 141


def test_ctrl_c_while_importing_is_quiet(bad_place):
    process = start("-X", "importtime", ROOT / "eval.py", *GOOD, cwd=bad_place)
    for line in process.stderr:
        if " numpy" in line:  # in the middle of importing torch
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert "Traceback" not in rest
    assert "interrupted" not in rest  # that is said once the script runs
    assert process.wait(60) == -signal.SIGINT


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
@pytest.mark.parametrize("script", ["train_pretrain.py", "train_meta.py", "eval.py", "predict.py", "visualize.py"])
def test_an_ignored_interrupt_stays_ignored(monkeypatch, capsys, script, handler):
    """As in a background job, whose terminal sends Ctrl-C to what runs in front."""
    monkeypatch.setattr(sys, "argv", [script, "-h"])
    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_full_disk_is_one_line_and_costs_nothing(data, tmp_path, monkeypatch):
    weights = tmp_path / "checkpoint/pre_train/glyphs/256-0.0100-30-0.20-conv4/max_acc.pth"
    flags = [*data, *SMALL, "-max_epoch", 1, "-num_episode", 1, "-bs", 256, "-lr", 0.01, "-way", 2]
    succeed("train_pretrain.py", *flags, cwd=tmp_path)
    before = weights.read_bytes()
    monkeypatch.setattr(engine.run.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    done = run("train_pretrain.py", *flags, cwd=tmp_path)
    assert done.status == 1
    assert re.search(r"error: the run needs 2 MB of free space in .*; there are 1$", done.err.strip())
    assert weights.read_bytes() == before
    assert not (weights.parent / "previous-1").exists()
