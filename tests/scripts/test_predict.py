"""Classifying one's own images: the table, the list, prototypes kept and refused, pictures; and the same as a library."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from PIL import Image

import predict as module
from dataloader import make_view
from engine.start import set_seed
from Models import DeepEMD
from predict import main
from utils import InputError

TINY = ["-model_dir", "none", "-gpu", "cpu", "-image_size", "32", "-solver", "simplex", "-sfc_update_step", "3"]


@pytest.fixture(scope="module")
def images(folder, tmp_path_factory) -> Path:
    """Three classes with 1, 2 and 3 examples, queries in a folder of folders, and one that cannot be read."""
    root = tmp_path_factory.mktemp("mine")
    for number, name in enumerate(("ant", "bee", "cat"), 1):
        source = sorted((folder / "test" / f"class{number}").iterdir())
        for k, path in enumerate(source[:number]):
            (root / "support" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / "support" / name / f"{k}.png")
        (root / "query" / name).mkdir(parents=True)
        for k, path in enumerate(source[4:6]):
            shutil.copy(path, root / "query" / name / f"{k}.png")
    (root / "query" / "broken.png").write_bytes(b"no image")
    (root / "query" / ".hidden.png").write_bytes(b"no image")
    shutil.copytree(root / "query" / "ant", root / "query" / ".thumbnails")
    return root


def listed(capsys, *arguments: str | Path) -> tuple[list[dict], str]:
    main([*map(str, arguments), *TINY, "-json", "-"])
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_list_and_table_agree(images, capsys):
    found, said = listed(capsys, "-support", images / "support", "-query", images / "query")
    assert [item["file"] for item in found] == [
        str(images / "query" / name / f"{k}.png") for name in ("ant", "bee", "cat") for k in (0, 1)
    ]
    assert all(set(item) == {"file", "class", "probability", "cost", "runner_up"} for item in found)
    assert all(item["class"] != item["runner_up"] and 1 / 3 < item["probability"] <= 1 for item in found)
    assert f"warning: left out: expected an image in {images / 'query' / 'broken.png'}" in said
    main(["-support", str(images / "support"), "-query", str(images / "query"), *TINY, "-top", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["class", "probability", "cost", "runner-up", "file"]
    assert [line.split() for line in lines[1::2]] == [
        [item["class"], f"{100 * item['probability']:.1f}", "%", f"{item['cost']:.3f}", item["runner_up"], item["file"]]
        for item in found
    ]
    assert [line.split()[0] for line in lines[2::2]] == [item["runner_up"] for item in found]


@pytest.mark.parametrize("kshot", ["sfc", "mean"])
def test_answers_are_those_of_the_head(images, capsys, kshot):
    """Against the steps done one by one, with as many examples as a class has."""
    found, _ = listed(
        capsys, "-support", images / "support", "-query", images / "query" / "bee" / "1.png", "-kshot", kshot
    )
    set_seed(1)
    model = DeepEMD(solver="simplex", kshot=kshot, sfc_lr=100.0, sfc_update_step=3).folded()
    view = make_view("fcn", train=False, image_size=32)

    def encode(*paths: Path) -> torch.Tensor:
        return model.encode(torch.stack([view(Image.open(path).convert("RGB")) for path in paths]))

    with torch.no_grad():
        support = encode(*sorted((images / "support").rglob("*.png")))
        query = encode(images / "query" / "bee" / "1.png")
        if kshot == "mean":
            proto = torch.stack([support[:1].mean(0), support[1:3].mean(0), support[3:].mean(0)])
        else:
            generator = module_generator()
            proto = model.prototypes(support, way=3, labels=torch.tensor([0, 1, 1, 2, 2, 2]), generator=generator)
            assert torch.equal(proto[0], support[0])  # one example stands for its class
            assert (proto[1] - support[1:3].mean(0)).abs().max() > 1e-4  # fitted
        logits = model.match(proto, query, way=3, shot=1)[0]
    best = int(logits.argmax())
    assert found[0]["class"] == ("ant", "bee", "cat")[best]
    assert found[0]["probability"] == pytest.approx(float(logits.double().softmax(0)[best]), abs=1e-5)
    assert found[0]["cost"] == pytest.approx(1 - float(logits[best]) / 12.5, abs=1e-5)


def module_generator() -> torch.Generator:
    from utils import named_generator

    return named_generator(1, "sfc", "predict")


def test_prototypes_are_kept_and_refused(images, tmp_path, capsys):
    kept, support = tmp_path / "kept.pth", tmp_path / "support"
    shutil.copytree(images / "support", support)
    main(["-support", str(support), "-save", str(kept), *TINY])
    fresh, _ = listed(capsys, "-support", support, "-query", images / "query", "-picture", tmp_path / "fresh")
    shutil.rmtree(support)  # not needed any more, not even for pictures
    again, _ = listed(capsys, "-prototypes", kept, "-query", images / "query", "-picture", tmp_path / "again")
    assert again == fresh
    pictures = [sorted((tmp_path / run).iterdir()) for run in ("fresh", "again")]
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]
    for more, expected in (
        (["-seed", "2"], "expected prototypes of these weights"),
        (["-deepemd", "grid"], "give -deepemd fcn"),
        (["-image_size", "48"], "give -image_size 32$"),
        (["-feature_pyramid", "2,1"], "give no -feature_pyramid$"),
        (["-head", "cosine"], "give -head deepemd$"),
    ):
        with pytest.raises(InputError, match=expected):
            main(["-prototypes", str(kept), "-query", str(images / "query"), *TINY, *more])
    main(["-support", str(images / "support"), "-save", str(kept), *TINY, "-deepemd", "grid"])
    with pytest.raises(InputError, match="give -deepemd grid, -patch_list 2,3, -patch_ratio 2.0$"):
        main(["-prototypes", str(kept), "-query", str(images / "query"), *TINY])
    kept.write_bytes(b"else")
    with pytest.raises(InputError, match="file of prototypes"):
        main(["-prototypes", str(kept), "-query", str(images / "query"), *TINY])


@pytest.mark.parametrize(
    "arguments", [["-deepemd", "grid"], ["-deepemd", "sampling", "-num_patch", "2"], ["-feature_pyramid", "1"]]
)
def test_pictures(images, tmp_path, arguments):
    query = images / "query"
    shutil.copy(query / "ant" / "0.png", tmp_path / "0.jpg")
    shutil.copy(query / "ant" / "0.png", tmp_path / "0.bmp")
    shutil.copy(query / "ant" / "0.png", tmp_path / "a$_$b.png")  # no formula
    names = [str(query / "bee" / "0.png"), *(str(tmp_path / name) for name in ("0.jpg", "0.bmp", "a$_$b.png"))]
    for _ in range(2):  # pictures of an earlier run are replaced
        main(
            [
                "-support",
                str(images / "support"),
                "-query",
                *names,
                *TINY,
                "-picture",
                str(tmp_path / "out"),
                *arguments,
            ]
        )
    assert len(list((tmp_path / "out").glob("0*.png"))) == 3  # of one name
    with Image.open(tmp_path / "out" / "a$_$b.png") as picture:
        picture.load()


def test_patches_are_drawn_by_name_alone(images):
    """Whatever the other threads draw at the time."""
    view = make_view("sampling", train=False, image_size=32, num_patch=9)
    encoder = module.Encoder(DeepEMD(solver="simplex"), view, seed=1, device=torch.device("cpu"))
    files = [str(path) for path in sorted(images.glob("query/[a-z]*/*.png"))]
    alone = [encoder.see(file).pixels for file in files]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert all(map(torch.equal, alone, (seen.pixels for seen in pool.map(encoder.see, files))))


def test_heads_without_a_match(images, tmp_path, capsys):
    found, _ = listed(capsys, "-support", images / "support", "-query", images / "query" / "ant", "-head", "cosine")
    assert [item["cost"] for item in found] == [None, None]
    with pytest.raises(InputError, match="computes no flow"):
        main(["-support", str(images / "support"), "-query", "x", *TINY, "-head", "knn", "-picture", str(tmp_path)])


def test_one_class_and_a_file_of_json(images, tmp_path):
    shutil.copytree(images / "support" / "bee", tmp_path / "support" / "bee")
    main(
        [
            "-support",
            str(tmp_path / "support"),
            "-query",
            str(images / "query" / "ant"),
            *TINY,
            "-json",
            str(tmp_path / "a.json"),
        ]
    )
    found = json.loads((tmp_path / "a.json").read_text())
    assert [(item["class"], item["probability"], item["runner_up"]) for item in found] == 2 * [("bee", 1.0, None)]


def test_queries_are_read_as_they_are_needed(images, monkeypatch):
    """Memory does not grow with their number: the first answer comes before the last file is looked at."""
    seen = []
    see = module.Encoder.see
    monkeypatch.setattr(module.Encoder, "see", lambda self, file: seen.append(file) or see(self, file))
    model = DeepEMD(solver="simplex").folded()
    view = make_view("fcn", train=False, image_size=32)
    encoder = module.Encoder(model, view, seed=1, device=torch.device("cpu"))
    prototypes = module.fit(model, encoder, str(images / "support"))
    seen.clear()
    answers = module.answers(
        model, encoder, prototypes, 5 * [str(p) for p in sorted(images.glob("query/[a-z]*/*.png"))]
    )
    next(answers)
    assert len(seen) < 30
    assert len(list(answers)) == 29


def test_errors_are_one_line(images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    support = ["-support", str(images / "support")]
    for arguments, expected in (
        (["-support", str(tmp_path / "none"), "-query", "x"], "there is none"),
        (["-support", str(tmp_path / "empty"), "-query", "x"], "one folder per class"),
        ([*support, "-query", str(tmp_path / "empty")], "at least one image that can be read"),
        ([*support, "-query", str(tmp_path / "none.png")], "at least one image that can be read"),
        (["-prototypes", str(tmp_path / "none"), "-query", "x"], "there is none"),
    ):
        with pytest.raises(InputError, match=expected) as caught:
            main([*arguments, *TINY])
        assert "\n" not in str(caught.value)
    for arguments in (
        [*support],
        ["-query", "x"],
        [*support, "-prototypes", "x", "-query", "x"],
        [*support, "-save", str(tmp_path / "x"), "-json", "-"],
    ):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *TINY])
        assert ended.value.code == 2
        assert "expected -" in capsys.readouterr().err


def test_library_example_of_the_readme(images, tmp_path, monkeypatch):
    example = next(
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
        if "prototypes(" in block
    )
    shutil.copytree(images / "support", tmp_path / "my_support")
    shutil.copy(images / "query" / "ant" / "0.png", tmp_path / "query.png")
    torch.save({"params": DeepEMD().encoder.state_dict()}, tmp_path / "max_acc.pth")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(example, scope)
    assert scope["logits"].shape == (1, 3)
