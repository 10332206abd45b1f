"""The head: weights, similarity, matching."""

import pytest
import torch
from torch.nn import functional as F

from Models.emd import emd
from Models.heads import head_logits
from Models.matching import (
    METRICS,
    OPENCV_FLOOR,
    cosine_similarity_map,
    cross_reference_weights,
    emd_logits,
    match_nodes,
)


def nodes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize(
    "options", [{"solver": "opencv"}, {"solver": "simplex"}, {"solver": "simplex", "gradient": "cost"}]
)
def test_the_parts_of_a_matching_agree(options):
    proto, query = nodes(3, 5, 16, 4), nodes(3, 7, 16, 6, seed=1).requires_grad_()
    matching = match_nodes(proto, query, temperature=7.0, **options)
    assert torch.equal(matching.logits, emd_logits(proto, query, temperature=7.0, **options))
    assert matching.flow.shape == matching.similarity.shape == (3, 7, 5, 6, 4)
    assert not matching.flow.requires_grad
    torch.testing.assert_close(matching.flow.sum(-1), matching.supply, atol=1e-4, rtol=0)
    torch.testing.assert_close(matching.flow.sum(-2), matching.demand, atol=1e-4, rtol=0)
    expected = 7.0 / 6 * (matching.flow * matching.similarity).sum((-2, -1))
    torch.testing.assert_close(matching.logits, expected, atol=1e-4, rtol=1e-4)


def test_opencv_raises_the_weights_and_qpth_does_not():
    """The published OpenCV path adds 1e-5 to the weights before it scales them; its QPTH path does not."""
    proto, query = 0.01 * nodes(2, 8, 3), 0.01 * nodes(4, 8, 3, seed=1)
    plain = cross_reference_weights(query, proto)
    raised = plain + OPENCV_FLOOR
    for options, weight in (
        ({"solver": "opencv"}, raised),
        ({"solver": "simplex", "gradient": "cost"}, raised),
        ({"solver": "simplex"}, plain),
        ({"solver": "ipm"}, plain),
        ({"solver": "qpth"}, plain),
    ):
        supply = match_nodes(proto, query, **options).supply
        torch.testing.assert_close(supply, 3 * weight / weight.sum(-1, keepdim=True), atol=1e-6, rtol=1e-6)


def test_similarity_of_short_nodes_is_that_of_long_ones():
    """The floor under their lengths is for zeros alone: features of a network may be small."""
    query, proto = nodes(2, 8, 3), nodes(4, 8, 5, seed=1)
    found = cosine_similarity_map(1e-5 * query, 1e-5 * proto)
    torch.testing.assert_close(found, cosine_similarity_map(query, proto), atol=1e-5, rtol=1e-4)
    assert not cosine_similarity_map(0 * query, proto).any()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"metric": "dot"}, "unknown metric 'dot'; choose one of cosine"),
        ({"norm": "whiten"}, "unknown norm 'whiten'; choose one of center, none"),
        ({"solver": "none"}, "solver .*none"),
        ({"temprature": 1.0}, "temprature"),
    ],
)
def test_unknown_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        emd_logits(nodes(5, 16, 4), nodes(7, 16, 4), **setting)


def test_deepemd_is_the_default_head():
    proto, query = nodes(5, 16, 4), nodes(7, 16, 4, seed=1)
    expected = emd_logits(proto, query, temperature=3.0)
    assert torch.equal(head_logits(proto, query, temperature=3.0), expected)
    assert torch.equal(head_logits(proto, query, head="deepemd", temperature=3.0), expected)
    cost = {"solver": "simplex", "gradient": "cost"}
    assert torch.equal(head_logits(proto, query, solver="simplex:gradient=cost"), emd_logits(proto, query, **cost))


@pytest.mark.parametrize("head", ["deepemd", "chamfer"])
def test_a_metric_is_one_entry_of_the_table(monkeypatch, head):
    monkeypatch.setitem(METRICS, "half", lambda *nodes, **settings: cosine_similarity_map(*nodes, **settings) / 2)
    proto, query = nodes(2, 8, 3), nodes(4, 8, 3, seed=1)
    cosine, half = (
        head_logits(proto, query, head=head, metric=metric, solver="simplex") for metric in ("cosine", "half")
    )
    torch.testing.assert_close(half, cosine / 2)
