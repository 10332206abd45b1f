"""The structured fully connected layer."""

import pytest
import torch
from torch.nn import functional as F

from Models.arguments import SCALED_SFC_LR
from Models.heads import HEADS, head_logits
from Models.matching import emd_logits
from Models.sfc import _orders, fit_prototypes, mean_prototypes
from Models.statistics import NodeStatistics
from utils import InputError

WAY, SHOT = 3, 2
SETTINGS = {"way": WAY, "shot": SHOT, "lr": 1.0, "steps": 3, "batch_size": 4}


def support(*leading: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*leading, WAY * SHOT, 16, 4, generator=torch.Generator().manual_seed(seed))


def test_no_step_gives_the_class_means():
    nodes = support()
    found = fit_prototypes(nodes, **{**SETTINGS, "steps": 0})
    torch.testing.assert_close(found[1], (nodes[1] + nodes[1 + WAY]) / 2)


def test_fitting_lowers_the_loss_and_detaches():
    nodes = support().requires_grad_()
    labels = torch.arange(WAY).repeat(SHOT)

    def loss(proto):
        return F.cross_entropy(emd_logits(proto, nodes), labels).item()

    found = fit_prototypes(nodes, generator=torch.Generator().manual_seed(0), **{**SETTINGS, "steps": 30})
    assert not found.requires_grad
    assert loss(found) < loss(fit_prototypes(nodes, **{**SETTINGS, "steps": 0}))


def test_works_without_gradients_around_it():
    with torch.no_grad():
        found = fit_prototypes(support(), generator=torch.Generator().manual_seed(0), **SETTINGS)
    assert torch.equal(found, fit_prototypes(support(), generator=torch.Generator().manual_seed(0), **SETTINGS))


def test_episodes_side_by_side_equal_one_after_the_other():
    nodes = support(2, 2)
    generator = torch.Generator().manual_seed(5)
    together = fit_prototypes(nodes, generator=generator, **SETTINGS)
    assert together.shape == (2, 2, WAY, 16, 4)
    generator = torch.Generator().manual_seed(5)
    for row in range(2):
        for column in range(2):
            alone = fit_prototypes(nodes[row, column], generator=generator, **SETTINGS)
            torch.testing.assert_close(together[row, column], alone, atol=1e-4, rtol=1e-4)


def test_permutations_replay_a_run():
    generator = torch.Generator().manual_seed(7)
    orders = torch.stack([torch.randperm(WAY * SHOT, generator=generator) for _ in range(3)])
    drawn = fit_prototypes(support(), generator=torch.Generator().manual_seed(7), **SETTINGS)
    assert torch.equal(fit_prototypes(support(), permutations=orders, **SETTINGS), drawn)


def test_weight_decay_shrinks():
    plain = fit_prototypes(support(), generator=torch.Generator().manual_seed(0), **SETTINGS)
    decayed = fit_prototypes(support(), generator=torch.Generator().manual_seed(0), weight_decay=0.1, **SETTINGS)
    assert decayed.norm() < plain.norm()


@pytest.mark.parametrize(
    ("nodes", "change", "message"),
    [
        (support()[:5], {}, "3 way 2 shot needs 6 support images; got 5"),
        (support(), {"batch_size": 0}, "batch_size 1 or more; got .*batch_size=0"),
        (support(), {"steps": -1}, "steps 0 or more.*steps=-1"),
        (support(), {"lr": 0.0}, "lr must be above 0"),
        (support(), {"lr": float("nan")}, "lr must be above 0"),
        (support(), {"weight_decay": -0.1}, "weight_decay and steps 0 or more"),
        (support(2), {"generator": [torch.Generator()]}, "shorter"),
    ],
)
def test_bad_input_is_refused(nodes, change, message):
    with pytest.raises(ValueError, match=message):
        fit_prototypes(nodes, **{**SETTINGS, **change})


