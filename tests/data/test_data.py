"""Layouts, views, episodes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GOLDEN, ROOT, write_images
from PIL import Image

from dataloader import (
    CATALOG,
    EpisodeSampler,
    ImageDataset,
    SeededBatches,
    SeededEpisodes,
    add_data_arguments,
    add_episode_arguments,
    draw_episodes,
    episode_labels,
    make_view,
)
from dataloader import dataset as dataset_module
from dataloader.views import Box, GridView, grid_boxes
from Models import ResNet12
from utils import InputError, make_parser, named_generator

ENCODER = ResNet12(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
FCN = make_view("fcn", train=False, image_size=16)


def open_split(name: str, data_dir, split: str = "test", **settings) -> ImageDataset:
    return ImageDataset(name, split, data_dir=str(data_dir), view=settings.pop("view", FCN), **settings)


def write_table(data_dir, content: str | bytes, images: int = 3) -> Path:
    """A miniimagenet tree of so many images 0000.jpg .. and a list of test images; returns the list."""
    write_images(data_dir / "miniimagenet" / "images", images, suffix=".jpg")
    table = data_dir / "miniimagenet" / "split" / "test.csv"
    table.parent.mkdir()
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    return table


def refuse(monkeypatch, owner, function: str, name: str) -> None:
    """Let a function fail as the system does for a file without permission, when its first argument ends in the name."""
    real = getattr(owner, function)

    def refusing(path, *args, **settings):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **settings)

    monkeypatch.setattr(owner, function, refusing)


# --- layouts ---


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
    assert "has 2 classes here; the published split has 20" in warnings
    assert "original size" in warnings


def opening_warnings(capsys, name: str, data_dir, split: str) -> list[str]:
    open_split(name, data_dir, split)
    lines = capsys.readouterr().err.splitlines()
    more = f". For all that can be said: python datasets/verify.py {name}"
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
        "fc100 val has 4 classes here; the published split has 4 (missing: b; unknown: e)",
        f"3 of 11 images looked at in fc100 val are not 32x32 as published, first {root}/c/0000.png: 20x20",
    ]


def test_opening_tieredimagenet_compares_the_total(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dataloader.published._rows", lambda table: [{"split": "val", "class": "a"}])
    monkeypatch.setattr("dataloader.published._IMAGES", {"tieredimagenet": {"val": 4}})
    root = tmp_path / "tiered_imagenet" / "val" / "a"
    write_images(root, 4, size=85)
    assert opening_warnings(capsys, "tieredimagenet", tmp_path, "val") == []
    (root / "0000.png").unlink()
    assert opening_warnings(capsys, "tieredimagenet", tmp_path, "val") == [
        "tieredimagenet val has 3 images here; the published split has 4"
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
        f"3 of 16 images looked at in tieredimagenet val are 84 pixels or less (first {root}/0000"
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
        ("tieredimagenet", "tiered_imagenet/val"),
        ("tieredimagenet", "tieredimagenet/val"),
        ("fc100", "FC100/val"),
        ("cifar_fs", "cifar_fs/meta-val"),
        ("folder", "val"),
        ("glyphs", "glyphs/val"),
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
    classes = {name: tuple(spec.classes.values()) for name, spec in CATALOG.items() if spec.classes}
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
        ("folder", lambda root: shutil.rmtree(root), "expected a folder; there is none"),
        (
            "cub",
            lambda root: None,
            "expected the data set in .*cub; there is no.*get it: python datasets/prepare.py cub$",
        ),
        ("folder", lambda root: shutil.rmtree(root / "test"), "expected the test classes in"),
        ("folder", lambda root: (root / "test" / "empty").mkdir(), "expected images in .*empty; found none"),
        ("miniimagenet", lambda root: (root / "miniimagenet").mkdir(), "list of test images in .*test.csv"),
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
            r"test.csv, line 2: expected 'missing.jpg' as '.*jpg'; there is no such file",
        ),
        ("filename,label\n\n0000.jpg\n", "line 3: expected file,class; got '0000.jpg'"),
        ("filename,label\n,n01\n", "line 2: expected file,class; got ',n01'"),
        ("filename,label\n0000.jpg, \n", "line 2: expected file,class; got '0000.jpg, '"),
        ("filename,label\n0000,n01\n", "line 2: expected the name of an image .*; got '0000'"),
        ("filename,label\n", "found none"),
        ("", "found none"),
        (
            "filename,label\n0000.jpg,é\n".encode("latin-1"),
            "test.csv, line 2: expected text in UTF-8; got the byte 0xe9",
        ),
        ("filename,label\n0000.jpg,n01\n".encode("utf-16"), "test.csv, line 1: expected text in UTF-8"),
        ("filename,label\n0000.jpg,n01\n".encode("utf-16-le"), "test.csv, line 1: .*; got a NUL byte"),
        (b"filename,label\n0000.jpg,n\x0001\n", "test.csv, line 2: .*; got a NUL byte"),
        (bytes(range(256)) * 4, "test.csv, line 3: expected text in UTF-8"),
        ("filename,label\n0000.jpg," + "n" * 200_000, r"test.csv, line 2: .*cannot be read \(field larger than"),
        ('filename,label\n"0000.jpg,n01\n' + "0001.jpg,n01\n" * 50, r"line 52: expected [^\n]{1,300}$"),
        ("0000.jpg,n01\n../images/0000.jpg,n01\n", "line 2: expected a file below .*; got '../images/0000.jpg'"),
        ("0000.jpg,n01\n/etc/x.jpg,n01\n", "line 2: expected a file below .*; got '/etc/x.jpg'"),
        (
            "0000.jpg,n01\n0001.jpg,n01\n0000.jpg,n02\n",
            "line 3: expected one class for '0000.jpg'; got 'n01' and 'n02'",
        ),
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


def test_repeated_rows_count_once(tmp_path, capsys):
    table = write_table(tmp_path, "0001.jpg,n01\n0000.jpg,n01\n./0001.jpg,n01\n0000.jpg,n01\n0002.jpg,n02\n")
    data = open_split("miniimagenet", tmp_path)
    assert [Path(path).name for path in data.paths] == ["0001.jpg", "0000.jpg", "0002.jpg"]
    assert f"warning: {table}: rows that repeat an earlier one, ignored: 2\n" in capsys.readouterr().err


def test_cub_rows_stay_below_the_folder(tmp_path):
    write_images(tmp_path / "cub" / "a", 1, suffix=".jpg")
    (tmp_path / "cub" / "split").mkdir()
    (tmp_path / "cub" / "split" / "test.csv").write_text("0000.jpg,a\n0000.jpg,../cub/a\n")
    with pytest.raises(InputError, match=r"line 2: expected a file below .*cub; got '0000.jpg' of class '../cub/a'"):
        open_split("cub", tmp_path)


@pytest.mark.parametrize(
    ("function", "what"),
    [("is_dir", "test"), ("iterdir", "test"), ("iterdir", "n01"), ("iterdir", "images"), ("read_bytes", "test.csv")],
)
def test_no_permission_to_list(tmp_path, monkeypatch, function, what):
    write_table(tmp_path, "0000.jpg,n01\n")
    write_images(tmp_path / "test" / "n01", 1)
    refuse(monkeypatch, Path, function, f"/{what}")
    name = "miniimagenet" if what in ("images", "test.csv") else "folder"
    message = rf"expected to read .*{what}; it cannot be read \(Permission denied\). Check its permissions$"
    with pytest.raises(InputError, match=message):
        open_split(name, tmp_path)


# --- images ---


def test_unreadable_image(tmp_path, capsys):
    for name in ("a", "b"):
        write_images(tmp_path / "test" / name, 3)
    broken = tmp_path / "test" / "a" / "0001.png"
    broken.write_bytes(broken.read_bytes()[:80])
    data = open_split("folder", tmp_path)
    with pytest.raises(
        InputError, match=r"a/0001.png; it cannot be read .* or skip unreadable files with -verify_images$"
    ):
        data[1]
    verified = open_split("folder", tmp_path, verify=True)
    assert len(verified) == 5
    assert str(broken) not in verified.paths
    warnings = capsys.readouterr().err
    assert "left out: expected an image in" in warnings
    assert "-verify_images" not in warnings
    for rest in ("0000.png", "0002.png"):
        (tmp_path / "test" / "a" / rest).write_bytes(b"")
    with pytest.raises(InputError, match="no image of class a can be read"):
        open_split("folder", tmp_path, verify=True)


def test_no_permission_to_read_an_image(tmp_path, monkeypatch):
    write_images(tmp_path / "test" / "a", 2)
    data = open_split("folder", tmp_path)
    refuse(monkeypatch, Image, "open", "0001.png")
    with pytest.raises(InputError, match=r"a/0001.png; it cannot be read .*Permission denied"):
        data[1]


def test_unreadable_first_image_of_a_set_of_large_images(tmp_path):
    write_table(tmp_path, "0000.jpg,n01\n")
    (tmp_path / "miniimagenet" / "images" / "0000.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"expected an image in .*0000.jpg; it cannot be read"):
        open_split("miniimagenet", tmp_path)


RAMP = np.arange(0, 2**16, 16, dtype=np.uint16).reshape(64, 64)


@pytest.mark.parametrize(
    ("values", "suffix", "mode"),
    [
        (RAMP, ".png", "I;16"),
        (RAMP, ".tif", "I;16"),
        (RAMP.astype(">u2"), ".tif", "I;16B"),
        (RAMP.astype(np.int32), ".tif", "I"),
    ],
)
def test_16_bit_images_are_scaled(tmp_path, values, suffix, mode):
    (tmp_path / "test" / "a").mkdir(parents=True)
    file = tmp_path / "test" / "a" / f"ramp{suffix}"
    Image.fromarray(values).save(file, **({"compress_level": 0} if suffix == ".png" else {}))
    assert Image.open(file).mode == mode
    view = make_view("grid", train=False, image_size=64, patch_list=(1,), patch_ratio=1.0)
    pixels = open_split("folder", tmp_path, view=view)[0][0][0]
    assert np.array_equal(pixels.numpy(), np.broadcast_to(np.rint(RAMP / 257), (3, 64, 64)))
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(InputError, match=f"expected an image in {file}; it cannot be read"):
        open_split("folder", tmp_path, view=view)[0]


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (RAMP / np.float32(2**16), "floats"),
        (RAMP.astype(np.int32) + 1000, "1000 to 66520"),
        (RAMP.astype(np.int32) - 1, "-1 to 65519"),
    ],
)
def test_images_of_other_numbers_are_refused(tmp_path, values, what):
    (tmp_path / "test" / "a").mkdir(parents=True)
    Image.fromarray(values).save(tmp_path / "test" / "a" / "deep.tif")
    data = open_split("folder", tmp_path)
    with pytest.raises(InputError, match=rf"expected pixels of 8 or 16 bits in .*deep.tif; got {what}. Convert it"):
        data[0]


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_palette_and_transparency(tmp_path):
    (tmp_path / "test" / "a").mkdir(parents=True)
    colours = Image.fromarray(np.random.RandomState(0).randint(0, 256, (16, 16, 4), dtype=np.uint8))
    for name, picture in (("palette", colours.convert("RGB").quantize(8)), ("transparent", colours)):
        picture.save(
            tmp_path / "test" / "a" / f"{name}.png", **({"transparency": b"\0\x7f"} if name == "palette" else {})
        )
    view = make_view("grid", train=False, image_size=16, patch_list=(1,), patch_ratio=1.0)
    data = open_split("folder", tmp_path, view=view)
    for index, path in enumerate(data.paths):
        expected = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(data[index][0][0].numpy(), expected)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )


def test_huge_images_are_named_once(tmp_path):
    write_images(tmp_path / "test" / "a", 2)  # 400 pixels each
    code = """if True:
        import sys
        from PIL import Image
        from dataloader import ImageDataset, make_view
        Image.MAX_IMAGE_PIXELS = 399
        view = make_view("fcn", train=False, image_size=16)
        data = ImageDataset("folder", "test", data_dir=sys.argv[1], view=view)
        data[0], data[1], data[0]
        Image.MAX_IMAGE_PIXELS = 199
        try:
            data[0]
        except ValueError as error:
            print(error)
    """
    done = run_python(code, str(tmp_path))
    expected = [f"warning: {tmp_path}/test/a/000{number}.png has 0 million pixels" for number in (0, 1)]
    assert [line.partition(",")[0] for line in done.stderr.splitlines()] == expected
    assert "0000.png; it cannot be read (Image size (400 pixels) exceeds limit" in done.stdout


# --- views ---


def test_grid_boxes_golden():
    cases = json.loads((GOLDEN / "grid_locations.json").read_text())
    assert len(cases) == 60
    for case in cases:
        found = grid_boxes(case["size"], case["num_grid"], case["ratio"])
        assert found == [tuple(pair) for pair in case["locations"]]


@pytest.mark.parametrize("image", ["a", "b", "c"])
def test_views_golden(tmp_path, image):
    with np.load(GOLDEN / "views.npz") as figures:
        height, width = figures[f"size_{image}"]
        picture = Image.fromarray(figures[f"base_{image}"]).resize((width, height), Image.Resampling.BILINEAR)
        picture.save(tmp_path / "image.png")
        picture = Image.open(tmp_path / "image.png").convert("RGB")
        for name in ("miniimagenet", "cifar_fs"):
            encoder = ResNet12(mean=CATALOG[name].mean, std=CATALOG[name].std)
            found = encoder.normalize(make_view("fcn", train=False)(picture))[:, ::6, ::6]
            assert np.array_equal(found.numpy(), figures[f"{name}_fcn_{image}"])
        for patch_list in ((2, 3), (5,), (1, 2)):
            found = ResNet12().normalize(make_view("grid", train=False, patch_list=patch_list)(picture))[
                :, :, ::12, ::12
            ]
            expected = figures[f"miniimagenet_grid_{'_'.join(map(str, patch_list))}_{image}"]
            assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize(
    ("deepemd", "shape"), [("fcn", (3, 16, 16)), ("grid", (13, 3, 16, 16)), ("sampling", (4, 3, 16, 16))]
)
@pytest.mark.parametrize("train", [True, False])
def test_items_are_bytes(folder, deepemd, shape, train):
    view = make_view(deepemd, train=train, image_size=16, num_patch=4)
    pixels, label = open_split("folder", folder, view=view)[8, 5]
    assert (pixels.shape, pixels.dtype, label) == (shape, torch.uint8, 1)
    assert pixels.is_contiguous()
    before = pixels.clone()
    assert ENCODER.normalize(pixels.expand(2, *shape)).shape == (2, *shape)  # a batch of them
    assert torch.equal(pixels, before)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        picture = Image.open(folder / "test" / "class1" / "0001.png").convert("RGB")
        assert torch.equal(view(picture), pixels)


def published(deepemd: str, train: bool, picture: Image.Image, patch_list, num_patch: int) -> torch.Tensor:
    """What torchvision's transforms make of an image, put together as the published system does."""
    from torchvision import transforms

    last = [transforms.ToTensor(), transforms.Normalize(ENCODER.mean, ENCODER.std)]
    flip = [transforms.RandomHorizontalFlip()]
    if deepemd == "grid":
        patches = []
        for cells in patch_list:
            ratio = 1 + 2 * torch.rand(()).item() if train else 2.0
            for upper, lower in grid_boxes(picture.height, cells, ratio):
                for left, right in grid_boxes(picture.width, cells, ratio):
                    patches.append(picture.crop((left, upper, right, lower)))
        patch = transforms.Compose([transforms.Resize([30, 30]), *(flip if train else []), *last])
        return torch.stack([patch(each) for each in patches])
    if deepemd == "fcn" and not train:
        resized = round(30 * 92 / 84)
        return transforms.Compose([transforms.Resize([resized, resized]), transforms.CenterCrop(30), *last])(picture)
    crop = transforms.Compose([transforms.RandomResizedCrop(30), *flip, *last])
    return crop(picture) if deepemd == "fcn" else torch.stack([crop(picture) for _ in range(num_patch)])


