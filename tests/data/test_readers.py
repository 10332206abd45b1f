"""Splits on disk: folders of classes, tables, and what is wrong with them."""

import os
import shutil
from pathlib import Path

import pytest
from data_helpers import open_split, refuse, write_table
from helpers import write_images
from PIL import Image

from dataloader import CATALOG
from dataloader.images import IMAGE_SUFFIXES
from dataloader.published import published_classes
from dataloader.readers import image_files, read_split
from utils import InputError


def test_miniimagenet_layout(tmp_path, capsys):
    root = tmp_path / "miniimagenet"
    names = write_images(root / "images", 4, suffix=".jpg")
    (root / "split").mkdir()
    rows = [f"{names[0]},n02", f"{names[1]},n01", f"{names[2]},n02", f"{names[3]},n01"]
    (root / "split" / "test.csv").write_text("filename,label\n" + "\n".join(rows) + "\n")
    data = open_split("miniimagenet", tmp_path)
    assert data.class_names == ["n01", "n02"]
    assert data.labels == [0, 0, 1, 1]
    assert [path.rsplit("/", 1)[1] for path in data.paths] == [names[1], names[3], names[0], names[2]]
    warnings = capsys.readouterr().err
    assert "has 2 classes; the published split has 20" in warnings
    assert "original size" in warnings


def opening_warnings(capsys, name: str, data_dir, split: str) -> list[str]:
    open_split(name, data_dir, split)
    lines = capsys.readouterr().err.splitlines()
    more = f". For a full check: python datasets/verify.py {name}"
    assert all(line.startswith("warning: ") and line.endswith(more) for line in lines)
    return [line.removeprefix("warning: ").removesuffix(more) for line in lines]


def test_opening_a_set_compares_it_with_the_published_one(tmp_path, capsys, monkeypatch):
    rows = [{"split": "val", "class": name, "images": "3"} for name in "abcd"]
    monkeypatch.setattr("dataloader.published._rows", lambda table: rows)
    root = tmp_path / "FC100" / "val"
    for name in "abcd":
        write_images(root / name, 3, size=32)
    assert opening_warnings(capsys, "fc100", tmp_path, "val") == []
    (root / "b" / "0000.png").unlink()
    (root / "c" / "0000.png").unlink()
    assert opening_warnings(capsys, "fc100", tmp_path, "val") == [
        "fc100 val: 2 classes lack images or have too many, first b: 2 of 3"
    ]
    (root / "b").rename(root / "e")
    write_images(root / "c", 3, size=20)
    assert opening_warnings(capsys, "fc100", tmp_path, "val") == [
        "fc100 val has 4 classes; the published split has 4 (missing: b; unknown: e)",
        f"3 of 11 sampled images of fc100 val are not 32x32 as published, first {root}/c/0000.png: 20x20",
    ]


