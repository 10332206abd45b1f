"""The heads: properties that each must have, the published ones by loops, and the table of heads."""

import csv
import importlib.util
import json
import re
import shutil
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, write_images
from torch.nn import functional as F

import eval as eval_script
from Models import DeepEMD
from Models.emd import emd
from Models.heads import HEADS, HeadSettings, head_logits, match_with
from Models.matching import cross_reference_weights
from Models.sfc import FitError, fit_prototypes
from Models.statistics import NodeStatistics
from utils import InputError, run_script

WAY, SHOT = 3, 2


def nodes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- properties of every head ---


def exact(head: str) -> HeadSettings:
    """In double precision where a solver is used, with the gradient of all that the logits depend on."""
    return HeadSettings(head=head, solver="simplex")


def check_batches(settings: HeadSettings) -> None:
    """Episodes do not influence each other."""
    proto, query = nodes(2, 3, 5, 8, 3), nodes(2, 3, 7, 8, 4, seed=1)
    together = head_logits(proto, query, settings)
    assert together.shape == (2, 3, 7, 5)
    for at in np.ndindex(2, 3):
        torch.testing.assert_close(head_logits(proto[at], query[at], settings), together[at])


def check_order_of_queries_and_classes(settings: HeadSettings) -> None:
    """A query's logits do not depend on the other queries, and a class is known by its prototype alone."""
    proto, query = nodes(5, 8, 3), nodes(7, 8, 4, seed=1)
    logits = head_logits(proto, query, settings)
    queries, classes = [6, 1, 3], [4, 0, 3, 1, 2]
    torch.testing.assert_close(head_logits(proto, query[queries], settings), logits[queries])
    torch.testing.assert_close(head_logits(proto[classes], query, settings), logits[:, classes])


def check_order_of_nodes(settings: HeadSettings) -> None:
    proto, query = nodes(5, 8, 3), nodes(7, 8, 4, seed=1)
    found = head_logits(proto[..., [2, 0, 1]], query[..., [3, 1, 0, 2]], settings)
    torch.testing.assert_close(found, head_logits(proto, query, settings))


