"""Ways to run the encoder that must not change what it computes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import formula_weights, normal_images, relative
from torch.nn import functional as F

from Models import Classifier, DeepEMD, ResNet12
from Models.encoder import Encoder


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


def convolution_dtypes(network: torch.nn.Module) -> set[torch.dtype]:
    """The number formats that come out of the convolutions while the network runs."""
    found = set()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, out: found.add(out.dtype))
    return found


@pytest.mark.parametrize("way_in", ["model", "classifier", "folded", "from a thread"])
def test_amp_reaches_every_convolution(way_in):
    """In pre-training, in meta-training, in evaluation, and in a thread of its own, as DataParallel runs a replica."""
    model = DeepEMD(amp="bfloat16").train()
    network = {"classifier": Classifier(model.encoder, 4), "folded": model.folded()}.get(way_in, model)
    found = convolution_dtypes(network)
    if way_in == "classifier":
        assert network(IMAGES).dtype == torch.float32
    elif way_in == "from a thread":
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(model.encode, IMAGES).result().dtype == torch.float32
    else:
        assert network.encode(IMAGES).dtype == torch.float32
    assert found == {torch.bfloat16}


def test_amp_trains_the_encoder_and_leaves_the_head_alone(encoder):
    model = DeepEMD(amp="bfloat16", solver="simplex").train()
    model.encoder.load_state_dict(encoder.state_dict())
    logits = model(normal_images(5, 6, 3, 32, 32), way=2, shot=1)
    assert logits.dtype == torch.float32
    F.cross_entropy(logits, torch.tensor([0, 1, 0, 1])).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="amp to be one of off, bfloat16, float16"):
        DeepEMD(amp="int8")


def test_amp_trains_in_channels_last():
    """The layout of tensor cores, from the first convolution to the last."""
    encoder, layouts = ResNet12(amp="bfloat16").train(), []
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            module.register_forward_hook(
                lambda _, inputs, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    encoder(IMAGES)
    assert len(layouts) == 16
    assert all(layouts)


@pytest.mark.parametrize("amp", ["off", "bfloat16"])
def test_compile_for_real(encoder, monkeypatch, amp):
    """By the backend that runs the traced graph as it is; the trace is what may fail."""
    real, wrapped = torch.nn.Module.compile, []

    def compile_eagerly(self):
        wrapped.append(type(self).__name__)
        real(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    results = []
    for compiled in (True, False):
        model = DeepEMD(compiled=compiled, amp=amp).train()
        model.encoder.load_state_dict(encoder.state_dict())
        nodes = model.encode(IMAGES)
        nodes.square().mean().backward()
        with torch.no_grad():
            folded = model.folded().encode(IMAGES)
        results.append((nodes.detach(), model.encoder.layer1[0].conv1.weight.grad, folded, list(model.state_dict())))
    for found, expected in zip(*(result[:3] for result in results), strict=True):
        assert relative(found, expected) < 1e-3 if amp == "off" else 3e-2
    assert results[0][3] == list(DeepEMD().state_dict())  # no other key names
    assert wrapped == ["ResNet12", "ResNet12"]


def test_what_is_asked_of_an_encoder():
    class Flat(Encoder):
        out_channels = 4

        def maps(self, images):
            return images.mean(1, keepdim=True).expand(-1, 4, -1, -1)

        def folded(self):
            return self

    assert Classifier(Flat(), 3)(IMAGES).shape == (4, 3)
    with pytest.raises(TypeError, match="abstract"):
        Encoder()