def test_opening_tieredimagenet_compares_the_total(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dataloader.published._rows", lambda table: [{"split": "val", "class": "a"}])
    monkeypatch.setattr("dataloader.published._IMAGES", {"tieredimagenet": {"val": 4}})
    root = tmp_path / "tiered_imagenet" / "val" / "a"
    write_images(root, 4, size=85)
    assert opening_warnings(capsys, "tieredimagenet", tmp_path, "val") == []
    (root / "0000.png").unlink()
    assert opening_warnings(capsys, "tieredimagenet", tmp_path, "val") == [
        "tieredimagenet val has 3 images; the published split has 4"
    ]


def test_a_few_small_images_are_natural(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dataloader.published._rows", lambda table: [])
    monkeypatch.setattr("dataloader.published._IMAGES", {})
    root = tmp_path / "tiered_imagenet" / "val" / "a"
    write_images(root, 32, size=85)
    for small, number in enumerate((0, 2, 30), start=1):  # every other image is looked at, the first among them
        write_images(root / "new", 1, size=84)
        (root / "new" / "0000.png").replace(root / f"{number:04d}.png")
        (root / "new").rmdir()
        warnings = opening_warnings(capsys, "tieredimagenet", tmp_path, "val")
        assert len(warnings) == (small > 2)
    assert warnings[0].startswith(
        f"3 of 16 sampled images of tieredimagenet val are 84 pixels or less (first {root}/0000"
    )


@pytest.mark.parametrize("below", ["", "images"])
def test_cub_layouts(tmp_path, below):
    root = tmp_path / "cub"
    for name in ("001.Crow", "002.Wren"):
        write_images(root / below / name, 2, suffix=".jpg")
    (root / "split").mkdir()
    table = "filename, label, concept_label\n" + "".join(
        f"{file},{name},1,0,1\n" for name in ("002.Wren", "001.Crow") for file in ("0000.jpg", "0001.jpg")
    )
    (root / "split" / "test.csv").write_text(table)
    data = open_split("cub", tmp_path)
    assert data.class_names == ["001.Crow", "002.Wren"]
    assert data.labels == [0, 0, 1, 1]
    assert data[0][0].shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        *(("tieredimagenet", f"{name}/val") for name in ("tiered_imagenet", "tieredimagenet")),
        *(("fc100", "FC100/val"), ("cifar_fs", "cifar_fs/meta-val"), ("folder", "val"), ("glyphs", "glyphs/val")),
    ],
)
def test_folder_layouts(tmp_path, name, folder):
    for number in (1, 0):
        write_images(tmp_path / folder / f"class{number}", 2)
    (tmp_path / folder / "stray.tar.gz").write_bytes(b"")
    (tmp_path / folder / "class0" / "notes.txt").write_text("")
    (tmp_path / folder / "class0" / "._0000.png").write_bytes(b"")  # macOS leaves these
    (tmp_path / folder / ".cache").mkdir()
    data = open_split(name, tmp_path, "val")
    assert data.class_names == ["class0", "class1"]
    assert data.labels == [0, 0, 1, 1]
    assert len(data) == 4


def test_constants():
    assert CATALOG["cifar_fs"].mean == (0.5071, 0.4866, 0.4409)
    for name in ("miniimagenet", "cub", "tieredimagenet", "fc100"):
        assert CATALOG[name].std is None  # the encoder's own
    published = {name: published_classes(name) for name, spec in CATALOG.items() if spec.is_published}
    assert all(list(splits) == ["train", "val", "test"] for splits in published.values())
    classes = {name: tuple(map(len, splits.values())) for name, splits in published.items()}
    assert classes == {
        "miniimagenet": (64, 16, 20),
        "cub": (100, 50, 50),
        "tieredimagenet": (351, 97, 160),
        "fc100": (60, 20, 20),
        "cifar_fs": (64, 16, 20),
    }


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("folder", shutil.rmtree, "no folder .*data. Set -data_dir to the folder that holds the data, or get it: put"),
        (
            "cub",
            lambda _: None,
            "no data set in .*cub: there is no such folder. .*get it: python datasets/prepare.py cub$",
        ),
        ("folder", lambda root: shutil.rmtree(root / "test"), "no test classes: there is no folder"),
        ("folder", lambda root: (root / "test/empty").mkdir(), "no images in .*empty. Remove the folder or fill it"),
        ("miniimagenet", lambda root: (root / "miniimagenet").mkdir(), "no list of test images: .* no file .*test.csv"),
    ],
)
def test_missing_things(tmp_path, name, spoil, message):
    root = tmp_path / "data"
    write_images(root / "test" / "a", 1)
    spoil(root)
    with pytest.raises(InputError, match=message):
        open_split(name, root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "filename,label\nmissing.jpg,n01\n",
            "test.csv, line 2: there is no file '.*missing.jpg'. Get the images again",
        ),
        ("filename,label\n\n0000.jpg\n", "line 3: a row is file,class; this one is '0000.jpg'"),
        ("filename,label\n,n01\n", "line 2: a row is file,class; this one is ',n01'"),
        ("filename,label\n0000.jpg, \n", "line 2: a row is file,class; this one is '0000.jpg, '"),
        ("filename,label\n0000,n01\n", "line 2: a row begins with the name of an image; '0000' does not"),
        ("filename,label\n", "has no rows file,class"),
        ("", "has no rows file,class"),
        ("filename,label\n0000.jpg,é\n".encode("latin-1"), "test.csv, line 2: the byte 0xe9 is not text in UTF-8"),
        ("filename,label\n0000.jpg,n01\n".encode("utf-16"), "test.csv, line 1: the byte 0xff is not text in UTF-8"),
        ("filename,label\n0000.jpg,n01\n".encode("utf-16-le"), r"test.csv, line [12]: "),
        ("filename,label\n0000.jpg," + "n" * 200_000, r"test.csv, line 2: .*cannot be read \(field larger than"),
        ('filename,label\n"0000.jpg,n01\n' + "0001.jpg,n01\n" * 50, r"line 52: a row [^\n]{1,300}$"),
        ("0000.jpg,n01\n../images/0000.jpg,n01\n", "line 2: '../images/0000.jpg' of class 'n01' is outside of "),
        ("0000.jpg,n01\n/etc/x.jpg,n01\n", "line 2: '/etc/x.jpg' of class 'n01' is outside of "),
        ("0000.jpg,n01\n0001.jpg,n01\n0000.jpg,n02\n", "line 3: '0000.jpg' is in two classes, 'n01' and 'n02'. Remove"),
    ],
)
def test_bad_csv(tmp_path, content, message):
    write_table(tmp_path, content)
    with pytest.raises(InputError, match=message) as refused:
        open_split("miniimagenet", tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "header", ["", "filename,label\n", "\n\nfilename, label\n", "\ufefffilename,label\n", "\ufeff"]
)
def test_csv_with_and_without_header(tmp_path, header):
    write_table(tmp_path, header + "0000.jpg,n01\r\n._0000.jpg,n01\n\n0001.jpg,n02\n")
    data = open_split("miniimagenet", tmp_path)
    assert [Path(path).name for path in data.paths] == ["0000.jpg", "0001.jpg"]
    assert data.class_names == ["n01", "n02"]