def test_every_pass_has_an_order_of_its_own():
    """Two passes of two batches each by hand, in orders that differ."""
    episode, labels, lr = support(), torch.arange(WAY).repeat(SHOT), 0.5
    orders = torch.tensor([[0, 1, 2, 3, 4, 5], [5, 3, 1, 4, 2, 0]])
    proto, momentum = episode.unflatten(0, (SHOT, WAY)).mean(0), None
    for chosen in (part for order in orders for part in order.split(4)):
        leaf = proto.clone().requires_grad_()
        F.cross_entropy(emd_logits(leaf, episode[chosen]), labels[chosen]).backward()
        momentum = leaf.grad if momentum is None else 0.9 * momentum + 0.1 * leaf.grad
        proto = proto - lr * momentum
    settings = {**SETTINGS, "lr": lr, "steps": 2, "batch_size": 4}
    found = fit_prototypes(episode, permutations=orders, **settings)
    torch.testing.assert_close(found, proto, atol=1e-5, rtol=1e-4)
    drawn = _orders(None, 2, 20, 6, torch.Generator().manual_seed(0)).flatten(0, 1)
    assert (drawn.sort(-1).values == torch.arange(6)).all()
    assert len(drawn.unique(dim=0)) > 30


@pytest.mark.parametrize(
    "head",
    [{"solver": "opencv"}, {"solver": "ipm", "norm": "none"}, *({"head": head, "solver": "simplex"} for head in HEADS)],
)
def test_two_steps_by_hand(head):
    """SGD with momentum 0.9 and dampening 0.9 from the class means, on the mean cross entropy of each episode."""
    lr = 0.01 if head.get("head") == "proto" else 0.5
    nodes, labels, decay = support(2), torch.arange(WAY).repeat(SHOT), 0.1
    for number, episode in enumerate(nodes):
        proto, momentum = episode.unflatten(0, (SHOT, WAY)).mean(0), None
        for _ in range(2):
            leaf = proto.clone().requires_grad_()
            F.cross_entropy(head_logits(leaf, episode, **head), labels).backward()
            gradient = leaf.grad + decay * proto
            momentum = gradient if momentum is None else 0.9 * momentum + 0.1 * gradient
            proto = proto - lr * momentum
        settings = {**SETTINGS, "lr": lr, "steps": 2, "batch_size": WAY * SHOT, "weight_decay": decay}
        found = fit_prototypes(nodes, generator=torch.Generator().manual_seed(0), **settings, **head)
        torch.testing.assert_close(found[number], proto, atol=1e-5, rtol=1e-4)


def test_classes_with_different_numbers_of_images():
    """Given as labels, uniform classes are fitted as ever; others start from their own means."""
    support = torch.rand(6, 16, 4, generator=torch.Generator().manual_seed(0))
    settings = {"lr": 0.1, "steps": 10, "batch_size": 2, "solver": "simplex"}
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(k)) for k in range(10)])
    plain = fit_prototypes(support, way=3, shot=2, permutations=order, **settings)
    labelled = fit_prototypes(support, way=3, labels=torch.arange(6) % 3, permutations=order, **settings)
    assert torch.equal(plain, labelled)
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    means = fit_prototypes(support, way=3, labels=labels, **settings | {"steps": 0})
    assert torch.allclose(means, torch.stack([support[0], support[1:3].mean(0), support[3:].mean(0)]))
    fitted = fit_prototypes(support, way=3, labels=labels, weight_decay=0.1, **settings)
    assert torch.equal(fitted[0], support[0])  # the only image of its class
    assert all((fitted[k] - means[k]).abs().max() > 1e-3 for k in (1, 2))
    loss = [F.cross_entropy(emd_logits(proto, support, solver="simplex"), labels) for proto in (means, fitted)]
    assert loss[1] < loss[0]
    for wrong in (torch.tensor([0, 1, 1, 0, 0, 0]), torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2, 3, 2, 2])):
        with pytest.raises(ValueError, match="labels must be 6 numbers from 0 to 2"):
            fit_prototypes(support, way=3, labels=wrong, **settings)


# --- in the spaces of the norms base and standard ---

SCALES = torch.tensor([0.05, 1.0, 30.0, 1.0] * 4).view(16, 1)
OFFSET = torch.linspace(-3, 3, 16).view(16, 1)


def of_scales(*leading: int, seed: int = 0) -> torch.Tensor:
    """Support images whose channels have deviations from 0.05 to 30."""
    return (support(*leading, seed=seed) + OFFSET) * SCALES


def statistics() -> NodeStatistics:
    return NodeStatistics.of(of_scales(30, seed=5).flatten(0, 1))