@pytest.mark.parametrize("size", [(47, 33), (20, 90), (30, 30), (33, 33)])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("deepemd", ["fcn", "grid", "sampling"])
def test_views_equal_torchvision_to_the_bit(deepemd, train, size):
    pixels = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    view = make_view(deepemd, train=train, image_size=30, patch_list=(3, 2, 1), num_patch=5)
    with torch.random.fork_rng():
        for seed in range(4):
            torch.manual_seed(seed)
            expected = published(deepemd, train, picture, (3, 2, 1), 5)
            state = torch.get_rng_state()
            torch.manual_seed(seed)
            boxes = view.boxes(size)
            assert torch.equal(torch.get_rng_state(), state)  # as many draws, and all of them here
            found = ENCODER.normalize(view.render(picture, boxes))
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("image_size", range(40, 56))
def test_middle_of_the_evaluation_view(image_size):
    from torchvision import transforms

    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (60, 70, 3), dtype=np.uint8))
    resized = round(image_size * 92 / 84)
    middle = transforms.Compose([transforms.Resize([resized, resized]), transforms.CenterCrop(image_size)])(picture)
    view = make_view("fcn", train=False, image_size=image_size)
    found = view.render(picture, view.boxes(picture.size))
    assert np.array_equal(found.numpy(), np.asarray(middle).transpose(2, 0, 1))


