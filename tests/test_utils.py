"""Checkpoints, devices, seeds, figures, the run folder."""

import argparse
import json
import os

import numpy as np
import pytest
import torch

from Models import DeepEMD, ResNet12
from utils import (
    InputError,
    RunFolder,
    choose_device,
    load_encoder_weights,
    mean_confidence_interval,
    named_generator,
    next_command,
    set_seed,
    whole_numbers,
)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return {key: value + 0.5 if value.is_floating_point() else value for key, value in ResNet12().state_dict().items()}


def save(path, params):
    torch.save({"params": params}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "encoder.", "module.encoder.", "module."])
@pytest.mark.parametrize("settings", [{}, {"feature_pyramid": (2, 1)}])
def test_published_formats(tmp_path, state, prefix, settings):
    path = save(tmp_path / "max_acc.pth", {prefix + key: value for key, value in state.items()})
    for source in (path, tmp_path):
        model = DeepEMD(**settings)
        load_encoder_weights(model, source)
        assert all(torch.equal(value, state[key]) for key, value in model.encoder.state_dict().items())
    encoder = ResNet12()
    load_encoder_weights(encoder, path)
    assert torch.equal(encoder.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])


def test_counters_may_be_absent_and_a_classifier_present(tmp_path, state):
    params = {key: value for key, value in state.items() if "num_batches_tracked" not in key}
    load_encoder_weights(DeepEMD(), save(tmp_path / "a.pth", {**params, "fc.weight": torch.zeros(3)}))


def drop(state):
    return {key: value for key, value in state.items() if not key.startswith("layer4.0.conv")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "lacks layer4.0.conv1.weight, layer4.0.conv2.weight, layer4.0.conv3.weight"),
        (lambda s: {**s, "layer5.0.conv1.weight": torch.zeros(1)}, "has unknown layer5.0.conv1.weight"),
        (lambda s: {**s, "layer1.0.conv1.weight": torch.zeros(32, 3, 3, 3)}, r"\(32, 3, 3, 3\) where \(64, 3, 3, 3\)"),
    ],
)
def test_another_architecture(tmp_path, state, change, message):
    with pytest.raises(InputError, match=message):
        load_encoder_weights(DeepEMD(), save(tmp_path / "a.pth", change(state)))


def test_what_is_no_checkpoint(tmp_path, state):
    with pytest.raises(InputError, match="no such file"):
        load_encoder_weights(DeepEMD(), tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("<html>quota exceeded</html>")
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        load_encoder_weights(DeepEMD(), tmp_path / "text.pth")
    torch.save(state, tmp_path / "bare.pth")
    with pytest.raises(InputError, match="got a dict with the keys layer1.0.conv1.weight"):
        load_encoder_weights(DeepEMD(), tmp_path / "bare.pth")


class Malice:
    def __reduce__(self):
        return (os.mkdir, ("made-by-a-pickle",))


def test_pickles_are_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"params": Malice()}, "a.pth")
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        load_encoder_weights(DeepEMD(), "a.pth")
    assert not os.path.exists("made-by-a-pickle")


def test_interval():
    values = [20.0, 40.0, 60.0, 80.0]
    mean, half_width = mean_confidence_interval(values)
    assert mean == 50
    assert half_width == pytest.approx(1.96 * np.std(values) / 2)
    with pytest.raises(ValueError, match="at least one"):
        mean_confidence_interval([])


def test_devices(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("cpu") == (torch.device("cpu"), [])
    assert capsys.readouterr().err == ""
    assert choose_device(None) == (torch.device("cpu"), [])
    assert capsys.readouterr().err.count("\n") == 1
    for gpu, message in (
        ("0", "there is no GPU 0.*here: none"),
        ("0;1", "expected GPU numbers"),
        ("-1", "expected GPU"),
    ):
        with pytest.raises(InputError, match=message):
            choose_device(gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert choose_device(None) == (torch.device("cuda", 0), [0, 1])
    assert choose_device("1") == (torch.device("cuda", 1), [1])
    with pytest.raises(InputError, match="there is no GPU 2; CUDA devices here: 0 to 1"):
        choose_device("0,2")


def test_seeds(capsys):
    assert set_seed(4) == 4
    first = torch.rand(1)
    set_seed(4)
    assert torch.equal(torch.rand(1), first)
    assert set_seed(0) > 0
    assert "seed: " in capsys.readouterr().out
    draws = [
        torch.rand(1, generator=named_generator(*name)).item() for name in ((1, "a"), (1, "b"), (2, "a"), (1, "a"))
    ]
    assert draws[0] == draws[3]
    assert len(set(draws)) == 3


def test_run_folder_keeps_what_was_there(tmp_path, capsys):
    for number in range(2):
        run = RunFolder(tmp_path / "run", argparse.Namespace(lr=0.1))
        run.save_weights("max_acc.pth", {"w": torch.full((1,), float(number))})
        run.log(f"line {number}")
        run.record(epoch=1, val_acc=50.0)
        run.finish(test_acc=51.0)
    assert torch.load(tmp_path / "run" / "previous-1" / "max_acc.pth", weights_only=True)["params"]["w"].item() == 0
    assert torch.load(tmp_path / "run" / "max_acc.pth", weights_only=True)["params"]["w"].item() == 1
    assert (tmp_path / "run" / "results.txt").read_text() == "line 1\n"
    assert json.loads((tmp_path / "run" / "trlog.json").read_text()) == {
        "args": {"lr": 0.1},
        "epochs": [{"epoch": 1, "val_acc": 50.0}],
        "test_acc": 51.0,
    }
    assert not list(tmp_path.rglob("*.part"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run", argparse.Namespace())


def test_next_command():
    parser = argparse.ArgumentParser()
    parser.add_argument("-way", type=int, default=5)
    parser.add_argument("-patch_list", type=whole_numbers, default=(2, 3))
    args = parser.parse_args(["-patch_list", "5,3,2"])
    found = next_command("eval.py", parser, args, ["way", "patch_list"], model_dir="a b/max_acc.pth")
    assert found == "python eval.py -patch_list 5,3,2 -model_dir 'a b/max_acc.pth'"
