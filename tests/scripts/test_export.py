"""export.py, and what a package does in the scripts."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import yaml
from helpers import run, succeed, write_images
from safetensors.torch import load_file, save_file

import deepemd
import export
import train_meta
from Models import DeepEMD
from Models.conv4 import Conv4
from Models.weights import load_encoder_weights
from utils import InputError, file_hash

EVAL = ["-gpu", "cpu", "-query", 2, "-way", 2, "-num_workers", 0, "-test_episode", 4]
TRAINED = {"dataset": "folder", "backbone": "conv4", "deepemd": "fcn", "image_size": 32, "feature_pyramid": [1]}
TRAINED |= {"temperature": 5.0, "solver": "ipm", "lr": 0.1}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def exported(tmp_path_factory, folder) -> Path:
    """A folder with a run, the results of its evaluation, and the package of both."""
    cwd = tmp_path_factory.mktemp("exported")
    torch.manual_seed(1)
    encoder = Conv4()
    (cwd / "run").mkdir()
    weights = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    torch.save({"params": weights}, cwd / "run/max_acc.pth")
    record = {"script": "train_meta.py", "flags": TRAINED, "data": {"train": {"sha256": "abc"}}}
    (cwd / "run/run.json").write_text(json.dumps({**record, "versions": {"torch": "1.0"}}))
    for shot in (1, 2):
        flags = ["-data_dir", folder, *EVAL, "-shot", shot, "-sfc_update_step", 2, "-json", f"{shot}.json"]
        succeed("eval.py", "-model_dir", "run", *flags, cwd=cwd)
    given = ["-results", "1.json", "2.json", "1.json", "-license", "mit", "-data_dir", folder, "-gpu", "cpu"]
    succeed("export.py", "-model_dir", "run", "-out", "package", *given, cwd=cwd)
    return cwd


def test_a_package_says_what_it_is(exported):
    package, config = exported / "package", read(exported / "package/config.json")
    assert {path.name for path in package.iterdir()} == {"model.safetensors", "config.json", "README.md", "match.png"}
    assert (config["format"], config["backbone"], config["image_size"], config["license"]) == (1, "conv4", 32, "mit")
    taken = {"image_size": 32, "feature_pyramid": [1], "temperature": 5.0, "norm": "center"}
    assert config["flags"] == {**config["flags"], **taken}
    assert "lr" not in config["flags"]
    assert config["data"] == {"set": "folder", "fingerprint": {"train": {"sha256": "abc"}}}
    assert config["versions"] == {"torch": "1.0"}
    assert config["weights"]["sha256"] == file_hash(package / "model.safetensors")
    assert config["weights"]["checkpoint"] == file_hash(exported / "run/max_acc.pth")
    found = [(row["shot"], row["accuracy"], row["interval"], row["episodes"]) for row in config["results"]]
    measured = {k: read(exported / f"{k}.json") for k in (1, 2)}
    assert found == [(k, one["accuracy"], one["interval"], 4) for k, one in measured.items()]
    # Nothing of the author's machine.
    text = (package / "config.json").read_text() + (package / "README.md").read_text()
    assert str(exported) not in text
    assert "data_dir" not in text
    assert load_file(package / "model.safetensors").keys() == Conv4().state_dict().keys()


def test_the_card_is_one_of_the_hub(exported):
    _, head, body = (exported / "package/README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(head)
    assert (head["license"], head["pipeline_tag"]) == ("mit", "image-classification")
    (model,) = head["model-index"]
    accuracies = [round(read(exported / f"{shot}.json")["accuracy"], 2) for shot in (1, 2)]
    assert [result["metrics"][0]["value"] for result in model["results"]] == accuracies
    of_shots = [f"2-way {k}-shot, deepemd, 4 episodes -sfc_update_step 2 -query 2" for k in (1, 2)]
    assert [result["dataset"]["config"] for result in model["results"]] == of_shots
    assert f"| folder | test | 2-way 2-shot | deepemd | 4 | {accuracies[1]:.2f} ± " in body
    assert "-sfc_update_step 2 -query 2 |" in body
    assert "![" in body
    assert "(match.png)" in body


def test_a_package_evaluates_as_its_run(exported, folder):
    for shot in (1, 2):
        flags = ["-data_dir", folder, *EVAL, "-shot", shot, "-sfc_update_step", 2, "-json", "-"]
        done = run("eval.py", "-model_dir", "package", *flags, cwd=exported)
        found, before = json.loads(done.out), read(exported / f"{shot}.json")
        assert [found[name] for name in ("loss", "accuracies")] == [before[name] for name in ("loss", "accuracies")]
        assert "flags of the package (package/config.json): -dataset folder " in done.err
        assert found["weights"]["sha256"] == read(exported / "package/config.json")["weights"]["sha256"]


def test_a_package_brings_its_preprocessing(exported, folder, tmp_path):
    """Whatever data set it is evaluated on; a checkpoint is used with the statistics of that data set."""
    shutil.copytree(folder, tmp_path / "cifar_fs")
    for split in ("train", "val", "test"):
        (tmp_path / "cifar_fs" / split).rename(tmp_path / f"cifar_fs/meta-{split}")
    flags = ["-data_dir", tmp_path, "-dataset", "cifar_fs", *EVAL, "-json", "-"]
    done = {source: run("eval.py", "-model_dir", source, *flags, cwd=exported) for source in ("package", "run")}
    losses = {source: json.loads(one.out)["loss"] for source, one in done.items()}
    assert losses["package"] == read(exported / "1.json")["loss"] != losses["run"]
    said = "warning: -dataset cifar_fs differs from the package (package/config.json): -dataset folder"
    assert said in done["package"].err


def test_a_given_flag_wins_and_is_named(exported, folder):
    flags = ["-data_dir", folder, *EVAL, "-temperature", 3, "-json", "-"]
    done = run("eval.py", "-model_dir", "package", *flags, cwd=exported)
    assert json.loads(done.out)["flags"]["temperature"] == 3
    assert "warning: -temperature 3.0 differs from the package (package/config.json): -temperature 5.0" in done.err


def test_a_package_brings_its_statistics(exported, folder, tmp_path):
    """Those of -norm standard, so that no training images are needed where it is used."""
    given = ["-gpu", "cpu", "-norm", "standard", "-num_workers", 0]
    (tmp_path / "base").mkdir()
    (tmp_path / "base/train").symlink_to(folder / "train")
    flags = ["-data_dir", tmp_path / "base", *given]
    succeed("export.py", "-model_dir", "run", "-out", tmp_path / "package", *flags, cwd=exported)
    tensors = load_file(tmp_path / "package/model.safetensors")
    assert tensors["base_statistics.mean"].shape == tensors["base_statistics.deviation"].shape == (64,)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test").symlink_to(folder / "test")
    flags = [*EVAL, "-json", "-"]
    before = json.loads(succeed("eval.py", "-model_dir", "run", "-data_dir", folder, *given, *flags, cwd=exported))
    found = json.loads(succeed("eval.py", "-model_dir", "package", "-data_dir", "data", *flags, cwd=tmp_path))
    assert found["flags"]["norm"] == "standard"
    assert found["loss"] == before["loss"] != read(exported / "1.json")["loss"]


def test_half_precision_is_measured(exported, folder, tmp_path):
    flags = ["-data_dir", tmp_path, "-gpu", "cpu", "-half", "-results", "1.json"]
    out = succeed("export.py", "-model_dir", "run", "-out", "half", *flags, cwd=exported)
    tensors = load_file(exported / "half/model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float16, torch.int64}
    sizes = [(exported / name / "model.safetensors").stat().st_size for name in ("half", "package")]
    assert sizes[0] < 0.7 * sizes[1]
    change = read(exported / "half/config.json")["weights"]["logit_change"]
    assert 0 < change < 0.1
    note = f"logits change by at most {change:.2g}"
    assert note in out
    assert note in (exported / "half/README.md").read_text()
    # It can be used and exported again, and stays what it is.
    succeed("eval.py", "-model_dir", "half", "-data_dir", folder, *EVAL, "-json", "half.json", cwd=exported)
    again = ["-data_dir", tmp_path, "-results", "half.json"]
    succeed("export.py", "-model_dir", "half", "-out", "again", *again, cwd=exported)
    assert file_hash(exported / "again/model.safetensors") == file_hash(exported / "half/model.safetensors")
    assert read(exported / "again/config.json")["weights"]["logit_change"] == change


@pytest.mark.parametrize("view", [[], ["-deepemd", "grid", "-patch_list", "1,2", "-backbone", "conv4"]])
def test_the_graph_computes_the_nodes(exported, tmp_path, view):
    """Without the data set, on random images; for any number of images."""
    flags = ["-data_dir", tmp_path, "-onnx", *view]
    source = "package" if not view else "run/max_acc.pth"
    done = run("export.py", "-model_dir", source, "-out", tmp_path / "out", *flags, cwd=exported)
    assert done.status == 0, done.err
    assert "checked on random images, and no picture" in done.err
    assert not (tmp_path / "out/match.png").exists()
    model = DeepEMD(encoder=Conv4(), feature_pyramid=None if view else (1,))
    load_encoder_weights(model, tmp_path / "out")
    shape = (3, 5, 3, 32, 32) if view else (3, 3, 32, 32)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "out/encoder.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model.eval().encode(images).numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "-model_dir names what is exported"),
        (["-model_dir", "none"], "-model_dir names what is exported"),
        (["-model_dir", "nowhere"], "no checkpoint at nowhere"),
        (["-model_dir", "run", "-out", "run"], "-out run has other files than a package"),
        (["-model_dir", "run", "-out", "1.json"], "-out 1.json is a file"),
        (["-model_dir", "run", "-out", "1.json/x"], "cannot write 1.json/x (1.json is a file, not a folder)"),
        (["-model_dir", "run", "-license", "MIT"], "the Hub spells licences in lower case"),
        (["-backbone", "timm:test_vit", "-backbone_weights", "none"], "-model_dir names what is exported"),
        (["-model_dir", "run", "-results", "nowhere.json"], "cannot read the results of an evaluation from nowhere"),
        (["-model_dir", "run", "-results", "run/run.json"], "run/run.json is damaged, or not the results"),
        (["-model_dir", "run", "-results", "1.json", "other.json"], "other.json: it was measured with random weights"),
        (["-model_dir", "run", "-results", "third.json"], "third.json: it was measured with weights of SHA-256 0123"),
    ],
)
def test_a_failed_export_leaves_nothing(exported, flags, message):
    content = read(exported / "1.json")
    (exported / "other.json").write_text(json.dumps({**content, "weights": None}))
    (exported / "third.json").write_text(json.dumps({**content, "weights": {"sha256": "0123" * 16}}))
    before = sorted(exported.rglob("*"))
    done = run("export.py", *(["-out", "new"] if "-out" not in flags else []), *flags, cwd=exported)
    assert done.status in (1, 2)
    assert message in done.err.splitlines()[-1]
    assert sorted(exported.rglob("*")) == before


def test_a_failure_on_the_way_leaves_the_earlier_package(exported, tmp_path, monkeypatch):
    shutil.copytree(exported / "package", tmp_path / "package")
    (tmp_path / "package/.git").mkdir()
    (tmp_path / ".package.part").mkdir()  # of an export that was killed
    before = {path.name: path.read_bytes() for path in (tmp_path / "package").glob("[!.]*")}

    def fail(*_, **__):
        raise InputError("no room")

    flags = ["-model_dir", "package", "-out", "package", "-data_dir", "nowhere", "-half"]
    with monkeypatch.context() as patch:
        patch.setattr(export, "card", fail)
        done = run("export.py", *flags, cwd=tmp_path)
        assert (done.status, done.err.splitlines()[-1]) == (1, "error: no room")
    assert {path.name: path.read_bytes() for path in (tmp_path / "package").glob("[!.]*")} == before
    succeed("export.py", *flags, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["package"]
    assert (tmp_path / "package/.git").is_dir()
    assert read(tmp_path / "package/config.json")["weights"]["dtype"] == "float16"
    assert len(read(tmp_path / "package/config.json")["results"]) == 2  # those that the package had
    assert not (tmp_path / "package/match.png").exists()  # that of the earlier one


def test_a_network_of_timm_that_was_not_trained_here_is_packaged(tmp_path, folder):
    torch.manual_seed(3)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "w.safetensors")
    flags = {"backbone_weights": str(tmp_path / "w.safetensors"), "image_size": 64, "device": "cpu"}
    words = ["-backbone", "timm:test_resnet", "-backbone_weights", "w.safetensors", "-image_size", 64]
    succeed("export.py", *words, "-out", "package", "-data_dir", folder, "-dataset", "folder", cwd=tmp_path)
    images = sorted((folder / "test/class1").iterdir())
    expected = deepemd.load("timm:test_resnet", **flags).encode(images)
    assert torch.equal(deepemd.load(tmp_path / "package", device="cpu").encode(images), expected)
    assert "Trained on" not in (tmp_path / "package/README.md").read_text()


def test_other_scripts_take_a_package(exported, folder, tmp_path):
    write_images(tmp_path / "support/a", 2, seed=1)
    write_images(tmp_path / "support/b", 1, seed=2)
    flags = ["-model_dir", "package", "-gpu", "cpu", "-kshot", "mean", "-support", tmp_path / "support"]
    done = run("predict.py", *flags, "-query", tmp_path / "support/b", cwd=exported)
    assert "b/0000.png" in done.out, done.err
    for source in ("package", "run"):
        args = train_meta.build_parser().parse_args(["-pretrain_dir", str(exported / source)])
        assert train_meta.pretrained_weights(args).parent == exported / source


@pytest.mark.parametrize("damage", ["cut", "no config", "format", "flags"])
def test_a_broken_package_is_one_line(exported, tmp_path, folder, damage):
    package = tmp_path / "package"
    shutil.copytree(exported / "package", package)
    config = read(package / "config.json")
    if damage == "cut":
        with (package / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
    elif damage == "no config":
        (package / "config.json").unlink()
    else:
        change = {"format": 99} if damage == "format" else {"flags": {"image_size": "rm -rf"}}
        (package / "config.json").write_text(json.dumps({**config, **change}))
    flags = ["-data_dir", folder, "-dataset", "folder", "-backbone", "conv4", *EVAL]
    done = run("eval.py", "-model_dir", package, *flags, cwd=tmp_path)
    assert done.status == 1
    assert done.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.err
    assert str(package) in done.err.splitlines()[-1]