def test_boxes_of_evaluation():
    assert FCN.boxes((50, 40)) == [Box(0, 0, 50, 40)]
    grid = make_view("grid", train=False, patch_list=(1, 2), patch_ratio=1.0)
    quarters = [Box(0, 0, 24, 20), Box(25, 0, 49, 20), Box(0, 20, 24, 40), Box(25, 20, 49, 40)]
    assert grid.boxes((50, 40)) == [Box(0, 0, 50, 40), *quarters]


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"train": False, "patch_list": (33,), "patch_ratio": 2.0}, (32, 32)),
        ({"train": False, "patch_list": (33,), "patch_ratio": 4.0}, (200, 32)),  # boxes not empty, but all the same
        ({"train": False, "patch_list": (2, 20), "patch_ratio": 1.0}, (32, 200)),
        ({"train": True, "patch_list": (20,), "patch_ratio": 9.0}, (32, 200)),  # in training the ratio may be 1
        ({"train": True, "patch_list": (99,), "patch_ratio": 2.0}, (32, 32)),
    ],
)
def test_grid_finer_than_the_pixels(settings, size):
    message = rf"for {settings['patch_list'][-1]} cells along each edge \(-patch_list\); got {size[0]}x{size[1]} pixels"
    with pytest.raises(InputError, match=message):
        GridView(image_size=16, **settings).boxes(size)