def test_repeated_rows_count_once(tmp_path):
    write_table(tmp_path, "0001.jpg,n01\n0000.jpg,n01\n./0001.jpg,n01\n0000.jpg,n01\n0002.jpg,n02\n")
    data = open_split("miniimagenet", tmp_path)
    assert [Path(path).name for path in data.paths] == ["0001.jpg", "0000.jpg", "0002.jpg"]


def test_cub_rows_stay_below_the_folder(tmp_path):
    write_images(tmp_path / "cub" / "a", 1, suffix=".jpg")
    (tmp_path / "cub" / "split").mkdir()
    (tmp_path / "cub" / "split" / "test.csv").write_text("0000.jpg,a\n0000.jpg,../cub/a\n")
    with pytest.raises(InputError, match=r"line 2: '0000.jpg' of class '../cub/a' is outside of .*cub"):
        open_split("cub", tmp_path)


@pytest.mark.parametrize(
    ("function", "what"),
    [("is_dir", "test"), ("iterdir", "test"), ("iterdir", "n01"), ("scandir", "images"), ("read_bytes", "test.csv")],
)
def test_no_permission_to_list(tmp_path, monkeypatch, function, what):
    write_table(tmp_path, "0000.jpg,n01\n")
    write_images(tmp_path / "test" / "n01", 1)
    refuse(monkeypatch, os if function == "scandir" else Path, function, f"/{what}")
    name = "miniimagenet" if what in ("images", "test.csv") else "folder"
    message = rf"{what} cannot be read \(Permission denied\). Check its permissions$"
    with pytest.raises(InputError, match=message):
        open_split(name, tmp_path)


def test_what_is_left_out_of_class_folders_is_counted(tmp_path, capsys):
    for name in ("a", "b"):
        write_images(tmp_path / "test" / name, 2)
    open_split("folder", tmp_path)
    assert capsys.readouterr().err == ""
    for name in ("a/0.heic", "a/1.HEIC", "a/2.avi", "b/x.xyz", "b/notes.txt", "b/Thumbs.db", "b/.hidden"):
        (tmp_path / "test" / name).write_bytes(b"")
    (tmp_path / "test" / "b" / "more").mkdir()
    write_images(tmp_path / "test", 1)
    assert len(open_split("folder", tmp_path)) == 4
    beside, inside = capsys.readouterr().err.splitlines()
    assert f"1 images in {tmp_path}/test itself are left out, first 0000.png. Move" in beside
    left_out = "6 that cannot be read as images (.avi 1, .heic 2, .txt 1 and 2 other kinds), first a/0.heic"
    assert inside == f"warning: left out of {tmp_path}/test: {left_out}"


