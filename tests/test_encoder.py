"""Ways to run the encoder that must not change what it computes."""

import pytest
import torch
from helpers import formula_weights, normal_images, relative
from torch.nn import functional as F

from Models import DeepEMD, ResNet12


@pytest.fixture(scope="module")
def encoder() -> ResNet12:
    network = ResNet12()
    formula_weights(network, 3)
    return network


IMAGES = normal_images(4, 4, 3, 32, 32)


def test_folded_is_the_same_in_evaluation(encoder):
    folded = encoder.folded()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        assert relative(folded(IMAGES), encoder.eval()(IMAGES)) < 1e-5
    assert len(encoder.state_dict()) == 96  # the original is untouched


@pytest.mark.parametrize("settings", [{}, {"feature_pyramid": (1,)}, {"amp": "bfloat16"}])
def test_folded_model(encoder, settings):
    model = DeepEMD(**settings).train()
    model.encoder.load_state_dict(encoder.state_dict())
    folded = model.folded()
    assert model.training
    assert not folded.training
    with torch.no_grad():
        tolerance = 3e-2 if "amp" in settings else 1e-5  # bfloat16 has eight bits
        found = folded.encode(IMAGES)
        assert found.dtype == torch.float32
        plain = DeepEMD(feature_pyramid=settings.get("feature_pyramid")).eval()
        plain.encoder.load_state_dict(encoder.state_dict())
        assert relative(found, plain.encode(IMAGES)) < tolerance


def test_checkpointed_activations_change_nothing(encoder):
    results = []
    for keep_less in (False, True):
        network = ResNet12(checkpoint_activations=keep_less).train()
        network.load_state_dict(encoder.state_dict())
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            out = network(IMAGES)
        out.square().mean().backward()
        results.append((out.detach(), [p.grad for p in network.parameters()], network.state_dict(), sum(saved)))
    (out, gradients, state, kept), (out2, gradients2, state2, kept2) = results
    assert torch.equal(out, out2)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(gradients, gradients2, strict=True))
    assert all(torch.equal(state[key], state2[key]) for key in state)  # running statistics are counted once
    assert kept2 < kept / 5


def test_amp_trains_the_encoder_and_leaves_the_head_alone(encoder):
    model = DeepEMD(amp="bfloat16", solver="simplex").train()
    model.encoder.load_state_dict(encoder.state_dict())
    logits = model(normal_images(5, 6, 3, 32, 32), way=2, shot=1)
    assert logits.dtype == torch.float32
    F.cross_entropy(logits, torch.tensor([0, 1, 0, 1])).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="amp to be one of off, bfloat16, float16"):
        DeepEMD(amp="int8")


def test_compile_wraps_the_encoder_and_no_key_name(monkeypatch):
    wrapped = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: wrapped.append(self))
    model = DeepEMD(compiled=True)
    folded = model.folded()
    assert wrapped == [model.encoder, folded.encoder]
    assert list(model.state_dict()) == list(DeepEMD().state_dict())