def test_grid_as_fine_as_the_pixels(folder):
    view = GridView(train=False, image_size=16, patch_list=(20,), patch_ratio=2.0)
    assert view.boxes((20, 20))[21] == Box(0, 0, 2, 2)
    too_fine = make_view("grid", train=False, image_size=16, patch_list=(21,))
    with pytest.raises(InputError, match=r"class0/0000.png: expected an image large enough for 21 cells"):
        open_split("folder", folder, view=too_fine)[0]


def test_torchvision_is_not_imported_before_it_is_needed():
    code = """if True:
        import sys
        import dataloader, dataloader.arguments
        assert "torchvision" not in sys.modules
        from PIL import Image
        image = Image.new("RGB", (20, 20))
        stats = {"image_size": 16}
        dataloader.make_view("fcn", train=False, **stats)(image)
        dataloader.make_view("grid", train=True, **stats)(image)
        assert "torchvision" not in sys.modules
        # Before loader processes are forked, which would each import it otherwise.
        dataloader.make_view("sampling", train=False, **stats)
        assert "torchvision" in sys.modules
    """
    run_python(code)


def test_what_is_random(folder):
    def is_random(deepemd, train):
        data = open_split("folder", folder, view=make_view(deepemd, train=train, image_size=16))
        assert torch.equal(data[0, 5][0], data[0, 5][0])  # the same seed gives the same view
        return not torch.equal(data[0, 5][0], data[0, 6][0])

    assert [is_random(name, True) for name in ("fcn", "grid", "sampling")] == [True, True, True]
    assert [is_random(name, False) for name in ("fcn", "grid", "sampling")] == [False, False, True]


