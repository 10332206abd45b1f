"""Classifying one's own images: the table, the list, prototypes kept and refused, pictures; and the same as a library."""

import csv
import json
import os
import re
import shutil
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import ODD_NAMES, ROOT
from PIL import Image

import deepemd
import predict
from dataloader import make_view
from engine.start import set_seed
from Models import DeepEMD
from pictures import matches
from predict import main
from utils import InputError

TINY = ["-model_dir", "none", "-gpu", "cpu", "-image_size", "32", "-solver", "simplex", "-sfc_update_step", "3"]


def listed(capsys, *arguments: str | Path) -> tuple[list[dict], str]:
    main([*map(str, arguments), *TINY, "-json", "-"])
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_list_and_table_agree(own_images, capsys):
    found, said = listed(capsys, "-support", own_images / "support", "-query", own_images / "query")
    assert [item["file"] for item in found] == [
        str(own_images / "query" / name / f"{k}.png") for name in ("ant", "bee", "cat") for k in (0, 1)
    ]
    assert all(set(item) == {"file", "class", "probability", "cost", "runner_up"} for item in found)
    assert all(item["class"] != item["runner_up"] and 1 / 3 < item["probability"] <= 1 for item in found)
    assert f"warning: left out: {own_images / 'query' / 'broken.png'} cannot be read as an image" in said
    main(["-support", str(own_images / "support"), "-query", str(own_images / "query"), *TINY, "-top", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["class", "probability", "cost", "runner-up", "file"]
    assert [line.split() for line in lines[1::2]] == [
        [item["class"], f"{100 * item['probability']:.1f}", "%", f"{item['cost']:.3f}", item["runner_up"], item["file"]]
        for item in found
    ]
    assert [line.split()[0] for line in lines[2::2]] == [item["runner_up"] for item in found]


def test_queries_in_folders_of_classes_have_an_accuracy(own_images, tmp_path, capsys):
    query, support = tmp_path / "query", own_images / "support"
    shutil.copytree(own_images / "query", query)
    # Files of a class in the folder of another are wrong answers; one of a name of two classes is unlabelled.
    (query / "broken.png").rename(query / "ant" / "broken.png")
    (query / "notes.txt").write_text("no image")
    (query / "bee" / "deep").mkdir()
    (query / "bee" / "1.png").rename(query / "bee" / "deep" / "1.png")
    beside = own_images / "query" / "cat"
    found, said = listed(capsys, "-support", support, "-query", query, beside, "-csv", tmp_path / "t.csv", "-top", "2")
    assert [item.get("truth") for item in found] == ["ant", "ant", "bee", "bee", "cat", "cat", None, None]
    with open(tmp_path / "t.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    for row, item in zip(rows, found, strict=True):
        (_, second), plain = item.pop("top"), {"truth": "", **item}
        row = {name: float(value) if name.startswith(("prob", "cost")) else value for name, value in row.items()}
        assert row == plain | {"class_2": second["class"], "probability_2": second["probability"]}
    main(["-support", str(support), "-query", str(query), str(beside), *TINY])
    lines = capsys.readouterr().out.splitlines()
    right = sum(item["class"] == item.get("truth") for item in found)
    assert lines[10] == f"accuracy: {100 * right / 6:.2f} % ({right} of 6 images whose folder names their class)"
    assert lines[11].split() == ["class", "accuracy", "of", "taken", "for"]
    for line, name in zip(lines[12:], ("ant", "bee", "cat"), strict=True):
        pair = [item["class"] for item in found if item.get("truth") == name]
        taken = [f"{other} ({pair.count(other)})" for other in dict.fromkeys(pair) if other != name]
        assert re.split(r"  +", line)[:3] == [name, f"{50 * pair.count(name):.1f} %", "2"]
        assert set(re.findall(r"\w+ \(\d\)", line)) == set(taken)


def test_other_folders_have_no_accuracy(own_images, tmp_path, capsys):
    shutil.copytree(own_images / "query", tmp_path / "query")
    given = ["-support", own_images / "support", "-query"]
    for rename, sentence in (
        ({"broken.png": "broken.png"}, "query/broken.png is not in a folder of a class of the examples"),
        ({"broken.png": "bee/x.png", "ant": "wasp"}, "query/wasp/0.png is not in a folder of a class of the examples"),
        ({"bee": "fly", "cat": "dog"}, None),
    ):
        for old, new in rename.items():
            (tmp_path / "query" / old).rename(tmp_path / "query" / new)
        found, said = listed(capsys, *given, tmp_path / "query")
        assert not any("truth" in item for item in found)
        assert (sentence or "no accuracy") in said if sentence else "no accuracy" not in said
    with pytest.raises(SystemExit):
        main(["-support", "x", "-save", "y", "-csv", "z"])
    assert "-csv lists answers and requires -query PATH" in capsys.readouterr().err


@pytest.mark.parametrize("kshot", ["sfc", "mean"])
def test_answers_are_those_of_the_head(own_images, capsys, kshot):
    """Against the steps done one by one, with as many examples as a class has."""
    found, _ = listed(
        capsys, "-support", own_images / "support", "-query", own_images / "query" / "bee" / "1.png", "-kshot", kshot
    )
    set_seed(1)
    model = DeepEMD(solver="simplex", kshot=kshot, sfc_lr=100.0, sfc_update_step=3).folded()
    view = make_view("fcn", train=False, image_size=32)

    def encode(*paths: Path) -> torch.Tensor:
        return model.encode(torch.stack([view(Image.open(path).convert("RGB")) for path in paths]))

    with torch.no_grad():
        support = encode(*sorted((own_images / "support").rglob("*.png")))
        query = encode(own_images / "query" / "bee" / "1.png")
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


def test_prototypes_are_kept_and_refused(own_images, tmp_path, capsys):
    kept, support = tmp_path / "kept.pth", tmp_path / "support"
    shutil.copytree(own_images / "support", support)
    main(["-support", str(support), "-save", str(kept), *TINY])
    fresh, _ = listed(capsys, "-support", support, "-query", own_images / "query", "-picture", tmp_path / "fresh")
    shutil.rmtree(support)  # not needed any more, not even for pictures
    again, _ = listed(capsys, "-prototypes", kept, "-query", own_images / "query", "-picture", tmp_path / "again")
    assert again == fresh
    pictures = [sorted((tmp_path / run).iterdir()) for run in ("fresh", "again")]
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]
    for more, expected in (
        (["-seed", "2"], "made with other weights"),
        (["-deepemd", "grid"], "set -deepemd fcn"),
        (["-image_size", "48"], "set -image_size 32$"),
        (["-feature_pyramid", "2,1"], "set no -feature_pyramid$"),
        (["-head", "cosine"], "set -head deepemd$"),
    ):
        with pytest.raises(InputError, match=expected):
            main(["-prototypes", str(kept), "-query", str(own_images / "query"), *TINY, *more])
    main(["-support", str(own_images / "support"), "-save", str(kept), *TINY, "-deepemd", "grid"])
    with pytest.raises(InputError, match="set -deepemd grid -patch_list 2,3 -patch_ratio 2.0$"):
        main(["-prototypes", str(kept), "-query", str(own_images / "query"), *TINY])
    kept.write_bytes(b"else")
    with pytest.raises(InputError, match="file of prototypes"):
        main(["-prototypes", str(kept), "-query", str(own_images / "query"), *TINY])


@pytest.mark.parametrize(
    "arguments", [["-deepemd", "grid"], ["-deepemd", "sampling", "-num_patch", "2"], ["-feature_pyramid", "1"]]
)
def test_pictures(own_images, tmp_path, arguments):
    query = own_images / "query"
    shutil.copy(query / "ant" / "0.png", tmp_path / "0.jpg")
    shutil.copy(query / "ant" / "0.png", tmp_path / "0.bmp")
    shutil.copy(query / "ant" / "0.png", tmp_path / "a$_$b.png")  # no formula
    names = [str(query / "bee" / "0.png"), *(str(tmp_path / name) for name in ("0.jpg", "0.bmp", "a$_$b.png"))]
    for _ in range(2):  # pictures of an earlier run are replaced
        words = ["-support", str(own_images / "support"), "-query", *names, "-picture", str(tmp_path / "out")]
        main([*words, *TINY, *arguments])
    assert len(list((tmp_path / "out").glob("0*.png"))) == 3  # of one name
    with Image.open(tmp_path / "out" / "a$_$b.png") as picture:
        picture.load()


def classifier_of(view: object, **settings: object) -> deepemd.Model:
    torch.manual_seed(0)
    return deepemd.Model(DeepEMD(solver="simplex", **settings).folded(), view, 1, torch.device("cpu"))


def test_photographs_are_read_upright(own_images, tmp_path):
    classifier = classifier_of(make_view("grid", train=False, image_size=32, patch_list=(1, 2)))
    upright = Image.open(own_images / "query" / "ant" / "0.png").convert("RGB").crop((0, 0, 20, 14))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    one, other = (classifier.read(str(tmp_path / name)) for name in ("upright.png", "turned.png"))
    assert torch.equal(one.pixels, other.pixels)
    assert torch.equal(one.image, other.image)


def test_patches_are_drawn_by_name_alone(own_images):
    """Whatever the other threads draw at the time."""
    classifier = classifier_of(make_view("sampling", train=False, image_size=32, num_patch=9))
    files = [str(path) for path in sorted(own_images.glob("query/[a-z]*/*.png"))]
    alone = [classifier.read(file).pixels for file in files]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert all(map(torch.equal, alone, (viewed.pixels for viewed in pool.map(classifier.read, files))))


def test_heads_without_a_match(own_images, tmp_path, capsys):
    found, _ = listed(
        capsys, "-support", own_images / "support", "-query", own_images / "query" / "ant", "-head", "cosine"
    )
    assert [item["cost"] for item in found] == [None, None]
    with pytest.raises(InputError, match="computes no flow"):
        main(["-support", str(own_images / "support"), "-query", "x", *TINY, "-head", "knn", "-picture", str(tmp_path)])


def test_one_class_and_a_file_of_json(own_images, tmp_path):
    shutil.copytree(own_images / "support" / "bee", tmp_path / "support" / "bee")
    words = ["-support", tmp_path / "support", "-query", own_images / "query" / "ant", "-json", tmp_path / "a.json"]
    main([*map(str, words), *TINY])
    found = json.loads((tmp_path / "a.json").read_text())
    assert [(item["class"], item["probability"], item["runner_up"]) for item in found] == 2 * [("bee", 1.0, None)]


def test_queries_are_read_as_they_are_needed(own_images, monkeypatch):
    """Memory does not grow with their number: the first answer comes before the last file is read."""
    monkeypatch.setattr(deepemd, "READ_AHEAD", 4)
    classifier = classifier_of(make_view("fcn", train=False, image_size=32))
    prototypes = classifier.prototypes(str(own_images / "support"))
    opened, read_image = [], matches.read_image
    monkeypatch.setattr(matches, "read_image", lambda file, **more: opened.append(file) or read_image(file, **more))
    files = [str(path) for path in sorted(own_images.glob("query/[a-z]*/*.png"))]
    answers = classifier.answers(prototypes, [*files, *files[:2]])  # a file that is named twice has two answers
    assert next(answers).file == files[0]
    assert len(opened) == 4
    assert [answer.file for answer in answers] == [*files[1:], *files[:2]]


def test_the_example_nearest_to_the_prototype_is_shown(own_images, tmp_path):
    """Of examples B A A A A, the mean is nearest to A."""
    a, b = sorted((own_images / "query").glob("[bc]*/0.png"))
    for name, source in zip("01234", (b, a, a, a, a), strict=True):
        (tmp_path / "class").mkdir(exist_ok=True)
        shutil.copy(source, tmp_path / "class" / f"{name}.png")
    classifier = classifier_of(make_view("fcn", train=False, image_size=32), kshot="mean")
    prototypes = classifier.prototypes(str(tmp_path))
    assert prototypes.files[0] in ("1.png", "2.png", "3.png", "4.png")
    assert torch.equal(prototypes.examples[0].pixels, classifier.read(str(a)).pixels)


def test_results_are_written_through_links_and_pipes(own_images, tmp_path):
    query = [str(own_images / "query" / "ant")]
    real, link, pipe = (tmp_path / name for name in ("real.json", "link.json", "pipe"))
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    os.mkfifo(pipe)
    content = []
    reader = threading.Thread(target=lambda: content.append(pipe.read_bytes()))
    reader.start()
    support = ["-support", str(own_images / "support")]
    main([*support, "-query", *query, *TINY, "-json", str(link), "-save", str(pipe)])
    reader.join(10)
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600
    assert len(json.loads(real.read_text())) == 2
    (tmp_path / "kept.pth").write_bytes(content[0])
    main(["-prototypes", str(tmp_path / "kept.pth"), "-query", *query, *TINY, "-json", os.devnull])
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.pth", "link.json", "pipe", "real.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": None},
        {"nodes": torch.zeros(3, 640, 4)},
        {"classes": ["bee"]},
        {"classes": 7},
        {"files": ["x"]},
        {"examples": []},
        {"examples": 2 * [{"pixel": None}]},
        {"settings": None},
        {"format": 9},
    ],
)
def test_damaged_prototypes_are_rejected(two_prototypes, tmp_path, change):
    content = torch.load(two_prototypes, weights_only=True)
    given = {"settings": content["settings"], "weights": content["weights"]}
    assert len(predict.load_prototypes(str(two_prototypes), **given).classes) == 2
    for bad in ({**content, **change}, {key: content[key] for key in content if key not in change}):
        torch.save(bad, tmp_path / "bad.pth")
        with pytest.raises(InputError, match=r"^-prototypes .*bad\.pth"):
            predict.load_prototypes(str(tmp_path / "bad.pth"), **given)