def check_number_format(settings: HeadSettings) -> None:
    proto, query = nodes(5, 8, 3), nodes(7, 8, 4, seed=1)
    copies = proto.clone(), query.clone()
    exact, rounded = head_logits(proto, query, settings), head_logits(proto.float(), query.float(), settings)
    assert (exact.dtype, rounded.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(rounded.double(), exact, atol=1e-4, rtol=1e-4)
    assert torch.equal(proto, copies[0])
    assert torch.equal(query, copies[1])


def check_gradient(settings: HeadSettings) -> None:
    """By finite differences, for prototypes and queries."""
    proto, query = nodes(3, 6, 3).requires_grad_(), nodes(2, 6, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, q: head_logits(p, q, settings), (proto, query))


def check_zero_nodes(settings: HeadSettings) -> None:
    proto, query = nodes(3, 6, 3).float(), nodes(3, 6, 4, seed=1).float()
    proto[0, :, 1], proto[1], query[0, :, 2], query[1] = 0, 0, 0, 0
    proto.requires_grad_()
    query.requires_grad_()
    logits = head_logits(proto, query, settings)
    F.cross_entropy(logits, torch.arange(3)).backward()
    assert all(values.isfinite().all() for values in (logits, proto.grad, query.grad))


CHECKS = (
    check_batches,
    check_order_of_queries_and_classes,
    check_order_of_nodes,
    check_number_format,
    check_gradient,
    check_zero_nodes,
)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("head", HEADS)
def test_every_head_has_the_properties_of_one(head, check):
    check(exact(head))


# --- the same from loops over numbers ---


def cos(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def loop_proto(proto, query, temperature):
    pooled = [[sum(row) / len(row) for row in image] for image in (query, proto)]
    return -sum((q - p) ** 2 for q, p in zip(*pooled, strict=True))


def loop_cosine(proto, query, temperature):
    return temperature * cos(query.mean(1), proto.mean(1))


def loop_knn(proto, query, temperature, k=1):
    nearest = [sorted((cos(q, p) for p in proto.T), reverse=True)[:k] for q in query.T]
    return temperature * sum(sum(row) for row in nearest) / query.shape[1]


def loop_chamfer(proto, query, temperature, compared=None, weight=lambda node, other: max(0.0, node @ other) + 1e-3):
    """``compared`` are the nodes whose cosines are taken, centred ones if None; ``weight`` of a node and the others' mean."""
    center = [image - image.mean(0) for image in (proto, query)] if compared is None else compared
    total = 0.0
    for (own, other), (raw, opposite) in (((center[1], center[0]), (query, proto)), (center, (proto, query))):
        weights = [weight(node, opposite.mean(1)) for node in raw.T]
        nearest = [max(cos(node, candidate) for candidate in other.T) for node in own.T]
        total += sum(w * s for w, s in zip(weights, nearest, strict=True)) / sum(weights)
    return temperature * total / 2


BY_PAIR = {"proto": loop_proto, "cosine": loop_cosine, "knn": loop_knn, "chamfer": loop_chamfer}


def loops(head: str, proto: torch.Tensor, query: torch.Tensor, temperature: float) -> torch.Tensor:
    """``(W, C, N)`` and ``(Q, C, M)`` to ``(Q, W)``, a pair of images at a time."""
    proto, query = proto.numpy(), query.numpy()
    if head != "fusion":
        return torch.tensor([[BY_PAIR[head](p, q, temperature) for p in proto] for q in query], dtype=torch.float64)
    rows = []
    for image in query:
        average = np.zeros(len(proto))
        for node in image.T:
            scores = np.exp([temperature * cos(node, p.mean(1)) for p in proto])
            average += scores / scores.sum() / image.shape[1]
        rows.append(np.log(average))
    return torch.from_numpy(np.array(rows))


LOOPS = (*BY_PAIR, "fusion")


@pytest.mark.parametrize("head", LOOPS)
def test_published_heads_equal_loops(head):
    proto, query = nodes(2, 3, 5, 8, 3), nodes(2, 3, 7, 8, 4, seed=1)
    found = head_logits(proto, query, head=head, temperature=7.0)
    torch.testing.assert_close(found[1, 2], loops(head, proto[1, 2], query[1, 2], 7.0))
    default = head_logits(proto[1, 2], query[1, 2], head=head)
    torch.testing.assert_close(default, loops(head, proto[1, 2], query[1, 2], 12.5))


@pytest.mark.parametrize("k", [1, 2, 3, 9])  # of three nodes
def test_knn_counts_k_neighbours(k):
    proto, query = nodes(5, 8, 3), nodes(7, 8, 4, seed=1)
    expected = [[loop_knn(p.numpy(), q.numpy(), 12.5, k) for p in proto] for q in query]
    for settings in ({"head": "knn", "k": k}, {"head": f"knn:k={k}"}, {"head": "knn", "head_options": {"k": k}}):
        found = head_logits(proto, query, **settings)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("head", ["proto", "cosine", "knn", "fusion"])
def test_published_heads_are_invariant_to_shift_or_scale(head):
    proto, query, shift = nodes(5, 8, 3), nodes(7, 8, 4, seed=1), nodes(8, 1, seed=2)
    expected = head_logits(proto, query, head=head)
    moved = head_logits(proto + shift, query + shift, head=head)
    scaled = head_logits(3 * proto, 0.2 * query, head=head)
    same = {"moved": torch.allclose(moved, expected), "scaled": torch.allclose(scaled, expected)}
    assert same == {"moved": head == "proto", "scaled": head != "proto"}
    warmer = head_logits(proto, query, head=head, temperature=25.0)
    if head == "proto":
        assert torch.equal(warmer, expected)
    elif head != "fusion":
        torch.testing.assert_close(warmer, 2 * expected)


# --- norms and weights ---


def statistics_of(channels: int) -> NodeStatistics:
    scales = 10.0 ** torch.linspace(-2, 2, channels, dtype=torch.float64).view(-1, 1)
    return NodeStatistics.of(scales * (nodes(50, channels, 4, seed=7) + 2))


@pytest.mark.parametrize("norm", ["base", "standard"])
@pytest.mark.parametrize("head", HEADS)
def test_base_and_standard_change_the_nodes_that_are_compared_and_no_weights(head, norm):
    statistics = statistics_of(8)
    mean, deviation = (part.double().view(8, 1) for part in (statistics.mean, statistics.deviation))
    scale = deviation if norm == "standard" else 1.0
    raw = [mean + deviation * nodes(*shape, seed=seed) for shape, seed in (((3, 8, 4), 0), ((5, 8, 6), 1))]
    compared = [(image - mean) / scale for image in raw]
    found = head_logits(*raw, head=head, norm=norm, statistics=statistics, temperature=7.0, **exact_solver(head))
    if head == "deepemd":
        for q, p in np.ndindex(5, 3):
            proto, query = raw[0][p], raw[1][q]
            weights = [F.relu(b.mean(1) @ a) + 1e-3 for a, b in ((query, proto), (proto, query))]
            similarity = F.normalize(compared[1][q], dim=0).mT @ F.normalize(compared[0][p], dim=0)
            flow = emd(1 - similarity, *(6 * w / w.sum() for w in weights), solver="simplex").flow
            torch.testing.assert_close(found[q, p], 7.0 / 6 * (flow * similarity).sum())
    elif head == "chamfer":
        for q, p in np.ndindex(5, 3):
            pair = [(images[0][p].numpy(), images[1][q].numpy()) for images in (raw, compared)]
            assert float(found[q, p]) == pytest.approx(loop_chamfer(*pair[0], 7.0, compared=pair[1]))
    else:
        torch.testing.assert_close(found, loops(head, *compared, 7.0))
    different = head_logits(*raw, head=head, norm="none", temperature=7.0, **exact_solver(head))
    assert torch.allclose(found, different) == (head == "proto" and norm == "base")  # squared distances have no origin


def exact_solver(head: str) -> dict:
    return {"solver": "simplex"} if HEADS[head].uses_solver else {}


@pytest.mark.parametrize("head", HEADS)
def test_center_changes_the_heads_that_weigh_nodes_alone(head):
    raw = nodes(3, 8, 4) + 1, nodes(5, 8, 6, seed=1) + 1
    plain, centred = (head_logits(*raw, head=head, norm=norm) for norm in ("none", "center"))
    assert torch.equal(plain, centred) != HEADS[head].weighs_nodes


@pytest.mark.parametrize("head", HEADS)
def test_a_class_in_a_dim_channel_is_seen_by_standardised_nodes(head):
    """Two classes differ in a channel whose deviation is a thousandth of the others'."""
    scales = torch.tensor([1.0, 1.0, 1.0, 1e-3]).view(4, 1)
    sign = torch.tensor([1.0, -1.0]).repeat(20).view(40, 1)  # of image i, as its class is i % 2
    images = nodes(40, 4, 5).float()
    images[:, 3] = sign * (3 + 0.1 * images[:, 3])
    images, labels = images * scales + 1, torch.arange(40) % 2
    statistics = NodeStatistics.of(images[20:])

    def accuracy(norm):
        logits = head_logits(
            images[:2], images[2:20], head=head, norm=norm, statistics=statistics, **exact_solver(head)
        )
        return float((logits.argmax(1) == labels[2:20]).double().mean())

    assert accuracy("standard") == 1.0 > 0.8 > max(accuracy("none"), accuracy("base"))


@pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
def test_weights_are_raised_to_a_power_before_they_are_scaled(power):
    proto, query = nodes(3, 8, 4), nodes(5, 8, 6, seed=1)
    weights = cross_reference_weights(query, proto)[4, 2] ** power
    found = match_with(proto, query, HeadSettings(solver="simplex", weight_power=power))
    torch.testing.assert_close(found.supply[4, 2], 6 * weights / weights.sum())
    q, p = query[4].numpy(), proto[2].numpy()
    chamfer = head_logits(proto, query, head="chamfer", weight_power=power)[4, 2]
    raised = loop_chamfer(p, q, 12.5, weight=lambda node, other: (max(0.0, node @ other) + 1e-3) ** power)
    assert float(chamfer) == pytest.approx(raised)


def test_uniform_weights_are_those_of_power_0():
    proto, query = nodes(3, 8, 4), nodes(5, 8, 6, seed=1)
    uniform = match_with(proto, query, HeadSettings(solver="simplex", weights="uniform", weight_power=3.0))
    assert torch.equal(uniform.supply, torch.ones(5, 3, 6, dtype=torch.float64))
    torch.testing.assert_close(uniform.demand, torch.full((5, 3, 4), 1.5, dtype=torch.float64))
    for head in ("deepemd", "chamfer"):
        found = head_logits(proto, query, head=head, weights="uniform", **exact_solver(head))
        flat = head_logits(proto, query, head=head, weight_power=0.0, **exact_solver(head))
        torch.testing.assert_close(found, flat)


def test_powers_of_long_nodes_are_finite():
    proto, query = 1e3 * nodes(3, 8, 4).float(), 1e3 * nodes(5, 8, 6, seed=1).float()
    for head in ("deepemd", "chamfer"):
        assert head_logits(proto, query, head=head, weight_power=10.0).isfinite().all()


# --- slices ---


@pytest.mark.parametrize("head", HEADS)
def test_queries_in_slices_have_the_logits_that_they_have_together(head, monkeypatch):
    proto, query = nodes(2, 3, 8, 4), nodes(2, 7, 8, 6, seed=1)
    settings = exact(head)
    whole, sizes, row = head_logits(proto, query, settings), [], HEADS[head]

    def logits(proto, query, settings):
        sizes.append(tuple(query.shape[:-2]))
        return row.logits(proto, query, settings)

    monkeypatch.setitem(HEADS, head, replace(row, logits=logits))
    a_query = 30 * 2 * 3 * 4 * 6
    cases = {7 * a_query: [(2, 7)], 7 * a_query - 1: [(2, 6), (2, 1)], 2 * a_query: [(2, 2)] * 3 + [(2, 1)]}
    cases |= {a_query - 1: 2 * [(1,)] * 7, 1: 2 * [(1,)] * 7}  # an episode at a time, and no less than a query
    for room, expected in cases.items():
        sizes.clear()
        monkeypatch.setattr("Models.heads.SLICE_BYTES", room)
        torch.testing.assert_close(head_logits(proto, query, settings), whole, atol=1e-6, rtol=0)
        assert sizes == expected


def test_fused_predictions_are_probabilities():
    found = head_logits(nodes(5, 8, 3), nodes(7, 8, 4, seed=1), head="fusion")
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(7, dtype=torch.float64))
    far = head_logits(nodes(5, 8, 3), nodes(7, 8, 4, seed=1), head="fusion", temperature=1e5)
    assert far.isfinite().all()  # probabilities of exp(-1e5)


def test_one_node_leaves_no_choice():
    """With one node an image, local features are the pooled ones."""
    proto, query = nodes(5, 8, 1), nodes(7, 8, 1, seed=1)
    expected = head_logits(proto, query, head="cosine")
    torch.testing.assert_close(head_logits(proto, query, head="knn"), expected)
    torch.testing.assert_close(head_logits(proto, query, head="fusion"), expected.log_softmax(-1))


@pytest.mark.parametrize("head", [*LOOPS, "deepemd"])
def test_an_image_is_most_like_itself(head):
    proto = nodes(4, 16, 6)
    assert head_logits(proto, proto, head=head).argmax(1).tolist() == [0, 1, 2, 3]


# --- settings ---


def test_settings_are_plain_and_frozen():
    settings = HeadSettings.of(head="knn:k=3", temperature=7.0)
    assert json.loads(json.dumps(asdict(settings)))["head_options"] == {"k": 3}
    assert HeadSettings(**asdict(settings)) == settings
    with pytest.raises(FrozenInstanceError):
        settings.temperature = 1.0


def test_options_in_a_name_override_those_beside_it():
    assert HeadSettings.of(head="knn:k=3", k=2).head_options == {"k": 3}
    found = HeadSettings.of(solver="ipm:form=QP", form="L2", l2_strength=0.1)
    assert (found.solver, found.solver_options) == ("ipm", {"form": "QP", "l2_strength": 0.1})
    other = found.with_solver("simplex", {"form": "QP", "gradient": "cost"})
    assert (other.solver, other.solver_options) == ("simplex", {"gradient": "cost"})


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"head": "dot"}, f"unknown head 'dot'; choose one of {', '.join(HEADS)}"),
        ({"head": "knn:q=1"}, "head knn has no option 'q'; its options are: k"),
        ({"head": "knn", "q": 1}, "head knn has no option 'q'; its options are: k"),
        ({"head": "proto:k=1"}, "head proto has no option 'k'; its options are: none"),
        ({"head": "knn:k"}, "head knn: k must be a whole number of 1 or more; got ''"),
        ({"head": "knn:"}, "head knn has no option ''"),
        ({"head": "knn:k=two"}, "head knn: k must be a whole number of 1 or more; got 'two'"),
        ({"head": "knn:k=1.5"}, "head knn: k must be a whole number of 1 or more; got '1.5'"),
        ({"head": "knn:k=0"}, "head knn: k must be a whole number of 1 or more; got '0'"),
        ({"head": "knn", "k": -1}, "head knn: k must be a whole number of 1 or more; got '-1'"),
        ({"head": "knn", "k": 1.5}, "head knn: k must be a whole number of 1 or more; got '1.5'"),
        ({"solver": "none"}, "unknown solver 'none'; choose one of "),
        ({"solver": "opencv:form=L2"}, "solver opencv has no option 'form'"),
        ({"temprature": 1.0}, "solver opencv has no option 'temprature'"),
        ({"head": "cosine", "temprature": 1.0}, "head cosine has no option 'temprature'"),
        ({"metric": "dot"}, "unknown metric 'dot'; choose one of cosine"),
        ({"norm": "whiten"}, "unknown norm 'whiten'; choose one of center, none"),
        ({"weights": "length"}, "unknown weights 'length'; choose one of cross, uniform"),
        ({"weight_power": -1.0}, "weight_power must be 0 or more and finite; got -1.0"),
        ({"weight_power": float("inf")}, "weight_power must be 0 or more and finite"),
        ({"temperature": 0.0}, "temperature must be above 0 and finite; got 0.0"),
        ({"temperature": float("nan")}, "temperature must be above 0 and finite; got nan"),
    ],
)
def test_bad_settings_are_refused_where_they_are_made(keywords, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        HeadSettings.of(**keywords)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "shapes", [((5, 16, 4), (7, 15, 4)), ((2, 5, 16, 4), (7, 16, 4)), ((2, 16, 4), (16, 4)), ((16, 4), (16, 4))]
)
def test_nodes_that_do_not_fit_are_refused(head, shapes):
    with pytest.raises(ValueError, match="do not fit: their shapes must be"):
        head_logits(nodes(*shapes[0]), nodes(*shapes[1]), head=head)


