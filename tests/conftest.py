"""Data that several test files build on: generated here, so that the tests need no download."""

import shutil
import signal
from pathlib import Path

import pytest
from helpers import write_images

# A shell starts a background job with SIGINT ignored, and processes that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def own_images(folder, tmp_path_factory) -> Path:
    """Three classes with 1, 2 and 3 examples, queries in a folder of folders, and one that cannot be read."""
    root = tmp_path_factory.mktemp("mine")
    for number, name in enumerate(("ant", "bee", "cat"), 1):
        source = sorted((folder / "test" / f"class{number}").iterdir())
        for k, path in enumerate(source[:number]):
            (root / "support" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / "support" / name / f"{k}.png")
        (root / "query" / name).mkdir(parents=True)
        for k, path in enumerate(source[4:6]):
            shutil.copy(path, root / "query" / name / f"{k}.png")
    (root / "query" / "broken.png").write_bytes(b"no image")
    (root / "query" / ".hidden.png").write_bytes(b"no image")
    shutil.copytree(root / "query" / "ant", root / "query" / ".thumbnails")
    return root