@pytest.mark.parametrize("head", ["deepemd", "chamfer", "proto"])
@pytest.mark.parametrize("norm", ["base", "standard"])
def test_two_steps_by_hand_where_training_nodes_have_length_1(norm, head):
    known = statistics()
    mean, deviation = known.mean.view(16, 1), known.deviation.view(16, 1)
    unit = deviation * 4 if norm == "standard" else deviation.square().sum().sqrt()
    given = {"head": head, "norm": norm, "statistics": known}
    given |= {"solver": "simplex"} if head == "deepemd" else {}
    episode, labels, lr, decay = of_scales(), torch.arange(WAY).repeat(SHOT), 0.01, 0.1
    raw, momentum = episode.unflatten(0, (SHOT, WAY)).mean(0), None
    for _ in range(2):
        moved = ((raw - mean) / unit).requires_grad_()
        F.cross_entropy(head_logits(moved * unit + mean, episode, **given), labels).backward()
        gradient = moved.grad + decay * moved.detach()
        momentum = gradient if momentum is None else 0.9 * momentum + 0.1 * gradient
        raw = (moved.detach() - lr * momentum) * unit + mean
    settings = {**SETTINGS, "lr": lr, "steps": 2, "batch_size": WAY * SHOT, "weight_decay": decay}
    found = fit_prototypes(episode, **settings, **given)
    torch.testing.assert_close((found - mean) / unit, (raw - mean) / unit, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", ["base", "standard"])
def test_no_step_in_the_space_of_a_norm_gives_the_class_means(norm):
    nodes = of_scales()
    found = fit_prototypes(nodes, **{**SETTINGS, "steps": 0}, head="cosine", norm=norm, statistics=statistics())
    torch.testing.assert_close(
        (found[1] - (nodes[1] + nodes[1 + WAY]) / 2) / SCALES, torch.zeros(16, 4), atol=1e-4, rtol=0
    )
    with pytest.raises(InputError, match=f"^-norm {norm} needs the mean and deviation"):
        fit_prototypes(nodes, **SETTINGS, head="cosine", norm=norm)


def test_the_scale_of_a_channel_does_not_matter_to_the_standardised_fit():
    nodes, known = support(), NodeStatistics.of(support(30, seed=5).flatten(0, 1))
    scaled = NodeStatistics((known.mean + OFFSET[:, 0]) * SCALES[:, 0], known.deviation * SCALES[:, 0])
    given = {**SETTINGS, "lr": 0.1, "batch_size": WAY * SHOT, "head": "cosine", "norm": "standard"}
    plain = fit_prototypes(nodes, **given, statistics=known)
    found = fit_prototypes((nodes + OFFSET) * SCALES, **given, statistics=scaled)
    torch.testing.assert_close(found / SCALES - OFFSET, plain, atol=1e-3, rtol=1e-3)
    assert (plain - mean_prototypes(nodes, way=WAY, shot=SHOT)).abs().max() > 1e-3


def test_the_fit_does_no_harm_where_channels_have_different_scales(monkeypatch):
    """Classes differ in the dim channels; SGD on the raw nodes, by the learning rate of eval.py, ruins them."""
    way, shot, queries = 5, 5, 40
    draw = torch.Generator().manual_seed(3)
    signs = torch.randn(way, 16, 1, generator=draw)
    signs[:, SCALES.flatten() > 0.05] = 0
    labels = torch.arange(way).repeat(shot + queries)
    images = (torch.randn(len(labels), 16, 4, generator=draw) + 1.4 * signs[labels] + OFFSET) * SCALES
    known = NodeStatistics.of(images[-50:])
    episode, query, truth = images[: way * shot], images[way * shot : -50], labels[way * shot : -50]

    def accuracy(steps, lr=SCALED_SFC_LR):
        given = {"norm": "standard", "statistics": known, "solver": "simplex"}
        order = {"generator": torch.Generator().manual_seed(0)}
        fit = {"way": way, "shot": shot, "lr": lr, "steps": steps, "batch_size": 4}
        proto = fit_prototypes(episode, **fit, **order, **given)
        return float((head_logits(proto, query, **given).argmax(1) == truth).double().mean())

    means = accuracy(0)
    assert accuracy(20) > means - 0.03 > 0.7
    monkeypatch.setattr(NodeStatistics, "unit_shift_and_scale", lambda self, norm, nodes: (0.0, 1.0))
    assert accuracy(20, lr=100.0) < means - 0.1
