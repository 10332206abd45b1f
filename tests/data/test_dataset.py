"""Opening a data set, and its items."""

import builtins

import pytest
import torch
from data_helpers import open_split, refuse, run_python, write_table
from helpers import write_images

from dataloader import dataset as dataset_module
from dataloader import make_view
from utils import InputError


def test_unreadable_image(tmp_path, capsys):
    for name in ("a", "b"):
        write_images(tmp_path / "test" / name, 3)
    broken = tmp_path / "test" / "a" / "0001.png"
    broken.write_bytes(broken.read_bytes()[:80])
    data = open_split("folder", tmp_path)
    with pytest.raises(
        InputError, match=r"a/0001.png cannot be read as an image .* or skip unreadable files with -verify_images$"
    ):
        data[1]
    verified = open_split("folder", tmp_path, verify=True)
    assert len(verified) == 5
    assert str(broken) not in verified.paths
    warnings = capsys.readouterr().err
    assert "cannot be read as an image" in warnings
    assert "-verify_images" not in warnings
    for rest in ("0000.png", "0002.png"):
        (tmp_path / "test" / "a" / rest).write_bytes(b"")
    with pytest.raises(InputError, match="no image of class a can be read"):
        open_split("folder", tmp_path, verify=True)


def test_no_permission_to_read_an_image(tmp_path, monkeypatch):
    write_images(tmp_path / "test" / "a", 2)
    data = open_split("folder", tmp_path)
    refuse(monkeypatch, builtins, "open", "0001.png")
    with pytest.raises(InputError, match=r"a/0001.png cannot be read as an image .*Permission denied"):
        data[1]


def test_unreadable_first_image_of_a_set_of_large_images(tmp_path):
    write_table(tmp_path, "0000.jpg,n01\n")
    (tmp_path / "miniimagenet" / "images" / "0000.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"0000.jpg cannot be read as an image"):
        open_split("miniimagenet", tmp_path)


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
    assert "0000.png cannot be read as an image (Image size (400 pixels) exceeds limit" in done.stdout


def test_one_decode_per_image(folder, monkeypatch):
    calls, read = [], dataset_module.read_image
    monkeypatch.setattr(
        dataset_module, "read_image", lambda *given, **more: calls.append(given) or read(*given, **more)
    )
    open_split("folder", folder, view=make_view("sampling", train=False, image_size=16))[0]
    assert len(calls) == 1


def test_names_of_images_are_relative_to_the_split_wherever_the_data_are(tmp_path, monkeypatch):
    write_images(tmp_path / "test" / "a", 1)
    write_table(tmp_path, "0001.jpg,n01\n")
    monkeypatch.chdir(tmp_path)
    for data_dir in (tmp_path, ".", "./../" + tmp_path.name):
        assert open_split("folder", data_dir).relative_paths() == ["a/0000.png"]
        assert open_split("miniimagenet", data_dir).relative_paths() == ["0001.jpg"]


def test_seeded_items_leave_the_global_generator_alone(folder):
    data = open_split("folder", folder, view=make_view("sampling", train=False, image_size=16))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    data[0, 5]
    assert torch.equal(torch.rand(2), expected)