def test_grid_ratio_in_training_is_drawn_per_level():
    view = GridView(train=True, image_size=16, patch_list=(2, 3), patch_ratio=2.0)
    torch.manual_seed(0)
    ratios = [1 + 2 * torch.rand(()).item() for _ in range(2)]
    torch.manual_seed(0)
    boxes = [box[:4] for box in view.boxes((100, 60))]
    assert boxes[0] == (0, 0, grid_boxes(100, 2, ratios[0])[0][1], grid_boxes(60, 2, ratios[0])[0][1])
    assert boxes[4] == (0, 0, grid_boxes(100, 3, ratios[1])[0][1], grid_boxes(60, 3, ratios[1])[0][1])
    assert boxes[1][0] > 0
    assert boxes[1][1] == 0  # row by row: the second patch lies right of the first


def test_one_decode_per_image(folder, monkeypatch):
    calls = []
    real = dataset_module.read_image
    monkeypatch.setattr(
        dataset_module, "read_image", lambda path, **settings: calls.append(path) or real(path, **settings)
    )
    open_split("folder", folder, view=make_view("sampling", train=False, image_size=16))[0]
    assert len(calls) == 1


def test_seeded_items_leave_the_global_generator_alone(folder):
    data = open_split("folder", folder, view=make_view("sampling", train=False, image_size=16))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    data[0, 5]
    assert torch.equal(torch.rand(2), expected)


