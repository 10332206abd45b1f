"""The network around the head."""

import pytest
import torch
from helpers import formula_weights
from torch.nn import functional as F

from Models import DeepEMD
from Models.emd import SOLVERS


def nodes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> DeepEMD:
    network = DeepEMD().eval()
    formula_weights(network.encoder, 1)
    return network


@torch.no_grad()
def test_encode_whole_images_pyramid_and_patches(model):
    images = nodes(2, 3, 48, 48)
    maps = model.encoder(images)  # (2, 640, 3, 3)
    assert torch.equal(model.encode(images), maps.flatten(2))

    pyramid = DeepEMD(feature_pyramid=(2, 1)).eval()
    pyramid.load_state_dict(model.state_dict())
    found = pyramid.encode(images)
    expected = [F.adaptive_avg_pool2d(maps, 2).flatten(2), maps.mean((2, 3)).unsqueeze(2), maps.flatten(2)]
    torch.testing.assert_close(found, torch.cat(expected, dim=2))

    patches = nodes(2, 3, 3, 32, 32)
    found = pyramid.encode(patches)
    assert found.shape == (2, 640, 3)
    torch.testing.assert_close(found[1, :, 2], model.encoder(patches[1, 2:3]).mean((2, 3))[0], atol=1e-5, rtol=1e-4)


def test_forward_is_pure(model):
    images = nodes(6, 3, 32, 32)
    copy = images.clone()
    with torch.no_grad():
        first = model(images, way=2, shot=1)
        assert torch.equal(first, model(images, way=2, shot=1))
    assert torch.equal(images, copy)
    assert first.shape == (4, 2)


def test_k_shot_forward_and_its_gradient(model):
    settings = {"sfc_update_step": 2, "sfc_bs": 3}
    network = DeepEMD(**settings).train()
    network.load_state_dict(model.state_dict())
    images = nodes(2 * 2 + 4, 3, 32, 32)
    logits = network(images, way=2, shot=2, generator=torch.Generator().manual_seed(0))
    again = network(images, way=2, shot=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits, again)
    F.cross_entropy(logits, torch.tensor([0, 1, 0, 1])).backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    assert network.encoder.layer1[0].conv1.weight.grad.norm() > 0


def pretend_data_parallel(monkeypatch) -> list[str]:
    """A DataParallel that needs no GPU; returns the names of the modules it is given."""
    used = []

    def on_cpu(module, inputs, device_ids):
        used.append(type(module).__name__)
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        cuts = zip(*(tensor.chunk(len(device_ids)) for tensor in inputs), strict=False)
        return torch.cat([module(*cut) for cut in cuts])

    monkeypatch.setattr("Models.deepemd.data_parallel", on_cpu)
    return used


@pytest.mark.parametrize("solver", ["opencv", "ipm"])
def test_data_parallel_cuts_add_up(model, monkeypatch, solver):
    used = pretend_data_parallel(monkeypatch)
    images = nodes(2 + 5, 3, 32, 32)
    with torch.no_grad():
        expected = model(images[:7], way=2, shot=1, solver=solver)
        for count in (2, 3, 4):  # 5 queries over 4 devices are cut in 2, 2, 1: fewer cuts than devices
            spread = DeepEMD(device_ids=range(count), solver=solver).eval()
            spread.load_state_dict(model.state_dict())
            torch.testing.assert_close(spread(images[:7], way=2, shot=1), expected, atol=1e-4, rtol=1e-4)
    # A solver on the CPU gains nothing from copies of the head on several GPUs.
    assert used == (["ResNet12"] * 3 if SOLVERS[solver].device == "cpu" else ["ResNet12", "_Head"] * 3)


def test_heads_without_a_solver_stay_on_one_device(model, monkeypatch):
    used = pretend_data_parallel(monkeypatch)
    spread = DeepEMD(device_ids=range(2), solver="ipm", head="cosine").eval()
    with torch.no_grad():
        spread(nodes(7, 3, 32, 32), way=2, shot=1)
    assert used == ["ResNet12"]


def test_settings_that_do_not_go_together():
    with pytest.raises(ValueError, match="solver to be one of"):
        DeepEMD(solver="none").match(nodes(5, 16, 4), nodes(5, 16, 4), way=5, shot=1)
    with pytest.raises(ValueError, match="compiled and checkpoint_activations"):
        DeepEMD(compiled=True, checkpoint_activations=True)
    with pytest.raises(ValueError, match="compiled and 2 devices"):
        DeepEMD(compiled=True, device_ids=[0, 1])