# --- k-shot ---


def test_a_fit_that_diverges_is_an_error():
    settings = {"way": WAY, "shot": SHOT, "steps": 3, "batch_size": 4, "head": "proto"}
    with pytest.raises(FitError, match="diverged with a learning rate of 1e[+]30. Lower -sfc_lr .* or use -kshot mean"):
        fit_prototypes(nodes(WAY * SHOT, 16, 4).float(), lr=1e30, **settings)
    with pytest.raises(FitError, match="diverged"):  # prototypes of 1e30 are finite, and their squares are not
        fit_prototypes(nodes(WAY * SHOT, 16, 4).float(), lr=1e30, **{**settings, "steps": 1, "batch_size": 6})
    broken = nodes(WAY * SHOT, 16, 4)
    broken[0, 0, 0] = torch.nan  # not the fault of the fit
    assert fit_prototypes(broken, lr=0.1, **settings).isnan().any()


# --- the scripts ---

SMALL = ["-gpu", "cpu", "-image_size", "32", "-query", "2", "-way", "3", "-num_workers", "0", "-sfc_update_step", "2"]


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    """Four classes of six images that have nothing in common, so that each head is wrong in its own way."""
    data_dir = tmp_path_factory.mktemp("noise")
    for number, name in enumerate(write_images(data_dir / "all", 24)):
        place = data_dir / "test" / f"class{number % 4}"
        place.mkdir(parents=True, exist_ok=True)
        (data_dir / "all" / name).rename(place / name)
    return data_dir