# --- episodes ---


def test_sampler_golden():
    with np.load(GOLDEN / "sampler.npz") as figures:
        labels, batches = figures["labels"], figures["batches"]
        sizes = int(figures["n_batch"]), int(figures["way"]), int(figures["per_class"])
        seed = int(figures["seed"])
    generator = torch.Generator().manual_seed(seed)
    assert list(EpisodeSampler(labels, *sizes, generator)) == batches.tolist()
    torch.manual_seed(seed)  # without a generator of its own, torch's global one
    assert list(EpisodeSampler(labels.tolist(), *sizes)) == batches.tolist()


def test_episode_layout():
    labels = torch.arange(6).repeat_interleave(4)
    for batch in EpisodeSampler(labels, 3, 5, 4, torch.Generator().manual_seed(0)):
        assert len(set(batch)) == 20
        rows = labels[torch.tensor(batch)].view(4, 5)
        assert (rows == rows[0]).all()
    assert episode_labels(3, 2).tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("way", "per_class", "message"),
    [(7, 2, "at least 7 classes .* has 6"), (5, 5, "at least 5 images in every class .* has 4"), (0, 1, "1 or more")],
)
def test_impossible_episodes(way, per_class, message):
    with pytest.raises(InputError, match=message):
        EpisodeSampler(torch.arange(6).repeat_interleave(4), 1, way, per_class)


LABELS = torch.arange(6).repeat_interleave(4)


def seeded_episodes(episodes: int = 5, **settings) -> SeededEpisodes:
    return SeededEpisodes(EpisodeSampler(LABELS, episodes, 3, 2), **{"seed": 1, "name": "test", **settings})


def test_draw_gives_the_next_episode():
    generator = torch.Generator().manual_seed(1)
    sampler = EpisodeSampler(LABELS, 3, 3, 2)
    drawn = [sampler.draw(generator) for _ in range(3)]
    assert drawn == list(EpisodeSampler(LABELS, 3, 3, 2, torch.Generator().manual_seed(1)))


def test_seeded_episodes_are_a_function_of_seed_name_epoch_and_index():
    episodes = seeded_episodes()
    drawn = list(episodes)
    assert len(episodes) == len(drawn) == 5
    assert [episodes[k] for k in (4, 0, 4)] == [drawn[4], drawn[0], drawn[4]]  # in any order, however often
    torch.manual_seed(7)  # whatever the global generator has drawn
    assert seeded_episodes(episodes=2)[1] == drawn[1]  # and however many there are
    for other in (seeded_episodes(seed=2), seeded_episodes(name="val")):
        assert all(other[k] != drawn[k] for k in range(5))
    episodes.set_epoch(3)
    later = list(episodes)
    assert all(before != after for before, after in zip(drawn, later, strict=True))
    fresh = seeded_episodes()
    fresh.epoch = 3
    assert fresh[2] == later[2]
    assert len({tuple(index for index, _ in episode) for episode in drawn + later}) == 10
    assert len({seed for episode in drawn + later for _, seed in episode}) == 60


def test_seeded_episodes_have_the_layout_of_an_episode():
    episode = seeded_episodes()[3]
    generator = named_generator(1, "test", 0, "episode", 3)
    assert [index for index, _ in episode] == EpisodeSampler(LABELS, 0, 3, 2).draw(generator)
    rows = LABELS[torch.tensor([index for index, _ in episode])].view(2, 3)
    assert (rows == rows[0]).all()
    assert all(isinstance(index, int) and isinstance(seed, int) for index, seed in episode)


@pytest.mark.parametrize("sampler", [seeded_episodes(), SeededBatches(14, 3, seed=1, name="train")])
@pytest.mark.parametrize("k", [5, -1])
def test_no_such_batch(sampler, k):
    with pytest.raises(IndexError):
        sampler[k]


