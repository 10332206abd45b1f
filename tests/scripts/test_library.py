"""The library in one import: the same answers as the scripts, from whatever images are given as."""

import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT
from matplotlib.figure import Figure
from PIL import Image

import deepemd
from Models import DeepEMD
from Models.emd import emd
from predict import as_json, main
from utils import InputError

FLAGS = {"image_size": 32, "solver": "simplex", "sfc_update_step": 3}


@pytest.fixture(scope="module")
def model() -> deepemd.Model:
    return deepemd.load("none", device="cpu", **FLAGS)


def test_loading_leaves_the_callers_draws_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one = deepemd.load("none", device="cpu", **FLAGS)
    assert torch.equal(torch.rand(3), expected)
    other = deepemd.load("none", device="cpu", **FLAGS)  # random weights are those of the seed
    weights = [next(model.network.encoder.parameters()) for model in (one, other)]
    assert torch.equal(*weights)


def test_another_default_of_torch_changes_nothing(model):
    image = np.random.RandomState(0).randint(0, 256, (40, 40, 3), np.uint8)
    expected = model.match(image, image[::-1]).logit
    torch.set_default_dtype(torch.float64)
    try:
        other = deepemd.load("none", device=torch.device("cpu"), **FLAGS)
        other.network.load_state_dict(model.network.state_dict())
        assert other.match(image, image[::-1]).logit == pytest.approx(expected, abs=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


def test_answers_are_those_of_predict(own_images, model, tmp_path):
    support, query = own_images / "support", own_images / "query" / "bee"
    written = tmp_path / "answers.json"
    flags = [word for name, value in FLAGS.items() for word in (f"-{name}", str(value))]
    words = ["-support", support, "-query", query, "-model_dir", "none", "-gpu", "cpu", "-json", written, *flags]
    main(list(map(str, words)))
    answers = model.classify(support, query)
    assert [as_json(answer, 1, None) for answer in answers] == json.loads(written.read_text())
    assert [answer.ranking[0] for answer in answers] == [(answer.class_name, answer.probability) for answer in answers]
    assert all(answer.runner_up == answer.ranking[1][0] for answer in answers)
    assert repr(answers[0]).endswith(f"runner_up={answers[0].runner_up!r}, cost={answers[0].cost!r})")


def test_images_may_be_files_pictures_or_arrays(own_images, model):
    folders = {path.name: path for path in sorted((own_images / "support").iterdir())}
    files = {name: sorted(path.iterdir()) for name, path in folders.items()}
    pictures = {name: [Image.open(path) for path in found] for name, found in files.items()}
    arrays = {name: [np.asarray(image.convert("RGB")) for image in found] for name, found in pictures.items()}
    query = own_images / "query" / "cat" / "0.png"
    expected = model.classify(own_images / "support", query)[0]
    for support in (folders, files, {name: list(map(str, found)) for name, found in files.items()}, pictures, arrays):
        for given in (query, str(query), [query], Image.open(query), np.asarray(Image.open(query).convert("RGB"))):
            (answer,) = model.classify(support, given)
            assert answer.ranking == expected.ranking
    assert torch.equal(model.encode(query), model.encode([Image.open(query)]))
    assert model.encode(own_images / "support").shape == (6, 640, 4)


def test_prototypes_serve_several_calls(own_images, model):
    prototypes = model.prototypes(own_images / "support")
    queries = sorted((own_images / "query" / "ant").iterdir())
    apart = [model.classify(prototypes, query)[0] for query in queries]
    together = model.classify(own_images / "support", queries, abstain=np.float32(0))
    assert [answer.class_name for answer in apart] == [answer.class_name for answer in together]
    # Batches of other sizes round otherwise.
    assert [answer.probability for answer in apart] == pytest.approx([one.probability for one in together], abs=1e-5)
    assert isinstance(model.draw(prototypes, model.classify(prototypes, queries[0])[0]), Figure)


def test_a_match_is_the_optimal_one(own_images, model):
    a, b = sorted((own_images / "query" / "ant").iterdir())
    match = model.match(a, b)
    assert [nodes.shape for nodes in match.nodes] == [(640, 4), (640, 4)]
    assert torch.equal(torch.stack(match.nodes), model.encode([a, b]))
    assert match.flow.sum(1) == pytest.approx(match.weights[0], abs=1e-5)
    assert match.flow.sum(0) == pytest.approx(match.weights[1], abs=1e-5)
    value = emd(1 - match.similarity.double(), *(weights.double() for weights in match.weights), solver="simplex").value
    assert match.cost == pytest.approx(float(value) / 4, abs=1e-5)
    assert model.match(a, a).cost == pytest.approx(0, abs=1e-5)
    assert isinstance(match.draw(), Figure)


@pytest.mark.parametrize(
    ("support", "queries", "message"),
    [
        ({"ant": []}, [], "the class 'ant' has no example"),
        ({}, [], "there is no class to choose from"),
        ("no/such/folder", [], "no/such/folder"),
        ({"ant": np.zeros((4, 4, 3), np.float32)}, [], "an array must be an image of uint8"),
        ([np.zeros((4, 4, 3), np.uint8)], [], "must be a folder, or a dict from class to images; got a list"),
        (None, [], "must be a folder, or a dict from class to images; got a NoneType"),
        ({"ant": 7}, [], "must be a path, a PIL image or an array, not int"),
        ({"ant": np.zeros((40, 40, 3), np.uint8)}, "no/such.png", "no/such.png"),
    ],
)
def test_bad_images_are_one_sentence(model, support, queries, message):
    with pytest.raises(InputError, match=message):
        model.classify(support, queries)


def test_a_picture_that_turns_out_to_be_broken_is_one_sentence(model):
    written = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 40, 3), np.uint8)).save(written, "png")
    broken = Image.open(io.BytesIO(written.getvalue()[:600]))  # Pillow reads the pixels when they are needed
    with pytest.raises(InputError, match="the image cannot be read"):
        model.encode(broken)