@pytest.fixture
def flags(noise, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return ["-dataset", "folder", "-data_dir", str(noise), "-model_dir", "none", *SMALL]


@pytest.fixture
def with_train(flags, noise, tmp_path) -> list[str]:
    """The same with a training split."""
    shutil.copytree(noise / "test", tmp_path / "data" / "test")
    for number in range(3):
        write_images(tmp_path / "data" / "train" / f"base{number}", 5, seed=50 + number)
    return [str(tmp_path / "data") if flag == str(noise) else flag for flag in flags]


@pytest.mark.parametrize("head", [*HEADS, "knn:k=2"])
def test_eval_by_every_head(flags, capsys, head):
    eval_script.main([*flags, "-shot", "2", "-test_episode", "1", "-head", head, "-json", "-"])
    found = json.loads(capsys.readouterr().out)
    assert (found["flags"]["head"], len(found["accuracies"])) == (head, 1)


@pytest.fixture(scope="module")
def table():
    """benchmarks/heads.py as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_of_heads", ROOT / "benchmarks/heads.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_of_heads(table, with_train, tmp_path, capsys):
    command = [*with_train, "-shots", "1,2", "-episodes", "5,3", "-heads", "proto,deepemd,cosine", "-sfc_lr", "1"]
    command += ["-norms", "center,none,standard"]
    table.main([*command, "-json", "heads.json", "-csv", "heads.csv"])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "heads.json").read_text())
    rows = {(row["shot"], row["head"], row["norm"], row["kshot"]): row for row in found["rows"]}
    kinds = [("proto", "none"), ("proto", "standard"), *(("deepemd", norm) for norm in ("center", "none", "standard"))]
    kinds += [("cosine", "none"), ("cosine", "standard")]
    assert list(rows) == [(1, *kind, None) for kind in kinds] + [
        (2, *kind, kshot) for kind in kinds for kshot in ("sfc", "mean")
    ]

    # The accuracies of eval.py, on the same episodes.
    chosen = [(1, "proto", "none", None), (2, "deepemd", "standard", "sfc")]
    for shot, head, norm, kshot in chosen:
        row = rows[shot, head, norm, kshot]
        same = ["-shot", str(shot), "-head", head, "-norm", norm, "-kshot", kshot or "sfc", "-sfc_lr", "1"]
        eval_script.main([*with_train, *same, "-test_episode", "5" if shot == 1 else "3", "-json", "-"])
        own = json.loads(capsys.readouterr().out)
        assert row["accuracies"] == own["accuracies"]
        assert (row["accuracy"], row["interval"]) == pytest.approx((own["accuracy"], own["interval"]))
    for (shot, *_), row in rows.items():
        for key, head in (("difference", "deepemd"), ("cosine_difference", "cosine")):
            reference = rows[shot, head, "standard", "sfc" if shot > 1 else None]
            pairs = np.array(row["accuracies"]) - np.array(reference["accuracies"])
            assert row[key] == pytest.approx(pairs.mean())
            assert row[f"{key}_interval"] == pytest.approx(1.96 * pairs.std() / len(pairs) ** 0.5)
            assert row["seconds"] > 0
    assert any(row["difference"] for row in rows.values())

    lines = [line for line in printed.splitlines() if line.startswith("| 1") or line.startswith("| 2")]
    row = rows[2, "cosine", "standard", "mean"]
    assert lines[-1].startswith(
        f"| 2 | cosine | standard | mean | 3 | {row['accuracy']:.2f} +- {row['interval']:.2f} "
        f"| {row['cosine_difference']:+.2f} +- {row['cosine_difference_interval']:.2f} "
        f"| {row['difference']:+.2f} +- {row['difference_interval']:.2f} | "
    )
    assert "| vs cosine, standard | vs deepemd, standard |" in printed
    with open(tmp_path / "heads.csv", newline="") as file:
        listed = list(csv.DictReader(file))
    assert [(int(row["shot"]), row["head"], row["norm"], row["kshot"] or None) for row in listed] == list(rows)
    assert float(listed[-1]["cosine_difference"]) == row["cosine_difference"]
    # Another run finds the same, whatever else it compares.
    only = ["-heads", "deepemd", "-norms", "standard"]
    table.main([*command, "-shots", "2", "-episodes", "3", *only, "-json", "-"])
    again = json.loads(capsys.readouterr().out)["rows"]
    for row in again:
        before = rows[2, "deepemd", "standard", row["kshot"]]
        assert row | {"seconds": 0} == {key: value for key, value in before.items() if "cosine" not in key} | {
            "seconds": 0
        }


def test_a_table_without_training_images_leaves_rows_out(table, flags, capsys, tmp_path):
    command = [*flags, "-shots", "1", "-episodes", "2", "-heads", "cosine,deepemd"]
    table.main(command)
    done = capsys.readouterr()
    assert (
        "rows of -norm base and standard are left out: -norm standard needs statistics of training images" in done.err
    )
    assert "| vs cosine, none | vs deepemd, none |" in done.out
    assert re.findall(r"\n\| 1 \| (\w+) \| (\w+)", done.out) == [("cosine", "none"), ("deepemd", "none")]
    with pytest.raises(InputError, match="needs statistics of training images"):
        table.main([*command, "-norms", "standard"])
    NodeStatistics(torch.zeros(640), torch.ones(640)).write(tmp_path / "mine.npz")
    table.main([*command, "-norms", "none,standard", "-statistics", "mine.npz"])
    assert capsys.readouterr().out.count("| standard |  |") == 2
    with pytest.raises(InputError, match=r"-statistics other\.npz: there is no such file or folder"):
        table.main([*command, "-statistics", "other.npz"])


@pytest.mark.parametrize(
    ("change", "marked"),
    [
        ({}, False),
        ({"backbone": "timm:test_vit", "backbone_weights": "hub"}, True),
        ({"backbone": "timm:test_vit", "backbone_weights": None}, True),
        ({"backbone": "timm:test_vit", "backbone_weights": "none"}, False),
        ({"backbone": "timm:test_vit", "backbone_weights": "hub", "dataset": "glyphs"}, False),
        ({"backbone": "timm:test_vit", "backbone_weights": "hub", "dataset": "folder"}, True),
        ({"features": "dino.npz"}, True),
    ],
)
def test_a_backbone_that_may_know_the_test_classes_is_marked(table, change, marked):
    args = table.build_parser().parse_args(["-dataset", "fc100"])
    vars(args).update(change, source="weights")
    text = table.heading(args, torch.device("cpu"))
    assert (r"accuracy \* |" in text, r"\* The encoder may have been trained on images of the test" in text) == (
        marked,
    ) * 2


def test_a_table_of_features_in_a_file(table, tmp_path, monkeypatch, capsys):
    """Eight classes that differ in channels of tiny deviation, as another program may have written them."""
    monkeypatch.chdir(tmp_path)
    scales = np.array([1e-2, 1.0, 30.0] * 4)[:, None]
    draws, labels = np.random.RandomState(0), np.repeat(np.arange(8), 9)
    signs = draws.randn(8, 12, 1) * (scales < 0.1)
    arrays = {"nodes": (draws.randn(72, 12, 4) + 2 * signs[labels]) * scales, "labels": labels}
    arrays["train_nodes"] = draws.randn(50, 12, 4) * scales
    np.savez("all.npz", **{name: values.astype("f4" if "nodes" in name else "i8") for name, values in arrays.items()})
    command = ["-features", "all.npz", "-shots", "1", "-episodes", "3", "-heads", "cosine,deepemd", "-query", "5"]
    table.main([*command, "-gpu", "cpu", "-solver", "simplex", "-json", "heads.json"])
    rows = {(row["head"], row["norm"]): row["accuracy"] for row in json.loads(Path("heads.json").read_text())["rows"]}
    assert len(rows) == 6
    assert all(
        rows[head, "standard"] > rows[head, norm] + 20 for head in ("cosine", "deepemd") for norm in ("none", "base")
    )
    assert capsys.readouterr().out.startswith("all.npz, 5-way, 5 queries per class")


def test_each_norm_has_a_learning_rate_of_its_own(table, with_train, monkeypatch):
    built = []
    real = table.build_model
    monkeypatch.setattr(table, "build_model", lambda args, **more: built.append(args) or real(args, **more))
    command = [*with_train, "-shots", "2", "-episodes", "1", "-heads", "cosine", "-kshots", "sfc"]
    table.main(command)
    assert {args.norm: args.sfc_lr for args in built} == {"none": 100.0, "base": 0.1, "standard": 0.1}
    built.clear()
    table.main([*command, "-sfc_lr", "7"])
    assert {args.sfc_lr for args in built} == {7.0}


def test_images_are_encoded_once_for_all_rows(table, flags, capsys, monkeypatch):
    encoded = []
    real = DeepEMD.encode
    monkeypatch.setattr(DeepEMD, "encode", lambda self, images: encoded.append(len(images)) or real(self, images))
    table.main([*flags, "-shots", "1,2,3", "-episodes", "4", "-norms", "none", "-kshots", "mean"])
    assert sum(encoded) <= 24  # the split
    assert capsys.readouterr().out.count("| none |") == 3 * len(HEADS)


def test_a_row_that_diverges_leaves_the_others(table, flags, capsys):
    command = [*flags, "-shots", "2", "-episodes", "2", "-sfc_lr", "1e6"]
    table.main([*command, "-heads", "proto,cosine", "-sfc_update_step", "3"])
    done = capsys.readouterr()
    assert "| 2 | proto | none | sfc | 2 | diverged | | | |\n| 2 | proto | none | mean | 2 | " in done.out
    assert "proto, none, sfc: the prototypes diverged with" in done.err
    with pytest.raises(FitError):
        table.main([*command, "-heads", "proto", "-kshots", "sfc", "-sfc_update_step", "3"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["-head", "knn"], "-head is a flag of eval.py. Set -heads"),
        (["-norm", "none"], "-norm is a flag of eval.py. Set -norms"),
        (["-shot", "5"], "-shot is a flag of eval.py. Set -shots"),
        (["-episodes", "5,5,5"], "one for each of the 2 -shots"),
        (["-shots", "1", "-episodes", "3", "-model_dir", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["-shots", "1,5"], "every class (shot + query); the smallest class has 6"),
    ],
)
def test_flags_that_the_table_cannot_use_are_refused(table, flags, change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        table.main([*flags, *change])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["-heads", "proto,dot"], f"unknown head 'dot'; choose one of {', '.join(HEADS)}"),
        (["-heads", "knn:k=0,proto"], "k must be a whole number of 1 or more"),
        (["-norms", "none,whiten"], "unknown norm 'whiten'; choose one of center, none, base, standard"),
        (["-kshots", "median"], "unknown kshot 'median'; choose one of sfc, mean"),
    ],
)
def test_unknown_names_in_the_table_are_refused(table, flags, capsys, change, message):
    with pytest.raises(SystemExit):
        run_script(lambda: table.main([*flags, *change]))
    assert message in capsys.readouterr().err


def test_heads_with_options_are_compared(table):
    args = table.build_parser().parse_args(["-heads", "proto,knn:k=3,knn,deepemd"])
    assert args.heads == ("proto", "knn:k=3", "knn", "deepemd")
