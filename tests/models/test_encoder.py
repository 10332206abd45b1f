"""Encoders: the contract that each backbone must keep, and ways to run one that must not change what it computes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import formula_weights, normal_images, relative
from torch import nn
from torch.nn import functional as F

from Models import Classifier, DeepEMD, ResNet12
from Models.backbones import BACKBONES, make_encoder, plan_backbone
from Models.encoder import Encoder

# One network for each row of the table.
MODELS = {"timm": "timm:test_vit"}
NAMES = [MODELS.get(name, name) for name in BACKBONES]
IMAGES = normal_images(4, 4, 3, 32, 32)
# Relative errors: float32 sums in another order, and eight bits.
ROUNDING = {"off": 1e-4, "bfloat16": 3e-2}


def make(name: str, size: int = 32, **settings) -> Encoder:
    """A backbone with weights, statistics of batch norm among them, that do not depend on the settings."""
    torch.manual_seed(3)
    encoder = make_encoder(name, image_size=size, weights="none", **settings)
    with torch.no_grad():
        for key, value in encoder.named_buffers():
            if key.endswith("running_mean"):
                value.copy_(0.1 * torch.randn(value.shape))
            elif key.endswith("running_var"):
                value.copy_(torch.rand(value.shape) + 0.5)
    return encoder


def state_of(encoder: Encoder) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in encoder.state_dict().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


def train_twice(encoder: Encoder) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """Maps and gradients of two passes in training, and the numbers that were kept for the backward passes."""
    outs, kept = [], []
    for images in (IMAGES, 2 * IMAGES):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            out = encoder(images)
        out.square().mean().backward()
        outs.append(out.detach())
    return outs, [parameter.grad for parameter in encoder.parameters()], sum(kept)


# --- every backbone ---


@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_keeps_the_contract(name):
    for size in (32, 96):
        encoder, plan = make(name, size).eval(), plan_backbone(name, image_size=size)
        with torch.no_grad():
            out = encoder(normal_images(1, 2, 3, size, size))
        assert out.shape == (2, encoder.out_channels, plan.edge, plan.edge)
        assert plan.edge == size // encoder.stride
        assert out.dtype == torch.float32
    encoder = make(name).eval()
    with torch.no_grad():
        together = encoder(IMAGES)
        assert relative(together[1:2], encoder(IMAGES[1:2])) < 1e-5  # images do not influence each other
        encoder = make(name, encoder.stride).eval()
        smallest = normal_images(1, 1, 3, encoder.stride, encoder.stride)
        assert encoder(smallest).isfinite().all()
        with pytest.raises(ValueError, match=f"images must have the shape .*{encoder.stride}"):
            encoder(smallest[..., 1:])


@pytest.mark.parametrize("name", NAMES)
def test_records_know_a_backbone_by_its_weights(name):
    encoder = make(name)
    identity = encoder.identity()
    assert identity == make(name).identity()
    assert identity["backbone"] == encoder.name
    with torch.no_grad():
        next(encoder.parameters()).view(-1)[0] += 1
    changed = {key for key, value in encoder.identity().items() if value != identity[key]}
    assert changed == {"weights"}


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_normalised_with_the_statistics_of_the_encoder(name):
    encoder = make(name, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)).eval()
    mean, std = encoder.mean, encoder.std
    assert (mean == (0.4, 0.5, 0.6)) == (name not in MODELS.values())  # a model of timm has its own
    pixels = torch.randint(256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    normal = torch.stack([(pixels[:, k] / 255 - mean[k]) / std[k] for k in range(3)], dim=1)
    with torch.no_grad():
        assert relative(encoder(pixels), encoder(normal)) < 1e-5
        assert relative(encoder.folded()(pixels), encoder(normal)) < 1e-4


@pytest.mark.parametrize("amp", ["off", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_folded_equals_the_encoder_in_evaluation(name, amp):
    encoder = make(name, amp=amp).train()
    before = state_of(encoder)
    folded = encoder.folded()
    assert (encoder.training, folded.training) == (True, False)
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert equal(encoder.state_dict(), before)
    with torch.no_grad():
        found = folded(IMAGES)
        assert found.dtype == torch.float32
        assert relative(found, make(name).eval()(IMAGES)) < ROUNDING[amp]


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_activations_change_nothing(name):
    """Maps, gradients, and running statistics, also those of a second step; fewer numbers are kept."""
    encoders = [make(name, checkpoint_activations=keep_less).train() for keep_less in (False, True)]
    (outs, gradients, kept), (outs2, gradients2, kept2) = map(train_twice, encoders)
    assert all(map(torch.equal, outs, outs2))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(gradients, gradients2, strict=True))
    assert equal(encoders[0].state_dict(), encoders[1].state_dict())
    momenta = [[m.momentum for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)] for encoder in encoders]
    assert momenta[0] == momenta[1]
    assert kept2 < kept / 5


def convolution_dtypes(network: nn.Module) -> set[torch.dtype]:
    """The number formats that come out of the convolutions while the network runs."""
    found = set()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, out: found.add(out.dtype))
    return found


@pytest.mark.parametrize("way_in", ["model", "classifier", "folded", "from a thread"])
@pytest.mark.parametrize("name", NAMES)
def test_amp_reaches_every_convolution(name, way_in):
    """In pre-training, in meta-training, in evaluation, and in a thread of its own, as DataParallel runs a replica."""
    model = DeepEMD(encoder=make(name, amp="bfloat16")).train()
    network = {"classifier": Classifier(model.encoder, 4), "folded": model.folded()}.get(way_in, model)
    found = convolution_dtypes(network)
    if way_in == "from a thread":
        with ThreadPoolExecutor(1) as pool:
            out = pool.submit(model.encode, IMAGES).result()
    else:
        out = network(IMAGES) if way_in == "classifier" else network.encode(IMAGES)
    assert out.dtype == torch.float32
    assert found == {torch.bfloat16}


@pytest.mark.parametrize("amp", ROUNDING)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_eager(monkeypatch, name, amp):
    """By the backend that runs the traced graph as it is; the trace is what may fail."""
    real, wrapped = nn.Module.compile, []

    def compile_eagerly(self):
        wrapped.append(type(self).__name__)
        real(self, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    results = []
    for compiled in (True, False):
        model = DeepEMD(encoder=make(name, amp=amp), compiled=compiled).train()
        nodes = model.encode(IMAGES)
        nodes.square().mean().backward()
        gradient = next(model.encoder.parameters()).grad
        with torch.no_grad():
            folded = model.folded().encode(IMAGES)
        results.append((nodes.detach(), gradient, folded, list(model.state_dict())))
        if compiled:
            with pytest.raises(ValueError, match="images must have the shape"):
                model.encoder(IMAGES[:, :2])
    for found, expected in zip(*(result[:3] for result in results), strict=True):
        assert relative(found, expected) < ROUNDING[amp]
    assert results[0][3] == results[1][3]  # no other key names
    assert wrapped == [type(model.encoder).__name__] * 2


# --- ResNet-12 ---


def test_resnet_folds_every_batch_norm():
    folded = ResNet12().folded()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert all(
        m.weight.is_contiguous(memory_format=torch.channels_last) for m in folded.modules() if hasattr(m, "weight")
    )


def test_amp_trains_the_encoder_in_channels_last_and_leaves_the_head_alone():
    """The layout of tensor cores, from the first convolution to the last."""
    model, layouts = DeepEMD(amp="bfloat16", solver="simplex").train(), []
    formula_weights(model.encoder, 3)
    for module in model.encoder.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            module.register_forward_hook(
                lambda _, inputs, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    logits = model(normal_images(5, 6, 3, 32, 32), way=2, shot=1)
    assert logits.dtype == torch.float32
    assert layouts == [True] * 16
    F.cross_entropy(logits, torch.tensor([0, 1, 0, 1])).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_an_encoder_defines_its_maps():
    with pytest.raises(TypeError, match="abstract"):
        Encoder()
