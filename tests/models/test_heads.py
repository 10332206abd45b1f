"""The heads: properties that each must have, the published ones by loops, and the table of heads."""

import importlib.util
import json
import re
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, write_images
from torch.nn import functional as F

import eval as eval_script
from Models import DeepEMD
from Models.heads import HEADS, Head, HeadSettings, head_logits, proto_logits
from Models.sfc import FitError, fit_prototypes
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


class Constant(torch.autograd.Function):
    """A gradient of zero."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


# Wrong in one way each, and what finds it.
WRONG = {
    "of all episodes": (check_batches, lambda p, q, s: proto_logits(p, q, s) - proto_logits(p, q, s).mean()),
    "of all queries": (
        check_order_of_queries_and_classes,
        lambda p, q, s: proto_logits(p, q - q.mean(-3, keepdim=True), s),
    ),
    "of the class number": (
        check_order_of_queries_and_classes,
        lambda p, q, s: proto_logits(p, q, s) + torch.arange(p.shape[-3], dtype=p.dtype),
    ),
    "of the first node": (check_order_of_nodes, lambda p, q, s: proto_logits(p[..., :1], q, s)),
    "in single precision": (check_number_format, lambda p, q, s: proto_logits(p.float(), q.float(), s)),
    "in place": (check_number_format, lambda p, q, s: proto_logits(p.data.mul_(2), q, s)),
    "without a gradient": (check_gradient, lambda p, q, s: Constant.apply(proto_logits(p, q, s))),
    "detached": (check_gradient, lambda p, q, s: proto_logits(p.detach(), q, s)),
    "without a floor": (
        check_zero_nodes,
        lambda p, q, s: (q.mean(-1) / q.mean(-1).norm(dim=-1, keepdim=True)) @ p.mean(-1).mT,
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_head_is_found(monkeypatch, name):
    check, logits = WRONG[name]
    monkeypatch.setitem(HEADS, "wrong", Head(logits, "wrong"))
    with pytest.raises((AssertionError, RuntimeError)):
        check(exact("wrong"))


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


BY_PAIR = {"proto": loop_proto, "cosine": loop_cosine, "knn": loop_knn}


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


@pytest.mark.parametrize("head", LOOPS)
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


@pytest.mark.parametrize("head", HEADS)
def test_prototypes_are_fitted_through_any_head(head):
    """Two steps of SGD with momentum 0.9 and dampening 0.9 from the class means, by hand."""
    support, labels = nodes(2, WAY * SHOT, 16, 4), torch.arange(WAY).repeat(SHOT)
    settings = {"head": head, "temperature": 5.0, "solver": "simplex"}
    lr = 0.01
    found = fit_prototypes(support, way=WAY, shot=SHOT, lr=lr, steps=2, batch_size=WAY * SHOT, **settings)
    for number, episode in enumerate(support):
        proto, momentum, losses = (episode[:WAY] + episode[WAY:]) / 2, 0, []
        for step in range(2):
            leaf = proto.clone().requires_grad_()
            loss = F.cross_entropy(head_logits(leaf, episode, **settings), labels)
            (gradient,) = torch.autograd.grad(loss, leaf)
            momentum = gradient if step == 0 else 0.9 * momentum + 0.1 * gradient
            proto = proto - lr * momentum
            losses.append(loss.item())
        torch.testing.assert_close(found[number], proto, atol=1e-7, rtol=1e-6)
        assert F.cross_entropy(head_logits(proto, episode, **settings), labels) < losses[1] < losses[0]


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


def test_table_of_heads(table, flags, tmp_path, capsys):
    command = [*flags, "-shots", "1,2", "-episodes", "5,3", "-heads", "proto,deepemd,knn", "-sfc_lr", "1"]
    table.main([*command, "-json", "heads.json"])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "heads.json").read_text())
    rows = {(row["shot"], row["head"], row["kshot"]): row for row in found["rows"]}
    heads = ("proto", "deepemd", "knn")
    kinds = [(1, head, None) for head in heads] + [(2, head, kshot) for head in heads for kshot in ("sfc", "mean")]
    assert list(rows) == kinds

    # The accuracies of eval.py, on the same episodes.
    for shot, head, kshot in ((1, "proto", None), (2, "knn", "sfc"), (2, "deepemd", "mean")):
        row = rows[shot, head, kshot]
        same = ["-shot", str(shot), "-head", head, "-kshot", kshot or "sfc", "-sfc_lr", "1"]
        eval_script.main([*flags, *same, "-test_episode", "5" if shot == 1 else "3", "-json", "-"])
        own = json.loads(capsys.readouterr().out)
        assert row["accuracies"] == pytest.approx(own["accuracies"])
        assert (row["accuracy"], row["interval"]) == pytest.approx((own["accuracy"], own["interval"]))
    for (shot, _, _), row in rows.items():
        reference = rows[shot, "deepemd", "sfc" if shot > 1 else None]
        pairs = np.array(row["accuracies"]) - np.array(reference["accuracies"])
        assert row["difference"] == pytest.approx(pairs.mean())
        assert row["difference_interval"] == pytest.approx(1.96 * pairs.std() / len(pairs) ** 0.5)
        assert row["seconds"] > 0
    assert any(row["difference"] for row in rows.values())

    lines = [line for line in printed.splitlines() if line.startswith("| 1") or line.startswith("| 2")]
    row = rows[2, "knn", "mean"]
    assert lines[-1].startswith(
        f"| 2 | knn | mean | 3 | {row['accuracy']:.2f} +- {row['interval']:.2f} "
        f"| {row['difference']:+.2f} +- {row['difference_interval']:.2f} | "
    )
    # Another run finds the same, whatever else it compares.
    table.main([*command, "-shots", "2", "-episodes", "3", "-heads", "deepemd", "-json", "-"])
    again = json.loads(capsys.readouterr().out)["rows"]
    assert [{**row, "seconds": 0} for row in again] == [
        {**rows[2, "deepemd", kshot], "seconds": 0} for kshot in ("sfc", "mean")
    ]


def test_images_are_encoded_once_for_all_heads(table, flags, capsys, monkeypatch):
    encoded = []
    real = DeepEMD.encode
    monkeypatch.setattr(DeepEMD, "encode", lambda self, images: encoded.append(len(images)) or real(self, images))
    table.main([*flags, "-shots", "1", "-episodes", "4"])
    assert sum(encoded) <= 24  # the split
    assert capsys.readouterr().out.count("\n| 1 |") == len(HEADS)


def test_a_row_that_diverges_leaves_the_others(table, flags, capsys):
    command = [*flags, "-shots", "2", "-episodes", "2", "-sfc_lr", "1e6"]
    table.main([*command, "-heads", "proto,cosine", "-sfc_update_step", "3"])
    done = capsys.readouterr()
    assert "| 2 | proto | sfc | 2 | diverged | | |\n| 2 | proto | mean | 2 | " in done.out
    assert "proto, sfc: the prototypes diverged with" in done.err
    with pytest.raises(FitError):
        table.main([*command, "-heads", "proto", "-kshots", "sfc", "-sfc_update_step", "3"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["-head", "knn"], "-head is a flag of eval.py. Set -heads"),
        (["-shot", "5"], "-shot is a flag of eval.py. Set -shots"),
        (["-episodes", "5,5,5"], "one for each of the 2 -shots"),
        (["-model_dir", "nowhere.pth"], "no checkpoint at nowhere.pth"),
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