@pytest.mark.parametrize("abstain", [2, -1, "x", float("nan")])
def test_a_probability_is_between_0_and_1(model, abstain):
    with pytest.raises(InputError, match="abstain is a probability, from 0 to 1"):
        model.classify({"ant": np.zeros((4, 4, 3), np.uint8)}, [], abstain=abstain)


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("no/such/run", {}, "no checkpoint at no/such/run"),
        ("none", {"norm": "nope"}, "argument -norm: invalid choice"),
        ("none", {"device": "cuda:77"}, "-gpu 77: there is no GPU 77"),
        ("none", {"no_such_flag": 1}, "unrecognized arguments: -no_such_flag 1"),
    ],
)
def test_bad_models_are_one_sentence(source, flags, message):
    with pytest.raises(InputError, match=message):
        deepemd.load(source, **{"device": "cpu", **flags})


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_the_examples_of_the_documentation_run(own_images, tmp_path, monkeypatch, capsys, page):
    """The blocks that a page begins with ``import deepemd``, and those that follow from it, on a run in the place they name."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    blocks = [block for block in blocks if "deepemd" in block or "match" in block.split("=")[0]]
    run = tmp_path / re.search(r'load\("(.*?)"\)', blocks[0]).group(1)
    run.mkdir(parents=True)
    torch.save({"params": DeepEMD().encoder.state_dict()}, run / "max_acc.pth")
    (run / "run.json").write_text(json.dumps({"flags": {"image_size": 32, "kshot": "mean"}}))
    (tmp_path / "my_support").symlink_to(own_images / "support")
    (tmp_path / "my_images").symlink_to(own_images / "query" / "bee")
    for name, file in zip(("a.jpg", "b.jpg"), sorted((own_images / "query" / "ant").iterdir()), strict=True):
        (tmp_path / name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    exec("".join(blocks), {})
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert (tmp_path / "match.png").exists() == (page == "docs/api.md")


@pytest.mark.slow
def test_the_tour_runs(glyphs, tmp_path):
    """All cells of the notebook, one after the other, with random weights; and its outputs are in the file."""
    cells = [
        cell for cell in json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"] if cell["cell_type"] == "code"
    ]
    for path in ROOT.iterdir():
        if path.name not in {"datasets", "checkpoint"}:
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "glyphs").symlink_to(glyphs / "glyphs")
    source = "\n".join("".join(cell["source"]) for cell in cells)
    (tmp_path / "tour.py").write_text(source.replace('"-episodes", "60"', '"-episodes", "2", "-gpu", "cpu"'))
    environment = {**os.environ, "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "tour.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| 1 | chamfer | standard |" in done.stdout
    assert done.stdout.count("step ") == 4
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"]) == 2
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])


def test_heads_without_a_flow_match_nothing(own_images):
    model = deepemd.load("none", device="cpu", head="cosine", **FLAGS)
    assert model.classify(own_images / "support", own_images / "query" / "ant")[0].cost is None
    with pytest.raises(InputError, match="computes no flow"):
        model.match(*sorted((own_images / "query" / "ant").iterdir()))
