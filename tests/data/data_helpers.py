"""What the tests of several modules of dataloader share."""

import subprocess
import sys
from pathlib import Path

from helpers import ROOT, write_images

from dataloader import ImageDataset, make_view

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


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
