"""What the tests of several modules of dataloader share."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from folders import exclusive
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


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def locked_by_another_process(target: Path) -> Iterator[None]:
    """A process that holds the lock of a folder being built, and is then killed."""
    child = os.fork()
    if not child:
        with exclusive(target):
            (target.parent / "held").touch()
            time.sleep(60)
        os._exit(0)
    try:
        while not (target.parent / "held").exists():
            time.sleep(0.01)
        (target.parent / "held").unlink()
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
