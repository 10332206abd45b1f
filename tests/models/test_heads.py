"""The heads that the paper compares, prototypes by mean, and the table of heads."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, write_images
from torch.nn import functional as F

import eval as eval_script
from engine.evaluation import Recorder
from Models import DeepEMD
from Models.arguments import build_model
from Models.emd import SOLVERS
from Models.heads import HEADS, head_logits, knn_logits, takes_solver
from Models.sfc import FitError, fit_prototypes, mean_prototypes
from utils import InputError, run_script

COMPARED = [name for name in HEADS if name != "deepemd"]
WAY, SHOT = 3, 2


def nodes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


@pytest.mark.parametrize("head", COMPARED)
def test_heads_by_loops(head):
    proto, query = nodes(5, 8, 3), nodes(7, 8, 4, seed=1)
    found = head_logits(proto, query, head=head, temperature=7.0)
    torch.testing.assert_close(found, loops(head, proto, query, 7.0))
    # Episodes side by side, in single precision, with the settings of the other heads around.
    proto, query = nodes(2, 3, 5, 8, 3).float(), nodes(2, 3, 7, 8, 4, seed=1).float()
    found = head_logits(proto, query, head=head, metric="cosine", norm="center", solver="opencv", form="L2")
    assert found.shape == (2, 3, 7, 5)
    assert found.dtype == torch.float32
    expected = loops(head, proto[1, 2].double(), query[1, 2].double(), 12.5)
    torch.testing.assert_close(found[1, 2].double(), expected, atol=1e-5, rtol=1e-4)


def test_more_neighbours():
    proto, query = nodes(5, 8, 3), nodes(7, 8, 4, seed=1)
    for k in (1, 2, 3, 9):  # of three nodes
        expected = [[loop_knn(p.numpy(), q.numpy(), 12.5, k) for p in proto] for q in query]
        torch.testing.assert_close(knn_logits(proto, query, k=k), torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(ValueError, match="k of 1 or more; got 0"):
        knn_logits(proto, query, k=0)


# --- properties ---


@pytest.mark.parametrize("head", COMPARED)
def test_what_leaves_logits_alone(head):
    proto, query, shift = nodes(5, 8, 3), nodes(7, 8, 4, seed=1), nodes(8, 1, seed=2)
    expected = head_logits(proto, query, head=head)
    order = head_logits(proto[..., [2, 0, 1]], query[..., [3, 1, 0, 2]], head=head)
    torch.testing.assert_close(order, expected)
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


@pytest.mark.parametrize("head", HEADS)
def test_an_image_is_most_like_itself(head):
    proto = nodes(4, 16, 6)
    assert head_logits(proto, proto, head=head).argmax(1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("head", COMPARED)
def test_gradients(head):
    proto, query = nodes(3, 6, 3).requires_grad_(), nodes(2, 6, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, q: head_logits(p, q, head=head), (proto, query))


@pytest.mark.parametrize("head", HEADS)
def test_zero_nodes(head):
    proto, query = nodes(3, 6, 3).float(), nodes(3, 6, 4, seed=1).float()
    proto[0, :, 1], proto[1], query[0, :, 2], query[1] = 0, 0, 0, 0
    proto.requires_grad_()
    query.requires_grad_()
    logits = head_logits(proto, query, head=head)
    F.cross_entropy(logits, torch.arange(3)).backward()
    assert logits.isfinite().all()
    assert proto.grad.isfinite().all()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("head", HEADS)
def test_bad_arguments(head):
    for proto, query in (
        (nodes(5, 16, 4), nodes(7, 15, 4)),
        (nodes(2, 5, 16, 4), nodes(7, 16, 4)),
        (nodes(2, 16, 4), nodes(16, 4)),
    ):
        with pytest.raises(ValueError, match="expected proto"):
            head_logits(proto, query, head=head)
    with pytest.raises((TypeError, ValueError), match="temprature"):
        head_logits(nodes(5, 16, 4), nodes(7, 16, 4), head=head, temprature=1.0)


def test_what_a_head_may_be_given():
    """The settings of all solvers, and one head that has a use for them."""
    assert [name for name in HEADS if takes_solver(name)] == ["deepemd"]
    options = {name: None for solver in SOLVERS.values() for name in solver.options}
    assert {"form", "l2_strength", "gradient"} <= set(options)
    for head in COMPARED:
        head_logits(nodes(5, 16, 4), nodes(7, 16, 4), head=head, **options)
    with pytest.raises(ValueError, match=f"head to be one of {', '.join(HEADS)}; got 'dot'"):
        takes_solver("dot")


# --- k-shot ---


@pytest.mark.parametrize("head", HEADS)
def test_prototypes_are_fitted_through_any_head(head):
    """Two steps of SGD with momentum 0.9 and dampening 0.9 from the class means, by hand."""
    support, labels = nodes(2, WAY * SHOT, 16, 4), torch.arange(WAY).repeat(SHOT)
    settings = {"head": head, "temperature": 5.0, **({"solver": "simplex"} if head == "deepemd" else {})}
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


def test_a_fit_that_runs_away_says_so():
    settings = {"way": WAY, "shot": SHOT, "steps": 3, "batch_size": 4, "head": "proto"}
    with pytest.raises(FitError, match="they diverged with 1e[+]30. Lower -sfc_lr .* or take -kshot mean"):
        fit_prototypes(nodes(WAY * SHOT, 16, 4).float(), lr=1e30, **settings)
    broken = nodes(WAY * SHOT, 16, 4)
    broken[0, 0, 0] = torch.nan  # not the fault of the fit
    assert fit_prototypes(broken, lr=0.1, **settings).isnan().any()


@pytest.mark.parametrize("head", HEADS)
def test_mean_prototypes(head):
    support, query = nodes(2, WAY * SHOT, 16, 4).requires_grad_(), nodes(2, 7, 16, 4, seed=1)
    model = DeepEMD(head=head, kshot="mean", temperature=7.0)
    logits = model.match(support, query, way=WAY, shot=SHOT)
    proto = torch.stack([support[:, [k, k + WAY]].mean(1) for k in range(WAY)], dim=1)
    torch.testing.assert_close(logits, head_logits(proto, query, head=head, temperature=7.0))
    logits.square().sum().backward()
    assert support.grad.norm() > 0
    one = model.match(support[:, :WAY], query, way=WAY, shot=1)
    torch.testing.assert_close(one, head_logits(support[:, :WAY], query, head=head, temperature=7.0))


def test_prototypes_are_fitted_unless_told_otherwise():
    support, query = nodes(WAY * SHOT, 16, 4), nodes(7, 16, 4, seed=1)
    fit = {"lr": 0.1, "steps": 2, "batch_size": 3}
    model = DeepEMD(head="knn", sfc_lr=fit["lr"], sfc_update_step=fit["steps"], sfc_bs=fit["batch_size"])
    found = model.match(support, query, way=WAY, shot=SHOT, generator=torch.Generator().manual_seed(3))
    proto = fit_prototypes(support, way=WAY, shot=SHOT, head="knn", generator=torch.Generator().manual_seed(3), **fit)
    assert torch.equal(found, head_logits(proto, query, head="knn"))


def test_settings_of_the_model():
    with pytest.raises(ValueError, match="kshot to be one of sfc, mean; got 'median'"):
        DeepEMD(kshot="median")
    with pytest.raises(ValueError, match="head to be one of deepemd, "):
        DeepEMD(head="dot")
    with pytest.raises(ValueError, match=r"expected support \(..., 6, C, N\)"):
        mean_prototypes(nodes(5, 16, 4), way=WAY, shot=SHOT)
    model = build_model(eval_script.build_parser().parse_args(["-head", "knn", "-kshot", "mean"]))
    assert (model.head["head"], model.kshot) == ("knn", "mean")
    # Heads without a solver ask nothing of it.
    model = DeepEMD(head="cosine", solver="none")
    support, query = nodes(5, 16, 4), nodes(7, 16, 4, seed=1)
    assert torch.equal(
        model.match(support, query, way=5, shot=1, solver="other"), head_logits(support, query, head="cosine")
    )


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


def test_eval_by_every_head(flags, capsys, monkeypatch):
    """All run, ask nothing of a solver, and keep a record of their own to go on with."""
    identities = []
    monkeypatch.setattr(Recorder, "remove", lambda self: identities.append(self.path))
    for name in ("qpth", "qpth.qp"):
        monkeypatch.setitem(sys.modules, name, None)
    for change in (*(["-head", head] for head in COMPARED), ["-head", "knn", "-kshot", "mean"]):
        eval_script.main([*flags, "-shot", "2", "-test_episode", "1", "-solver", "qpth", *change, "-json", "-"])
        found = json.loads(capsys.readouterr().out)
        assert (found["flags"]["head"], found["flags"]["kshot"]) == (
            change[1],
            change[-1] if len(change) > 2 else "sfc",
        )
    assert len(set(identities)) == len(COMPARED) + 1


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
    command = [*flags, "-shots", "2", "-episodes", "2", "-sfc_lr", "1e30"]
    table.main([*command, "-heads", "proto,cosine", "-sfc_update_step", "3"])
    done = capsys.readouterr()
    assert "| 2 | proto | sfc | 2 | diverged | | |\n| 2 | proto | mean | 2 | " in done.out
    assert "proto, sfc: expected a learning rate at which" in done.err
    with pytest.raises(FitError):
        table.main([*command, "-heads", "proto", "-kshots", "sfc", "-sfc_update_step", "3"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["-head", "knn"], "-head goes with eval.py; here, -heads"),
        (["-shot", "5"], "-shot goes with eval.py; here, -shots"),
        (["-episodes", "5,5,5"], "one for each of 2 -shots"),
        (["-model_dir", "nowhere.pth"], "expected a checkpoint in nowhere.pth"),
    ],
)
def test_bad_flags_of_the_table(table, flags, change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        table.main([*flags, *change])


def test_unknown_names_in_the_table(table, flags, capsys):
    with pytest.raises(SystemExit):
        run_script(lambda: table.main([*flags, "-heads", "proto,dot"]))
    assert "expected some of deepemd, proto, cosine, knn, fusion joined by commas; got 'dot'" in capsys.readouterr().err