def test_nothing_is_drawn_in_advance():
    episodes = seeded_episodes(episodes=10**11)
    assert len(episodes) == 10**11
    assert episodes[10**11 - 1] != episodes[0] == next(iter(episodes))
    assert len(next(iter(EpisodeSampler(LABELS, 10**11, 3, 2)))) == 6


def test_fixed_views():
    episodes = seeded_episodes(fixed_views=len(LABELS))
    first = list(episodes)
    assert [[index for index, _ in episode] for episode in first] == [
        [index for index, _ in episode] for episode in seeded_episodes()
    ]
    episodes.set_epoch(1)
    seed_of = {}
    for index, seed in (pair for episode in [*first, *episodes] for pair in episode):
        assert seed_of.setdefault(index, seed) == seed
    assert len(set(seed_of.values())) == len(seed_of) > 12
    more = seeded_episodes(fixed_views=1000).fixed_seeds
    assert all(more[index] == seed for index, seed in seed_of.items())  # however many images there are
    expected = torch.randint(2**62, (24,), generator=named_generator(1, "test", "views"))
    assert all(expected[index] == seed for index, seed in seed_of.items())


def test_seeded_batches():
    def batches(**settings) -> SeededBatches:
        return SeededBatches(14, 4, **{"seed": 1, "name": "train", **settings})

    shuffled = batches()
    drawn = list(shuffled)
    order = [index for batch in drawn for index, _ in batch]
    assert [len(batch) for batch in drawn] == [4, 4, 4, 2]
    assert len(shuffled) == 4
    assert sorted(order) == list(range(14)) != order
    assert order == torch.randperm(14, generator=named_generator(1, "train", 0, "order")).tolist()
    assert len({seed for batch in drawn for _, seed in batch}) == 14
    torch.manual_seed(7)
    assert [shuffled[k] for k in (3, 0)] == [drawn[3], drawn[0]]
    assert batches()[2] == drawn[2]
    shuffled.set_epoch(1)
    later = list(shuffled)
    assert [index for batch in later for index, _ in batch] != order
    assert len({seed for batch in drawn + later for _, seed in batch}) == 28
    shuffled.epoch = 0
    assert list(shuffled) == drawn
    for other in (batches(seed=2), batches(name="other")):
        assert all(other[k] != drawn[k] for k in range(4))


# --- flags ---


def parse(*words: str):
    parser = make_parser("data")
    add_data_arguments(parser)
    add_episode_arguments(parser)
    return parser.parse_args(words)


def test_defaults_of_the_flags():
    assert vars(parse()) == {
        "dataset": "miniimagenet",
        "data_dir": "datasets",
        "deepemd": "fcn",
        "num_patch": 9,
        "fixed_patches": False,
        "patch_list": (2, 3),
        "patch_ratio": 2.0,
        "image_size": 84,
        "num_workers": None,
        "verify_images": False,
        "way": 5,
        "shot": 1,
        "query": 15,
    }


def test_help_says_each_default_once(capsys):
    with pytest.raises(SystemExit):
        parse("-h")
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 2,3)" in text
    assert text.count("(default: ") == 11  # all but the two switches
    assert "(default: miniimagenet)" in text


@pytest.mark.parametrize("size", ["15", "1025", "100000", "84.5"])
def test_image_size_has_bounds(capsys, size):
    with pytest.raises(SystemExit):
        parse("-image_size", size)
    assert f"expected a whole number from 16 to 1024; got '{size}'" in capsys.readouterr().err
    assert [parse("-image_size", good).image_size for good in ("16", "1024")] == [16, 1024]


def test_draw_episodes(folder):
    args = parse("-dataset", "folder", "-way", "3", "-query", "2", "-fixed_patches")
    data = open_split("folder", folder)
    validation = draw_episodes(args, data, 4, seed=1, name="val")
    training = draw_episodes(args, data, 4, seed=1, name="val", train=True)
    assert [len(episode) for episode in validation] == [9] * 4
    assert [index for index, _ in validation[2]] == [index for index, _ in training[2]]
    assert len(validation.fixed_seeds) == len(data)
    assert training.fixed_seeds is None  # -fixed_patches is for evaluation
    with pytest.raises(InputError, match="folder, val episodes: expected at least 7 classes"):
        draw_episodes(parse("-dataset", "folder", "-way", "7"), data, 4, seed=1, name="val")
