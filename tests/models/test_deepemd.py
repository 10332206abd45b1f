"""The network around the head."""

import pytest
import torch
from helpers import formula_weights
from torch.nn import functional as F

from Models import Classifier, DeepEMD, ResNet12
from Models.deepemd import _pool
from Models.emd import SOLVERS
from Models.encoder import Encoder
from Models.heads import HEADS, head_logits
from Models.sfc import fit_prototypes


def nodes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> DeepEMD:
    network = DeepEMD().eval()
    formula_weights(network.encoder, 1)
    return network


@torch.no_grad()
@pytest.mark.parametrize(("edge", "size"), [(5, 1), (5, 2), (5, 3), (5, 4), (5, 5), (7, 4), ((3, 6), 2)])
def test_pooling_is_that_of_torch_in_value_and_gradient(edge, size):
    maps = nodes(2, 4, *(edge if isinstance(edge, tuple) else (edge, edge))).double().requires_grad_()
    direction = nodes(2, 4, size, size, seed=1).double()
    with torch.enable_grad():
        found, expected = _pool(maps, size), F.adaptive_avg_pool2d(maps, size)
        gradients = [torch.autograd.grad((out * direction).sum(), maps)[0] for out in (found, expected)]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*gradients)


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


SHAPES = [(3, 32, 32), (32, 32), (2, 1, 32, 32), (2, 32, 32, 3), (2, 3, 8, 32), (1, 2, 2, 3, 32, 32), ()]


@pytest.fixture(scope="module")
def doors(model):
    """Where images enter."""
    spread = DeepEMD(encoder=model.encoder, device_ids=[0, 1]).eval()
    forward = lambda images: model(images, way=1, shot=1)  # noqa: E731
    return model.encode, model.folded().encode, spread.encode, forward, Classifier(model.encoder, 2), model.encoder


@pytest.mark.parametrize("shape", SHAPES)
def test_images_of_another_shape_are_refused(doors, shape):
    for door in doors:
        with pytest.raises(ValueError, match="images") as error:
            door(torch.zeros(shape))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.bool, torch.complex64])
def test_images_of_another_type_are_refused(doors, dtype):
    for door in doors:
        with pytest.raises(ValueError, match="must be 8-bit pixels .torch.uint8. or normalised floats"):
            door(torch.zeros(2, 3, 32, 32, dtype=dtype))


def test_numbers_of_images_that_make_no_episode_are_refused(model):
    with pytest.raises(ValueError, match="2 way 2 shot needs 4 support images and queries; got 3"):
        model(nodes(3, 3, 32, 32), way=2, shot=2)
    for shot in (1, 2):
        with pytest.raises(ValueError, match=f"5 way {shot} shot needs {5 * shot} support images; got 7"):
            model.match(nodes(7, 16, 4), nodes(3, 16, 4), way=5, shot=shot)


def test_settings_that_exclude_each_other_are_refused():
    for settings, message in (
        ({"solver": "none"}, "unknown solver 'none'"),
        ({"head": "dot"}, "unknown head 'dot'"),
        ({"kshot": "median"}, "unknown kshot 'median'; choose one of sfc, mean"),
        ({"amp": "int8"}, "unknown amp 'int8'; choose one of off, bfloat16, float16"),
        ({"mean": (0.5, 0.5)}, "mean and std must be three numbers each"),
        ({"std": (0.5, 0.5, 0.0)}, "std above 0"),
        ({"sfc_bs": 0}, "batch_size 1 or more"),
        ({"encoder": ResNet12(), "amp": "bfloat16"}, "amp: set this where the encoder is made"),
    ):
        with pytest.raises(ValueError, match=message):
            DeepEMD(**settings)
    with pytest.raises(ValueError, match="only the head deepemd has a flow; this model has the head knn"):
        DeepEMD(head="knn").matching(nodes(5, 16, 4), nodes(5, 16, 4))


def test_another_encoder_may_be_given():
    class Flat(Encoder):
        out_channels, stride = 4, 1

        def maps(self, images):
            return images.mean(1, keepdim=True) * torch.arange(1.0, 5.0).view(4, 1, 1)

        def folded(self):
            return self

    model = DeepEMD(encoder=Flat(), head="proto")
    assert model.encode(torch.zeros(2, 3, 4, 5, dtype=torch.uint8)).shape == (2, 4, 20)
    assert model.folded()(nodes(4, 3, 2, 2), way=2, shot=1).shape == (2, 2)
    assert Classifier(Flat(), 3)(nodes(4, 3, 2, 2)).shape == (4, 3)


# --- k-shot ---


@pytest.mark.parametrize("head", HEADS)
def test_mean_prototypes(head):
    support, query = nodes(2, 6, 16, 4).requires_grad_(), nodes(2, 7, 16, 4, seed=1)
    model = DeepEMD(head=head, kshot="mean", temperature=7.0)
    logits = model.match(support, query, way=3, shot=2)
    proto = torch.stack([support[:, [k, k + 3]].mean(1) for k in range(3)], dim=1)
    torch.testing.assert_close(logits, head_logits(proto, query, head=head, temperature=7.0))
    logits.square().sum().backward()
    assert support.grad.norm() > 0
    one = model.match(support[:, :3], query, way=3, shot=1)
    torch.testing.assert_close(one, head_logits(support[:, :3], query, head=head, temperature=7.0))


def test_prototypes_are_fitted_by_default():
    support, query = nodes(6, 16, 4), nodes(7, 16, 4, seed=1)
    fit = {"lr": 0.1, "steps": 2, "batch_size": 3, "weight_decay": 0.01}
    model = DeepEMD(head="knn", sfc_lr=0.1, sfc_update_step=2, sfc_bs=3, sfc_wd=0.01)
    found = model.match(support, query, way=3, shot=2, generator=torch.Generator().manual_seed(3))
    proto = fit_prototypes(support, way=3, shot=2, head="knn", generator=torch.Generator().manual_seed(3), **fit)
    assert torch.equal(found, head_logits(proto, query, head="knn"))


@pytest.mark.parametrize("solver", ["ipm", "ipm:l2_strength=0.5", "simplex:gradient=cost"])
def test_another_solver_also_fits_the_prototypes(solver):
    support, query = nodes(6, 16, 4), nodes(7, 16, 4, seed=1)
    settings = {"sfc_lr": 0.1, "sfc_update_step": 2, "l2_strength": 0.1}
    found, expected = (
        model.match(support, query, way=3, shot=2, generator=torch.Generator().manual_seed(3), **override)
        for model, override in (
            (DeepEMD(solver="opencv", **settings), {"solver": solver}),
            (DeepEMD(solver=solver, **settings), {}),
        )
    )
    assert torch.equal(found, expected)
    model = DeepEMD(solver="opencv", **settings)
    proto = model.prototypes(support, way=3, shot=2, solver=solver, generator=torch.Generator().manual_seed(3))
    assert torch.equal(head_logits(proto, query, model.settings.with_solver(solver, model.solver_options)), found)
