"""Views of an image."""

import json

import numpy as np
import pytest
import torch
from data_helpers import FCN, open_split, run_python
from helpers import GOLDEN
from PIL import Image

from dataloader import CATALOG, make_view
from dataloader.views import INTERPOLATIONS, Box, GridView, grid_boxes
from Models import ResNet12
from utils import InputError

ENCODER = ResNet12(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.mark.parametrize(("cells", "ratio"), [(0, 1), (1.5, 1), (2, 0), (2, float("nan")), (2, float("inf"))])
def test_a_grid_of_no_cells_or_of_no_ratio_is_refused(cells, ratio):
    with pytest.raises(ValueError, match=f"a grid has 1 or more cells .* this one has {cells} and {ratio}$"):
        grid_boxes(84, cells, ratio)


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
            found = ResNet12().normalize(make_view("grid", train=False, patch_list=patch_list)(picture))
            expected = figures[f"miniimagenet_grid_{'_'.join(map(str, patch_list))}_{image}"]
            assert np.array_equal(found[:, :, ::12, ::12].numpy(), expected)


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


def test_middle_of_the_evaluation_view():
    from torchvision import transforms

    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (60, 70, 3), dtype=np.uint8))
    for size in range(40, 56):  # an odd margin is rounded
        resized = round(size * 92 / 84)
        middle = transforms.Compose([transforms.Resize([resized, resized]), transforms.CenterCrop(size)])(picture)
        found = make_view("fcn", train=False, image_size=size)(picture)
        assert np.array_equal(found.numpy(), np.asarray(middle).transpose(2, 0, 1)), size


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_images_are_resized_as_asked(name):
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (60, 70, 3), dtype=np.uint8))
    view = make_view("grid", train=False, image_size=16, patch_list=(1,), patch_ratio=1.0, interpolation=name)
    resized = picture.resize((16, 16), Image.Resampling[name.upper()])
    assert np.array_equal(view(picture)[0].numpy(), np.asarray(resized).transpose(2, 0, 1))


def test_boxes_of_evaluation():
    assert FCN.boxes((50, 40)) == [Box(0, 0, 50, 40)]
    grid = make_view("grid", train=False, patch_list=(1, 2), patch_ratio=1.0)
    quarters = [Box(0, 0, 24, 20), Box(25, 0, 49, 20), Box(0, 20, 24, 40), Box(25, 20, 49, 40)]
    assert grid.boxes((50, 40)) == [Box(0, 0, 50, 40), *quarters]


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"train": False, "patch_list": (33,), "patch_ratio": 4.0}, (200, 32)),  # boxes not empty, but all the same
        ({"train": False, "patch_list": (2, 20), "patch_ratio": 1.0}, (32, 200)),
        ({"train": True, "patch_list": (20,), "patch_ratio": 9.0}, (32, 200)),  # in training the ratio may be 1
    ],
)
def test_grid_finer_than_the_pixels(settings, size):
    message = rf"for {settings['patch_list'][-1]} cells along each edge \(-patch_list\): {size[0]}x{size[1]} pixels"
    with pytest.raises(InputError, match=message):
        GridView(image_size=16, **settings).boxes(size)


def test_grid_as_fine_as_the_pixels(folder):
    view = GridView(train=False, image_size=16, patch_list=(20,), patch_ratio=2.0)
    assert view.boxes((20, 20))[21] == Box(0, 0, 2, 2)
    too_fine = make_view("grid", train=False, image_size=16, patch_list=(21,))
    with pytest.raises(InputError, match=r"class0/0000.png: the image is too small for 21 cells"):
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
        differs = not torch.equal(data[0, 5][0], data[0, 6][0])
        assert data.view.is_random == differs  # what evaluation caches by
        return differs

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


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_images_of_other_modes_are_refused_in_a_sentence(mode):
    with pytest.raises(ValueError, match=f"a view needs an RGB image; this one has the mode {mode}. Use image.convert"):
        FCN(Image.new(mode, (20, 20)))