def test_only_files_are_images(tmp_path, capsys):
    write_images(tmp_path / "test" / "n01", 1, suffix=".jpg")
    for folder in ("test/n01", "miniimagenet/images"):
        (tmp_path / folder / "folder.jpg").mkdir(parents=True)
        os.mkfifo(tmp_path / folder / "pipe.jpg")  # to open it would wait for ever
        (tmp_path / folder / "gone.jpg").symlink_to("nowhere")
        (tmp_path / folder / "circle.jpg").symlink_to("circle.jpg")
    assert len(open_split("folder", tmp_path, verify=True)) == 1
    warned = "4 that cannot be read as images (.jpg 4), first n01/circle.jpg"
    assert capsys.readouterr().err == f"warning: left out of {tmp_path}/test: {warned}\n"
    table = write_table(tmp_path, "")
    for name in ("folder", "pipe", "gone", "circle"):
        table.write_text(f"{name}.jpg,n01\n")
        with pytest.raises(InputError, match=f"line 1: there is no file '.*{name}.jpg'"):
            open_split("miniimagenet", tmp_path)


def test_linked_classes_and_every_suffix_of_pillow_are_read(tmp_path):
    write_images(tmp_path / "elsewhere", 1, suffix=".jpg")
    (tmp_path / "elsewhere" / "0000.jpg").rename(tmp_path / "elsewhere" / "0000.JFIF")
    for suffix in (".jpe", ".tga", ".pgm", ".jp2", ".ico", ".apng"):
        Image.new("L", (20, 20), 99).save(tmp_path / "elsewhere" / f"grey{suffix}")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "linked").symlink_to(tmp_path / "elsewhere")
    data = open_split("folder", tmp_path)
    assert (len(data), data.class_names) == (7, ["linked"])
    assert all(data[index][0].shape == (3, 16, 16) for index in range(7))
    assert not IMAGE_SUFFIXES & {".pdf", ".eps", ".ps", ".mpg", ".flc", ".wmf", ".h5", ".txt", ".npy", ""}


def test_image_files_follows_links_once_around(tmp_path, capsys):
    for name in ("tree/b", "tree/a/deep", "elsewhere", "tree/.hidden"):
        write_images(tmp_path / name, 1)
    (tmp_path / "tree" / "linked").symlink_to(tmp_path / "elsewhere")
    found = [str(Path(file).relative_to(tmp_path)) for file in image_files([str(tmp_path / "tree")])]
    expected = ["tree/a/deep/0000.png", "tree/b/0000.png", "tree/linked/0000.png"]
    assert found == expected
    assert capsys.readouterr().err == ""
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "tree")  # a circle
    (tmp_path / "tree" / "b" / "x.heic").write_bytes(b"")
    (tmp_path / "tree" / "b" / "gone.png").symlink_to("nowhere")
    found = list(image_files([str(tmp_path / "tree"), "a file.named"]))
    assert [*expected, "a file.named"] == [*(str(Path(file).relative_to(tmp_path)) for file in found[:-1]), found[-1]]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: left out of {tmp_path}/tree: 2 that cannot be read as images (.heic 1, .png 1)")
    (tmp_path / "empty").mkdir()
    assert list(image_files([str(tmp_path / "empty")])) == []
    assert capsys.readouterr().err == f"warning: no images in {tmp_path}/empty\n"


def test_the_caller_of_a_reader_may_give_the_advice(tmp_path):
    with pytest.raises(InputError, match=r"^there is no folder \S+gone. Look again$"):
        read_split(CATALOG["folder"], str(tmp_path / "gone"), "test", advice="Look again")


ODD_NAMES = ["-gpu", "a\nb", os.fsdecode(b"caf\xe9"), "caf\u00e9", "A", "a", "\u732b", "x" * 200, "100 %"]


def test_odd_class_names_pass_through(tmp_path, capsys):
    for number, name in enumerate(ODD_NAMES):
        write_images(tmp_path / "test" / name, 2, seed=number)
    data = open_split("folder", tmp_path, verify=True)
    assert data.class_names == sorted(ODD_NAMES)
    assert data.fingerprint()["classes"] == len(ODD_NAMES)
    assert all(data[index][1] == data.labels[index] for index in range(len(data)))
    for name in ODD_NAMES:
        (tmp_path / "test" / name / "0000.png").write_bytes(b"no image")
        (tmp_path / "test" / name / "notes\n.txt").write_bytes(b"")
    open_split("folder", tmp_path, verify=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + len(ODD_NAMES)  # what was left out, and an image of each class
    assert all(line.isprintable() and line.startswith("warning: left out") for line in lines)
