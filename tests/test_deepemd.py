"""The head and the network around it."""

import pytest
import torch
from helpers import formula_weights
from torch.nn import functional as F

from Models import DeepEMD
from Models.deepemd import cosine_similarity_map, cross_reference_weights, emd_logits
from Models.emd import emd


def nodes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> DeepEMD:
    network = DeepEMD().eval()
    formula_weights(network.encoder, 1)
    return network


def test_weights_by_hand():
    left, right = nodes(2, 8, 3), nodes(4, 8, 5, seed=1)
    found = cross_reference_weights(left, right)
    assert found.shape == (2, 4, 3)
    expected = F.relu(left[1, :, 2] @ right[3].mean(1)) + 1e-3
    torch.testing.assert_close(found[1, 3, 2], expected)
    assert found.min() >= 1e-3


def test_similarity_by_hand():
    query, proto = nodes(2, 8, 3), nodes(4, 8, 5, seed=1)
    found = cosine_similarity_map(query, proto)
    assert found.shape == (2, 4, 3, 5)
    q, p = query[1, :, 2], proto[3, :, 4]
    torch.testing.assert_close(found[1, 3, 2, 4], F.cosine_similarity(q - q.mean(), p - p.mean(), dim=0))
    plain = cosine_similarity_map(query, proto, norm="none")
    torch.testing.assert_close(plain[1, 3, 2, 4], F.cosine_similarity(q, p, dim=0))


def test_logits_by_hand():
    query, proto = nodes(2, 8, 3), nodes(2, 8, 5, seed=1)
    weights = cross_reference_weights(query, proto)[0, 1], cross_reference_weights(proto, query)[1, 0]
    similarity = cosine_similarity_map(query, proto)[0, 1]
    flow = emd(1 - similarity, *(3 * w / w.sum() for w in weights)).flow
    expected = 7.0 / 3 * (flow * similarity).sum()
    torch.testing.assert_close(emd_logits(proto, query, temperature=7.0)[0, 1], expected, atol=1e-5, rtol=1e-5)


def test_an_image_is_most_like_itself():
    proto = nodes(4, 16, 6)
    assert emd_logits(proto, proto).argmax(1).tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(emd_logits(proto, proto).diag(), torch.full((4,), 12.5), atol=1e-3, rtol=0)


def test_episodes_do_not_influence_each_other():
    proto, query = nodes(3, 5, 16, 4), nodes(3, 7, 16, 4, seed=1)
    together = emd_logits(proto, query)
    assert together.shape == (3, 7, 5)
    for episode in range(3):
        torch.testing.assert_close(emd_logits(proto[episode], query[episode]), together[episode])


def test_bad_head_arguments():
    with pytest.raises(ValueError, match="expected proto"):
        emd_logits(nodes(5, 16, 4), nodes(7, 15, 4))
    with pytest.raises(ValueError, match="expected proto"):
        emd_logits(nodes(2, 5, 16, 4), nodes(7, 16, 4))
    with pytest.raises(ValueError, match="metric to be one of cosine"):
        emd_logits(nodes(5, 16, 4), nodes(7, 16, 4), metric="dot")
    with pytest.raises(ValueError, match="norm to be one of center, none"):
        emd_logits(nodes(5, 16, 4), nodes(7, 16, 4), norm="whiten")
    with pytest.raises(ValueError, match="solver to be one of"):
        DeepEMD(solver="none").match(nodes(5, 16, 4), nodes(5, 16, 4), way=5, shot=1)


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


def test_data_parallel_cuts_add_up(model, monkeypatch):
    """The way the work is cut and put together again, with a DataParallel that needs no GPU."""

    def on_cpu(module, inputs, device_ids):
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        cuts = zip(*(tensor.chunk(len(device_ids)) for tensor in inputs), strict=False)
        return torch.cat([module(*cut) for cut in cuts])

    monkeypatch.setattr("Models.deepemd.data_parallel", on_cpu)
    images = nodes(2 + 5, 3, 32, 32)
    with torch.no_grad():
        expected = model(images[:7], way=2, shot=1)
        for count in (2, 3, 4):  # 5 queries over 4 devices are cut in 2, 2, 1: fewer cuts than devices
            spread = DeepEMD(device_ids=range(count)).eval()
            spread.load_state_dict(model.state_dict())
            torch.testing.assert_close(spread(images[:7], way=2, shot=1), expected, atol=1e-4, rtol=1e-4)
