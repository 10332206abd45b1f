"""Data that several test files build on: generated here, so that the tests need no download."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "datasets"))


def write_images(folder: Path, count: int, *, seed: int = 0, size: int = 20, suffix: str = ".png") -> list[str]:
    """Random colour images of one tint; returns their names."""
    random = np.random.RandomState(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tint = random.randint(0, 200, 3)
    names = [f"{number:04d}{suffix}" for number in range(count)]
    for name in names:
        noise = random.randint(0, 55, (size, size, 3))
        Image.fromarray((tint + noise).astype(np.uint8)).save(folder / name)
    return names


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory) -> Path:
    """A data directory that holds a small glyphs set."""
    from make_glyphs import make_glyphs

    data_dir = tmp_path_factory.mktemp("data")
    make_glyphs(data_dir / "glyphs", per_class=6, size=20, seed=1)
    return data_dir


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A data directory in the layout of ``folder``: six classes of seven images per split."""
    data_dir = tmp_path_factory.mktemp("folder")
    for split_number, split in enumerate(("train", "val", "test")):
        for number in range(6):
            write_images(data_dir / split / f"class{number}", 7, seed=10 * split_number + number)
    return data_dir
