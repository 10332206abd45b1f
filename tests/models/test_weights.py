"""Checkpoints: what loads, what is refused, and that nothing in them is executed."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from Models import DeepEMD, ResNet12
from Models.weights import load_encoder_weights
from utils import InputError

BIAS, WEIGHT, VARIANCE = "norm.bias", "conv.weight", "norm.running_var"


class Tiny(nn.Module):
    """An encoder whose checkpoints are written quickly."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, kernel_size=1, bias=False), nn.BatchNorm2d(4)


def moved(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict that differs from the encoder's own everywhere."""
    return {key: value + 0.5 if value.is_floating_point() else value + 7 for key, value in encoder.state_dict().items()}


@pytest.fixture
def model() -> nn.Module:
    return Tiny()


@pytest.fixture
def state(model) -> dict[str, torch.Tensor]:
    return moved(model)


def save(path: Path, params: object) -> Path:
    torch.save({"params": params}, path)
    return path


def refusal(model: nn.Module, path: Path, *, hint: str = "") -> str:
    """The message with which a checkpoint is refused: one line, and the model is unchanged."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_encoder_weights(model, path, hint=hint)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return str(error.value)


@pytest.mark.parametrize("prefix", ["", "encoder.", "module.encoder.", "module.", "encoder.module."])
def test_published_formats_load(tmp_path, prefix):
    model, encoder = DeepEMD(feature_pyramid=(2, 1)), ResNet12()
    state = moved(encoder)
    path = save(tmp_path / "max_acc.pth", OrderedDict((prefix + key, value) for key, value in state.items()))
    load_encoder_weights(model, tmp_path)
    assert all(torch.equal(value, state[key]) for key, value in model.encoder.state_dict().items())
    load_encoder_weights(encoder, path)
    assert torch.equal(encoder.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])


def test_counters_may_be_absent_and_a_classifier_present(tmp_path, model, state):
    params = {key: value for key, value in state.items() if "num_batches_tracked" not in key}
    load_encoder_weights(model, save(tmp_path / "a.pth", {**params, "fc.weight": torch.zeros(3), "fc.bias": None}))
    assert torch.equal(model.conv.weight, state[WEIGHT])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(tmp_path, model, state, dtype):
    """Also where the counters were converted, which may then be infinite; the model keeps its own."""
    params = {key: value.to(dtype) for key, value in state.items()}
    params["norm.num_batches_tracked"] = torch.tensor(float("inf"), dtype=dtype)
    load_encoder_weights(model, save(tmp_path / "a.pth", params))
    for key, value in model.state_dict().items():
        assert value.dtype == state[key].dtype
        if value.is_floating_point():
            assert torch.equal(value, state[key].to(dtype).float())


def change(state: dict, key: str, value: object) -> dict:
    return {**state, key: value}


def filled(state: dict, key: str, value: float, dtype: torch.dtype = torch.float32) -> dict:
    """One entry of one tensor replaced."""
    tensor = state[key].to(dtype, copy=True)
    tensor.view(-1)[3] = value
    return {**state, key: tensor}


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if "norm" not in k}, "of Tiny: it lacks norm.weight, norm.bias, norm"),
        (lambda s: change(s, "layer5.weight", torch.zeros(1)), "it has unknown layer5.weight"),
        (lambda s: change(s, "a\nb" * 99, torch.zeros(1)), "it has unknown a?ba?b"),
        (lambda s: change(s, WEIGHT, torch.zeros(8, 3, 1, 1)), f"{WEIGHT} is (8, 3, 1, 1), not (4, 3, 1, 1)"),
        (lambda s: filled(s, WEIGHT, float("nan")), f"{WEIGHT} has NaN or infinite"),
        (lambda s: filled(s, BIAS, float("inf")), f"{BIAS} has NaN or infinite"),
        (lambda s: filled(s, BIAS, 1e39, torch.float64), f"{BIAS} has NaN or infinite"),
        (lambda s: filled(s, VARIANCE, -1.0), f"{VARIANCE} has negative"),
        (lambda s: change(s, 7, torch.zeros(1)), "it has unknown 7"),
        (lambda s: change(s, BIAS, "text"), f"{BIAS} is a str"),
        (lambda s: change(s, BIAS, {"weight": s[BIAS]}), f"{BIAS} is a dict with the keys weight"),
        (lambda s: change(s, BIAS, torch.zeros(4).to_sparse()), f"{BIAS} is a sparse, nested or empty tensor"),
        (
            lambda s: change(s, WEIGHT, torch.zeros(4, 3).to_sparse_csr()),
            f"{WEIGHT} is a sparse, nested or empty tensor",
        ),
        (lambda s: change(s, BIAS, torch.zeros(4, device="meta")), f"{BIAS} is a sparse, nested or empty tensor"),
        (
            lambda s: change(s, BIAS, torch.nested.nested_tensor([torch.zeros(2)] * 2)),
            f"{BIAS} is a sparse, nested or empty tensor",
        ),
        (lambda s: change(s, BIAS, quantized(s[BIAS])), f"{BIAS} is a torch.qint8 tensor"),
        (lambda s: change(s, "module." + BIAS, s[BIAS]), f"two entries for {BIAS}, behind different prefixes"),
        (lambda s: {**s, "encoder.x": s[BIAS], "module.encoder.x": s[BIAS]}, "two entries for x, behind"),
        (lambda s: {"params": s}, "params is a dict with the keys conv.weight, "),
        (list, "it contains a dict with the keys params"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_no_training_leaves_are_refused(tmp_path, model, state, damage, message):
    assert message in refusal(model, save(tmp_path / "a.pth", damage(state)))


@pytest.mark.parametrize("key", [BIAS, WEIGHT, VARIANCE])
@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16),
        *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
    ],
)
def test_weights_are_floating_point(tmp_path, model, state, key, dtype):
    message = refusal(model, save(tmp_path / "a.pth", change(state, key, state[key].abs().to(dtype))))
    assert f"must be dense floating-point tensors; {key} is a {dtype} tensor" in message


def test_other_files_are_refused(tmp_path, model, state):
    whole = save(tmp_path / "whole.pth", state).read_bytes()
    for name, content in (("text", b"<html>quota exceeded</html>"), ("empty", b""), ("cut", whole[: len(whole) // 2])):
        (tmp_path / name).write_bytes(content)
        assert name in refusal(model, tmp_path / name)
    for content, message in ((state, "a dict with the keys conv.weight, "), ([state], "a list"), (None, "a NoneType")):
        torch.save(content, tmp_path / "bare.pth")
        assert f'bare.pth must contain {{"params": state_dict}}; it contains {message}' in refusal(
            model, tmp_path / "bare.pth"
        )
    missing = tmp_path / "none.pth"
    assert refusal(model, missing, hint="Train one.") == f"no checkpoint at {missing}. Train one."


class Malice:
    def __reduce__(self):
        return (os.mkdir, ("made-by-a-pickle",))


@pytest.mark.parametrize("write", [torch.save, lambda content, path: Path(path).write_bytes(pickle.dumps(content, 2))])
@pytest.mark.parametrize("wrap", [lambda bad, state: bad, lambda bad, state: {**state, BIAS: bad, "fc.weight": bad}])
def test_pickles_are_not_run(tmp_path, monkeypatch, model, state, write, wrap):
    monkeypatch.chdir(tmp_path)
    write({"params": wrap(Malice(), state)}, "a.pth")
    assert "which is refused" in refusal(model, Path("a.pth"))
    assert not os.path.exists("made-by-a-pickle")