@pytest.fixture(scope="module")
def two_prototypes(own_images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for name in ("ant", "bee"):
        shutil.copytree(own_images / "support" / name, folder / "support" / name)
    main(["-support", str(folder / "support"), "-save", str(folder / "kept.pth"), *TINY])
    return folder / "kept.pth"


def test_a_class_and_a_file_of_any_name(own_images, tmp_path, capfd, recwarn):
    """One line for each in the table, and pictures without a warning."""
    names = [name for name in ODD_NAMES if name.strip()]
    source = own_images / "support" / "ant" / "0.png"
    for name in names:
        name = name.replace("/", "_")[:250]
        (tmp_path / "support" / name).mkdir(parents=True)
        shutil.copy(source, tmp_path / "support" / name)
        (tmp_path / "query").mkdir(exist_ok=True)
        shutil.copy(source, tmp_path / "query" / f"{name}.png")
    flags = ["-support", tmp_path / "support", "-query", tmp_path / "query", "-picture", tmp_path / "out", "-top", "2"]
    main([*map(str, flags), *TINY])
    printed = capfd.readouterr()
    assert len(printed.out.splitlines()) == 1 + 2 * len(names)
    assert all(line.isprintable() for line in printed.out.splitlines())
    assert len(list((tmp_path / "out").iterdir())) == len(names)
    assert [line.split(":")[0] for line in printed.err.splitlines()] == ["device", "weights", "pictures"]
    assert not recwarn.list


def test_errors_are_one_line(own_images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    support = ["-support", str(own_images / "support")]
    for arguments, expected in (
        (["-support", str(tmp_path / "none"), "-query", "x"], "there is no folder"),
        (["-support", str(tmp_path / "empty"), "-query", "x"], "the support needs a folder of images for each class"),
        ([*support, "-query", str(tmp_path / "empty")], "none of the images of -query can be read"),
        ([*support, "-query", str(tmp_path / "none.png")], "none of the images of -query can be read"),
        (["-prototypes", str(tmp_path / "none"), "-query", "x"], "there is no such file"),
    ):
        with pytest.raises(InputError, match=expected) as caught:
            main([*arguments, *TINY])
        assert "\n" not in str(caught.value)
        assert "-data_dir" not in str(caught.value)  # a flag that this script does not have
    capsys.readouterr()
    for arguments in (
        [*support],
        ["-query", "x"],
        [*support, "-prototypes", "x", "-query", "x"],
        [*support, "-save", str(tmp_path / "x"), "-json", "-"],
    ):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *TINY])
        assert ended.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_library_example_of_the_documentation(own_images, tmp_path, monkeypatch):
    example = next(
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.S)
        if "prototypes(" in block
    )
    shutil.copytree(own_images / "support", tmp_path / "my_support")
    shutil.copy(own_images / "query" / "ant" / "0.png", tmp_path / "query.png")
    torch.save({"params": DeepEMD().encoder.state_dict()}, tmp_path / "max_acc.pth")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(example, scope)
    assert scope["logits"].shape == (1, 3)


def test_answers_below_a_probability_are_none_of_the_classes(own_images, tmp_path, capsys):
    for name in ("bee", "cat"):
        shutil.copytree(own_images / "query" / name, tmp_path / name)
    given = ["-support", own_images / "support", "-query", tmp_path]
    found, _ = listed(capsys, *given)
    least = sorted(item["probability"] for item in found)[1] + 1e-9  # above two of the four
    kept, _ = listed(capsys, *given, "-abstain", str(least))
    assert [item["class"] for item in kept] == [
        item["class"] if item["probability"] >= least else None for item in found
    ]
    assert [item["nearest"] for item in kept if item["class"] is None] == [
        item["class"] for item in found if item["probability"] < least
    ]
    main([*map(str, given), *TINY, "-abstain", str(least)])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("none of the classes") for line in lines) == 2
    right = sum(item["class"] == item["truth"] for item in kept)
    images = f"{right} of 2 images whose folder names their class; no answer for 2 others"
    assert f"accuracy: {50 * right:.2f} % ({images})" in lines
