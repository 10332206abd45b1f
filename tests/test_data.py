"""Layouts, views, episodes."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import write_images
from helpers import GOLDEN
from PIL import Image

from dataloader import CATALOG, EpisodeSampler, ImageDataset, SeededBatches, episode_labels, make_view
from dataloader import dataset as dataset_module
from dataloader.views import GridView, grid_boxes
from utils import InputError

STATS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
FCN = make_view("fcn", train=False, image_size=16, **STATS)


def open_split(name: str, data_dir, split: str = "test", **settings) -> ImageDataset:
    return ImageDataset(name, split, data_dir=str(data_dir), view=settings.pop("view", FCN), **settings)


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
    data = open_split(name, tmp_path, "val")
    assert data.class_names == ["class0", "class1"]
    assert data.labels == [0, 0, 1, 1]
    assert len(data) == 4


def test_constants():
    assert CATALOG["cifar_fs"].mean == (0.5071, 0.4866, 0.4409)
    for name in ("miniimagenet", "cub", "tieredimagenet", "fc100"):
        assert CATALOG[name].std == (63.0 / 255, 62.1 / 255, 66.7 / 255)
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
        ("cub", lambda root: None, "expected the data set in .*cub; there is no such folder.*download_cub.sh"),
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
    ("rows", "message"),
    [
        ("missing.jpg,n01\n", r"test.csv, line 2: expected missing.jpg .*no such file"),
        ("0000.jpg\n", "line 2: expected file,class"),
        ("", "found none"),
    ],
)
def test_bad_csv(tmp_path, rows, message):
    write_images(tmp_path / "miniimagenet" / "images", 1, suffix=".jpg")
    (tmp_path / "miniimagenet" / "split").mkdir()
    (tmp_path / "miniimagenet" / "split" / "test.csv").write_text("filename,label\n" + rows)
    with pytest.raises(InputError, match=message):
        open_split("miniimagenet", tmp_path)


def test_unreadable_image(tmp_path, capsys):
    for name in ("a", "b"):
        write_images(tmp_path / "test" / name, 3)
    broken = tmp_path / "test" / "a" / "0001.png"
    broken.write_bytes(broken.read_bytes()[:80])
    data = open_split("folder", tmp_path)
    with pytest.raises(InputError, match=r"a/0001.png; it cannot be read"):
        data[1]
    verified = open_split("folder", tmp_path, verify=True)
    assert len(verified) == 5
    assert str(broken) not in verified.paths
    assert "left out: expected an image in" in capsys.readouterr().err
    for rest in ("0000.png", "0002.png"):
        (tmp_path / "test" / "a" / rest).write_bytes(b"")
    with pytest.raises(InputError, match="no image of class a can be read"):
        open_split("folder", tmp_path, verify=True)


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
            stats = {"mean": CATALOG[name].mean, "std": CATALOG[name].std}
            found = make_view("fcn", train=False, **stats)(picture)[:, ::6, ::6]
            assert np.array_equal(found.numpy(), figures[f"{name}_fcn_{image}"])
        stats = {"mean": CATALOG["miniimagenet"].mean, "std": CATALOG["miniimagenet"].std}
        for patch_list in ((2, 3), (5,), (1, 2)):
            found = make_view("grid", train=False, patch_list=patch_list, **stats)(picture)[:, :, ::12, ::12]
            expected = figures[f"miniimagenet_grid_{'_'.join(map(str, patch_list))}_{image}"]
            assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize(
    ("deepemd", "shape"), [("fcn", (3, 16, 16)), ("grid", (13, 3, 16, 16)), ("sampling", (4, 3, 16, 16))]
)
@pytest.mark.parametrize("train", [True, False])
def test_view_shapes(folder, deepemd, shape, train):
    view = make_view(deepemd, train=train, image_size=16, num_patch=4, **STATS)
    assert open_split("folder", folder, view=view)[0][0].shape == shape


def test_what_is_random(folder):
    def is_random(deepemd, train):
        data = open_split("folder", folder, view=make_view(deepemd, train=train, image_size=16, **STATS))
        assert torch.equal(data[0, 5][0], data[0, 5][0])  # the same seed gives the same view
        return not torch.equal(data[0, 5][0], data[0, 6][0])

    assert [is_random(name, True) for name in ("fcn", "grid", "sampling")] == [True, True, True]
    assert [is_random(name, False) for name in ("fcn", "grid", "sampling")] == [False, False, True]


def test_grid_ratio_in_training_is_drawn_per_level():
    view = GridView(train=True, image_size=16, patch_list=(2, 3), patch_ratio=2.0, **STATS)
    torch.manual_seed(0)
    ratios = [1 + 2 * torch.rand(()).item() for _ in range(2)]
    torch.manual_seed(0)
    boxes = view.boxes(100, 60)
    assert boxes[0] == (0, 0, grid_boxes(100, 2, ratios[0])[0][1], grid_boxes(60, 2, ratios[0])[0][1])
    assert boxes[4] == (0, 0, grid_boxes(100, 3, ratios[1])[0][1], grid_boxes(60, 3, ratios[1])[0][1])
    assert boxes[1][0] > 0
    assert boxes[1][1] == 0  # row by row: the second patch lies right of the first


def test_one_decode_per_image(folder, monkeypatch):
    calls = []
    real = dataset_module._read
    monkeypatch.setattr(dataset_module, "_read", lambda path: calls.append(path) or real(path))
    open_split("folder", folder, view=make_view("sampling", train=False, image_size=16, **STATS))[0]
    assert len(calls) == 1


def test_seeded_items_leave_the_global_generator_alone(folder):
    data = open_split("folder", folder, view=make_view("sampling", train=False, image_size=16, **STATS))
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


def test_seeds_are_drawn_apart_from_the_episodes():
    labels = torch.arange(6).repeat_interleave(4)
    plain = list(EpisodeSampler(labels, 2, 3, 2, torch.Generator().manual_seed(1)))
    sampler = EpisodeSampler(labels, 2, 3, 2, torch.Generator().manual_seed(1))
    seeded = list(SeededBatches(sampler, torch.Generator().manual_seed(2)))
    assert [[index for index, _ in batch] for batch in seeded] == plain
    assert len({seed for batch in seeded for _, seed in batch}) == 12


def test_one_seed_per_image():
    labels = torch.arange(6).repeat_interleave(4)
    sampler = EpisodeSampler(labels, 4, 3, 2, torch.Generator().manual_seed(1))
    batches = list(SeededBatches(sampler, torch.Generator(), seed_per_image=torch.arange(24) + 1000))
    assert all(seed == index + 1000 for batch in batches for index, seed in batch)
