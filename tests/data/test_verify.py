"""Checking data sets: the right ones are judged right, and each kind of damage is found and named."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import verify
from data_helpers import refuse
from PIL import Image

from dataloader import checks, published, readers
from dataloader.images import read_image
from engine import loading
from utils import InputError, file_hash

CLASSES = {"train": ("ant", "bee", "cat"), "val": ("dog", "elk"), "test": ("fox", "gnu")}
EACH = 6  # images of a class; what is published of the small sets below
ROWS = [{"split": split, "class": name, "images": str(EACH)} for split, names in CLASSES.items() for name in names]
TIERED = {split: EACH * len(names) for split, names in CLASSES.items()}


@pytest.fixture(autouse=True)
def small_published(monkeypatch):
    """The published sets are those of CLASSES."""
    monkeypatch.setattr(published, "_rows", lambda table: ROWS)
    monkeypatch.setattr(published, "_IMAGES", {"tieredimagenet": TIERED})


def write_image(path: Path, size: tuple[int, int], seed: object, mode: str = "RGB") -> None:
    random = np.random.RandomState(abs(hash(str(seed))) % 2**32)
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = random.randint(0, 256, (4, 4, 3)).astype(np.uint8)
    Image.fromarray(noise).resize(size).convert(mode).save(path)


def write_folders(root: Path, size: tuple[int, int], folders: dict[str, str] | None = None) -> None:
    for split, names in CLASSES.items():
        for name in names:
            for number in range(EACH):
                path = root / (folders or {}).get(split, split) / name / f"{number}.png"
                write_image(path, size, (name, number))


def write_tables(root: Path, images: str, *, by_class: bool) -> None:
    (root / "split").mkdir(parents=True)
    for split, names in CLASSES.items():
        rows = []
        for name in names:
            for number in range(EACH):
                file = f"{number}.jpg" if by_class else f"{name}{number}.jpg"
                write_image(root / images / (name if by_class else "") / file, (90 + 9 * number, 88), (name, number))
                rows.append(f"{file},{name}\n")
        (root / "split" / f"{split}.csv").write_text("filename,label\n" + "".join(rows))


@pytest.fixture(scope="session")
def originals(tmp_path_factory) -> Path:
    """One small, right data set of each kind."""
    data_dir = tmp_path_factory.mktemp("right")
    write_folders(data_dir / "FC100", (32, 32))
    write_folders(data_dir / "cifar_fs", (32, 32), {split: f"meta-{split}" for split in CLASSES})
    write_folders(data_dir / "tiered_imagenet", (100, 90))
    write_folders(data_dir / "omniglot", (16, 16))
    write_tables(data_dir / "miniimagenet", "images", by_class=False)
    write_tables(data_dir / "cub", ".", by_class=True)
    return data_dir


FOLDERS = {name: name for name in ("cifar_fs", "omniglot", "miniimagenet", "cub")}
FOLDERS |= {"fc100": "FC100", "tieredimagenet": "tiered_imagenet"}


@pytest.fixture
def copy(originals, tmp_path):
    def make(name: str) -> Path:
        shutil.copytree(originals / FOLDERS[name], tmp_path / FOLDERS[name])
        return tmp_path / FOLDERS[name]

    return make


def check(capsys, name: str, data_dir: Path) -> tuple[int, dict]:
    """Exit status and JSON; what is printed as text must agree with it."""
    status = verify.main([name, "-data_dir", str(data_dir), "-json", "-"])
    report = json.loads(capsys.readouterr().out)
    assert verify.main([name, "-data_dir", str(data_dir)]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == report["verdict"]
    faults = [line.removeprefix("fault: ") for line in lines if line.startswith("fault: ")]
    assert faults == (report["faults"] if report["path"] else [])  # the verdict says it all where nothing is there
    assert [line.removeprefix("note: ") for line in lines if line.startswith("note: ")] == report["notes"]
    assert status == (0 if report["right"] else 1)
    assert report["right"] == (not report["faults"])
    return status, report


# --- right ---


@pytest.mark.parametrize("name", FOLDERS)
def test_right_sets_are_judged_right(name, originals, capsys):
    status, report = check(capsys, name, originals)
    assert report["faults"] == []
    assert status == 0
    assert report["verdict"] == f"{name} in {originals / FOLDERS[name]} is right: 3/2/2 classes, 42 images"
    assert report["splits"]["val"] == {"classes": 2, "images": 12, "per_class": {"dog": 6, "elk": 6}}
    assert report["modes"] == {"RGB": 42}
    assert sum(report["sizes"].values()) == 42


def test_folder(copy, tmp_path, capsys):
    root = copy("omniglot")
    assert check(capsys, "folder", root)[1]["notes"] == []
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "0.png").symlink_to("gone")  # not looked at
    status, report = check(capsys, "folder", tmp_path)
    assert status == 0
    assert len(report["notes"]) == 1
    assert report["notes"][0] == f"missing splits: no val classes: there is no folder {tmp_path / 'val'}"


def test_worker_processes_find_the_same(copy, tmp_path, capsys, monkeypatch):
    root = copy("fc100")
    (root / "val" / "dog" / "3.png").write_bytes(b"no image")
    (root / verify.MANIFEST).write_text("{}")
    (root / "notes.txt").write_text("hashed, not decoded")
    alone = verify.verify("fc100", tmp_path)
    monkeypatch.setattr(verify, "IN_PROCESS", 0)
    monkeypatch.setattr(verify, "available_cores", lambda: 2)
    monkeypatch.setattr(loading, "SECONDS_BETWEEN_LINES", 0)
    assert verify.verify("fc100", tmp_path) == alone
    assert len(alone["faults"]) == 2
    assert "reading fc100" in capsys.readouterr().err


def test_hidden_and_stray_files(copy, tmp_path, capsys):
    root = copy("fc100")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "ant" / "._0.png").write_bytes(b"macOS")
    (root / "train" / "cifar-10-python.tar.gz").write_bytes(b"")
    status, report = check(capsys, "fc100", tmp_path)
    assert status == 0
    assert report["notes"] == ["files that no script reads: train/cifar-10-python.tar.gz"]


def test_transparent_and_turned_images_are_counted(copy, tmp_path, capsys):
    for name, how in (("tieredimagenet", "read as they are stored"), ("omniglot", "turned upright")):
        root = copy(name)
        file = root / "val/dog/0.png"
        pixels = np.random.RandomState(1).randint(0, 256, (90, 100, 4)).astype(np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).save(file, exif=exif)
        Image.fromarray(pixels[::-1, :, :3]).convert("RGBA").save(root / "val/elk/0.png")  # opaque
        status, report = check(capsys, name, tmp_path)
        assert (status, report["notes"]) == (
            0,
            [
                "images with transparent pixels, which are read as white: val/dog/0.png",
                f"images whose EXIF orientation asks for a turn, which are {how}: val/dog/0.png",
            ],
        )


def test_any_layout_that_the_readers_know_is_checked(originals, monkeypatch, capsys, tmp_path):
    """The images of a new layout are those that its reader lists."""
    shutil.copytree(originals / "omniglot", tmp_path / "nested" / "pictures")

    def read(spec, root, split, *rest):
        return readers.READERS["folders"](spec, root / "pictures", split, *rest)

    monkeypatch.setitem(readers.READERS, "nested", read)
    spec = replace(verify.SPECS["omniglot"], layout="nested", folders=("nested",))
    monkeypatch.setitem(verify.SPECS, "nested", spec)
    status, report = check(capsys, "nested", tmp_path)
    assert (status, report["verdict"]) == (0, f"nested in {tmp_path}/nested is right: 3/2/2 classes, 42 images")


def test_what_the_scripts_cannot_read_is_a_fault(copy, tmp_path, capsys):
    """The verdict and the reader agree on images of more than 8 bits."""
    root = copy("omniglot")
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(root / "val/dog/0.png")
    assert check(capsys, "omniglot", tmp_path)[1]["faults"] == []
    Image.fromarray(values * 16).save(root / "val/dog/0.png")
    (fault,) = check(capsys, "omniglot", tmp_path)[1]["faults"]
    with pytest.raises(InputError) as refused:
        read_image(str(root / "val/dog/0.png"))
    reason = fault.partition("(")[2].partition(")")[0]
    assert "reach 4080 only" in reason
    assert reason in str(refused.value)


def test_overlap_is_a_note(copy, tmp_path, capsys, monkeypatch):
    copy("miniimagenet")
    copy("tieredimagenet")
    monkeypatch.undo()  # the facts as published: everything is wrong, and the overlap is counted
    for name in ("miniimagenet", "tieredimagenet"):
        notes = check(capsys, name, tmp_path)[1]["notes"]
        assert any(note.startswith("13 training classes of miniimagenet are test classes of") for note in notes)


def test_images_that_occur_twice(copy, tmp_path, capsys, monkeypatch):
    root = copy("fc100")
    monkeypatch.setattr(published, "_TWINS", {"fc100": {("ant", "dog"): 1}})
    shutil.copy(root / "train/ant/0.png", root / "val/dog/0.png")
    shutil.copy(root / "test/fox/1.png", root / "test/gnu/1.png")
    status, report = check(capsys, "fc100", tmp_path)
    assert status == 0
    assert report["notes"] == [
        "images in two splits, as in the published set: 1",
        "images that occur more than once within a split: test/fox/1.png = test/gnu/1.png",
    ]
    shutil.copy(root / "train/ant/1.png", root / "val/dog/1.png")
    (fault,) = check(capsys, "fc100", tmp_path)[1]["faults"]
    assert fault.startswith("the same image in two splits: 2, first train/ant/0.png = val/dog/0.png. Remove it")


def test_few_images_in_two_splits_where_nobody_counted_them(copy, tmp_path, capsys, monkeypatch):
    root = copy("tieredimagenet")
    shutil.copy(root / "train/ant/0.png", root / "val/dog/0.png")
    assert check(capsys, "tieredimagenet", tmp_path)[1]["faults"][0].startswith("the same image in two splits: ")
    monkeypatch.setattr(verify, "MOST_TWINS", 1 / 42)
    status, report = check(capsys, "tieredimagenet", tmp_path)
    assert (status, report["notes"]) == (0, ["images in two splits: 1"])


# --- damage ---


def swap(path: Path, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> None:
    write_image(path, size, (path.parent.name, path.name, "another"), mode)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone.png")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def move(path: Path, to: str) -> None:
    path.rename(path.parent / to)


def write_manifest(root: Path, **changes: object) -> None:
    digests = {path.relative_to(root).as_posix(): file_hash(path) for path in root.rglob("*") if path.is_file()}
    content = {"dataset": "fc100", "recipe": 1, "sha256": verify.tree_hash(digests), **changes}
    (root / verify.MANIFEST).write_text(json.dumps(content))


def swap_all(root: Path, names: str, size: tuple[int, int]) -> None:
    for path in sorted(root.rglob(names)):
        swap(path, size)


def put_class_in_two_splits(root: Path) -> None:
    shutil.rmtree(root / "val/elk")
    swap(root / "val/ant/9.png", (9, 9))


SMALL, UNCROPPED = (
    "images of 84 pixels or less.*: ",
    "classes whose images look uncropped, with a longer side of 500 pixels: ",
)
DOG, CHANGED = (
    "dog has 5 of 6",
    "files were changed, renamed, added or removed since prepare.py wrote .*manifest.json. Build",
)
LATIN = "filename,label\n0.jpg,\u00e9lan\n".encode("latin-1")
# What is done to which data set, and all faults that are then reported, in this order. A path begins at the root.
DAMAGE = {
    "image lost": ("fc100", lambda at: at("train/ant/0.png").unlink(), ["in train .*few .*: ant has 5 of 6. Get"]),
    "image added": ("cifar_fs", lambda at: swap(at("meta-val/elk/x.png")), ["many.*: elk has 7 of 6"]),
    "image lost, total known only": (
        "tieredimagenet",
        lambda at: at("val/dog/0.png").unlink(),
        ["^val has 11 images, the published split 12"],
    ),
    "class lost": (
        "fc100",
        lambda at: shutil.rmtree(at("val/elk")),
        ["classes missing from val: elk. Get the data set"],
    ),
    "class renamed": (
        "cifar_fs",
        lambda at: move(at("meta-test/gnu"), "Gnu"),
        ["classes missing from test: gnu", "classes in test that the published split does not have: Gnu"],
    ),
    "class in the wrong split": (
        "fc100",
        lambda at: move(at("val/elk"), "../train/elk"),
        ["classes in train that belong in another split: elk belongs in val. Move", "classes missing from val: elk"],
    ),
    "class in two splits": (
        "omniglot",
        lambda at: put_class_in_two_splits(at()),
        ["classes both in train and in val: ant. Leave each class in one split"],
    ),
    "leak": (
        "omniglot",
        lambda at: shutil.copy(at("train/ant/0.png"), at("test/fox/renamed.png")),
        ["the same image in two splits: train/ant/0.png = test/fox/renamed.png. Remove it from one"],
    ),
    "image cut off": (
        "fc100",
        lambda at: shorten(at("test/fox/2.png")),
        [r"cannot be read: test/fox/2.png \(image file is truncated.*\). Replace"],
    ),
    "images cut off": (
        "fc100",
        lambda at: [shorten(path) for path in at("test/fox").iterdir()],
        ["files that cannot be read: 6, first test/fox/"],
    ),
    "image empty": ("cub", lambda at: at("ant/0.jpg").write_bytes(b""), [r"cannot be read: ant/0.jpg \("]),
    "image of another size": (
        "fc100",
        lambda at: swap(at("val/dog/0.png"), (33, 32)),
        [r"images that are not 32x32 RGB: val/dog/0.png \(33x32 RGB\)"],
    ),
    "grey image": ("cifar_fs", lambda at: swap(at("meta-val/dog/0.png"), mode="L"), [r"\(32x32 L\)"]),
    "broken link": (
        "fc100",
        lambda at: replace_by_link(at("val/dog/0.png")),
        [r"cannot be read: val/dog/0.png \(a broken link\)", DOG],
    ),
    "folder with the name of an image": ("fc100", lambda at: replace_by_folder(at("val/dog/0.png")), [DOG]),
    "the same in a table": (
        "cub",
        lambda at: replace_by_folder(at("dog/0.jpg")),
        ["rows without a file: .* no file .*/cub/dog/0.jpg'", DOG],
    ),
    "pipe": (
        "fc100",
        lambda at: os.mkfifo(at("val/dog/x.png")),
        [r"cannot be read: val/dog/x.png \(not a regular file\)"],
    ),
    "image beside the classes": ("fc100", lambda at: move(at("val/dog/0.png"), "../0.png"), [DOG]),
    "class empty": (
        "omniglot",
        lambda at: at("val/yak").mkdir(),
        ["class folders without an image: no images in .*val/yak. Remove"],
    ),
    "split lost": (
        "cifar_fs",
        lambda at: shutil.rmtree(at("meta-val")),
        ["missing splits: no val classes: there is no folder .*cifar_fs/meta-val. To get it: "],
    ),
    "table lost": (
        "cub",
        lambda at: at("split/val.csv").unlink(),
        ["missing splits: no list of val images: there is no file .*split/val.csv"],
    ),
    "file of a row lost": (
        "miniimagenet",
        lambda at: at("images/ant1.jpg").unlink(),
        ["rows without a file: .*train.csv, line 3: there is no file '.*ant1.jpg'. Get the images", "ant has 5 of 6"],
    ),
    "row lost": ("cub", lambda at: edit(at("split/test.csv"), "0.jpg,gnu\n", ""), ["gnu has 5 of 6"]),
    "image of a row in two classes": (
        "miniimagenet",
        lambda at: edit(at("split/val.csv"), "dog0.jpg,dog\n", "dog0.jpg,dog\ndog0.jpg,elk\n"),
        ["images in two rows: .*val.csv, line 3: 'dog0.jpg' is in two classes, 'dog' and 'elk'"],
    ),
    "image in two splits of a table": (
        "miniimagenet",
        lambda at: edit(at("split/val.csv"), "dog0.jpg,dog\n", "dog0.jpg,dog\nant0.jpg,dog\n"),
        ["images in two splits of the tables: images/ant0.jpg is in train ant and in val dog"],
    ),
    "table not UTF-8": (
        "cub",
        lambda at: at("split/val.csv").write_bytes(LATIN),
        ["cannot be read: .*val.csv, line 2: the byte 0xe9 is not text in UTF-8. Save"],
    ),
    "row outside": (
        "miniimagenet",
        lambda at: edit(at("split/val.csv"), "dog0.jpg,", "../images/dog0.jpg,"),
        ["rows that leave the data set: .*line 2: '../images/dog0.jpg' of class", DOG],
    ),
    "shrunk": (
        "miniimagenet",
        lambda at: swap_all(at(), "*.jpg", (84, 84)),
        [SMALL + "42 of 42, first .* many of them: .* and 4 more. This costs 8-10 points"],
    ),
    "shrunk in part": (
        "tieredimagenet",
        lambda at: swap_all(at(), "elk/*.png", (84, 60)),
        [SMALL + "6 of 42, first val/elk/0.png; classes with many of them: val elk. This costs"],
    ),
    "uncropped": (
        "cub",
        lambda at: swap_all(at(), "*.jpg", (500, 90)),
        [UNCROPPED + "7, first test fox. .* cost 15 points"],
    ),
    "uncropped in part": ("cub", lambda at: swap_all(at(), "dog/*.jpg", (90, 500)), [UNCROPPED + "val dog. Uncropped"]),
    "changed since it was prepared": ("fc100", lambda at: (write_manifest(at()), swap(at("val/dog/0.png"))), [CHANGED]),
    "renamed since it was prepared": (
        "fc100",
        lambda at: (write_manifest(at()), move(at("val/dog/0.png"), "00.png")),
        [CHANGED],
    ),
    "lost since it was prepared": (
        "fc100",
        lambda at: (write_manifest(at()), at("val/dog/0.png").unlink()),
        [DOG, CHANGED],
    ),
    "manifest of another set": (
        "fc100",
        lambda at: write_manifest(at(), dataset="cifar_fs"),
        ["is of the data set cifar_fs, not of fc100"],
    ),
    "manifest broken": (
        "fc100",
        lambda at: at(verify.MANIFEST).write_text("[1"),
        ["is not a manifest of prepare.py .*JSONDecodeError"],
    ),
    "manifest of something else": ("fc100", lambda at: at(verify.MANIFEST).write_text("[]"), ["is not a manifest of"]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(kind, copy, tmp_path, capsys):
    name, damage, expected = DAMAGE[kind]
    root = copy(name)
    damage(root.joinpath)
    status, report = check(capsys, name, tmp_path)
    assert status == 1
    assert len(report["faults"]) == len(expected), report["faults"]
    for fault, pattern in zip(report["faults"], expected, strict=True):
        assert re.search(pattern, fault), fault
    assert report["verdict"] == f"{name} in {root} is not right; faults: {len(expected)}"


def test_a_few_small_images_are_natural(copy, tmp_path, capsys, monkeypatch):
    swap(copy("tieredimagenet") / "val/dog/0.png", (84, 84))
    monkeypatch.setattr(verify, "MOST_SMALL_IN_CLASS", 1 / EACH)
    monkeypatch.setattr(verify, "MOST_SMALL", 1 / 42)
    status, report = check(capsys, "tieredimagenet", tmp_path)
    assert (status, report["notes"]) == (0, ["images of 84 pixels or less, a few of which are natural: 1"])
    monkeypatch.setattr(verify, "MOST_SMALL", 0.9 / 42)  # spread over all classes
    assert "first val/dog/0.png. This costs" in check(capsys, "tieredimagenet", tmp_path)[1]["faults"][0]


def test_manifest_of_what_is_there(copy, tmp_path, capsys):
    root = copy("fc100")
    (root / "README.txt").write_text("part of the tree")
    write_manifest(root)
    (root / ".DS_Store").write_text("not part of it")
    assert check(capsys, "fc100", tmp_path)[1]["faults"] == []
    (root / "README.txt").write_text("changed")
    assert len(check(capsys, "fc100", tmp_path)[1]["faults"]) == 1


def test_faults_are_collected_and_the_worst_comes_first(copy, tmp_path, capsys):
    root = copy("fc100")
    swap(root / "val/dog/0.png", (16, 16))
    shorten(root / "val/dog/1.png")
    shutil.rmtree(root / "val/elk")
    shutil.copy(root / "train/ant/0.png", root / "val/dog/2.png")
    (root / "train/ant/1.png").unlink()
    (root / "test").rename(root / "novel")
    faults = check(capsys, "fc100", tmp_path)[1]["faults"]
    words = ["no test classes", "missing from val: elk", "two splits", "16x16", "be read", "ant has 5 of 6"]
    assert len(faults) == len(words)
    assert all(word in fault for word, fault in zip(words, faults, strict=True)), faults


@pytest.mark.parametrize("what", ["val/dog/0.png", "val/dog", "split/val.csv", "manifest.json"])
def test_no_permission(what, copy, tmp_path, capsys, monkeypatch):
    name = "cub" if what.endswith("csv") else "fc100"
    root = copy(name)
    (root / "manifest.json").write_text("{}")
    for function in ("read_bytes", "read_text", "iterdir"):
        refuse(monkeypatch, Path, function, f"{root / what}")
    faults = check(capsys, name, tmp_path)[1]["faults"]
    assert any(re.search(f"{what}.*Permission denied", fault) for fault in faults), faults


def test_odd_names_stay_on_one_line(copy, tmp_path, capsys):
    root = copy("fc100")
    odd = os.fsencode(root / "val" / "dog") + b"/a\xff\n.png"
    Path(os.fsdecode(odd)).write_bytes(b"no image")
    faults = check(capsys, "fc100", tmp_path)[1]["faults"]
    assert len(faults) == 2
    assert "val/dog/a??.png" in faults[0]


def test_nothing_there(tmp_path, capsys):
    for data_dir, what in ((tmp_path, "cub"), (tmp_path / "gone", "gone")):
        assert verify.main(["cub", "-data_dir", str(data_dir)]) == 1
        out = capsys.readouterr().out
        assert re.fullmatch(
            rf"cub is missing: there is no folder \S*{what}. Set -data_dir, or get it: python [^\n]+\n", out
        )
        assert check(capsys, "cub", data_dir)[1]["path"] is None
    (tmp_path / "FC100").mkdir()
    assert check(capsys, "fc100", tmp_path)[1]["faults"][0].startswith("missing splits: 3, first ")


def test_bad_flags(capsys):
    for argv in ([], ["imagenet"], ["cub", "-gpu", "0"]):
        with pytest.raises(SystemExit) as ended:
            verify.main(argv)
        assert ended.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_json_file(originals, tmp_path, capsys):
    file = tmp_path / "deep" / "report.json"
    assert verify.main(["cub", "-data_dir", str(originals), "-json", str(file)]) == 0
    assert json.loads(file.read_text()) == verify.verify("cub", originals)
    assert capsys.readouterr().out.splitlines()[-1].startswith("cub in ")


# --- the cheap part, when a script opens a data set ---


def test_difference_names_a_few():
    found = checks.compare_classes("fc100", "train", ["ant", "x", "y", "z", "w"])
    assert str(found) == "missing: bee, cat; unknown: w, x, y and 1 more"
    assert not any(checks.compare_classes("folder", "train", ["x"]))
