"""The quick-start data set: what is written, what is replaced, and what is left alone."""

from pathlib import Path

import make_glyphs as module
import pytest
from data_helpers import tree
from helpers import run, succeed
from make_glyphs import make_glyphs

from utils import InputError

SMALL = {"per_class": 1, "size": 8, "seed": 1}


@pytest.fixture(autouse=True)
def few_letters(monkeypatch):
    few = {"train": {"latin": "AB"}, "val": {"georgian": "ა"}, "test": {"greek": "ΓΔ"}}
    monkeypatch.setattr(module, "LETTERS", few)
    monkeypatch.setattr(module, "FACES", [name for name in module.FACES if name.startswith("DejaVuSans-B")])


def refused(status: int, *flags, cwd: Path) -> str:
    """What a command prints that ends with a status and one line."""
    found, _, said = run("make_glyphs.py", *flags, cwd=cwd)
    assert (found, said.strip().count("\n")) == (status, 0)
    return said


def test_second_run_replaces_the_first(tmp_path):
    out = tmp_path / "glyphs"
    out.mkdir()  # an empty folder is used
    assert make_glyphs(out, per_class=2, size=8, seed=1) == {"train": 2, "val": 1, "test": 2}
    assert len(tree(out)) == 10
    assert "train 2 letters" in succeed("make_glyphs.py", "-out", out, "-per_class", 1, "-size", 8, cwd=tmp_path)
    assert sorted(tree(out)) == [
        *("test/greek_0393/000.png", "test/greek_0394/000.png"),
        *("train/latin_0041/000.png", "train/latin_0042/000.png", "val/georgian_10d0/000.png"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["glyphs"]


def test_same_seed_same_images(tmp_path):
    make_glyphs(tmp_path / "a", **SMALL)
    make_glyphs(tmp_path / "b", **SMALL)
    make_glyphs(tmp_path / "c", **{**SMALL, "seed": 2})
    assert tree(tmp_path / "a") == tree(tmp_path / "b") != tree(tmp_path / "c")


def test_every_letter_of_the_real_set_looks_like_what_is_replaced(glyphs):
    module._check_replaceable(glyphs / "glyphs")


@pytest.mark.parametrize(
    "foreign",
    [
        *("thesis.txt", "train/latin_0041/notes.txt", "train/cat/000.png", "train/latin_0041/photo.png"),
        *("train/latin_0041/000.png/000.png", "other/latin_0041/000.png", "train/000.png"),
    ],
)
def test_foreign_folder_is_left_alone(tmp_path, monkeypatch, foreign):
    out = tmp_path / "mine"
    kept = out / foreign
    kept.parent.mkdir(parents=True)
    kept.write_text("years of work")
    monkeypatch.setattr(module, "_draw", lambda *_: pytest.fail("drew before it looked"))
    assert "did not write" in refused(1, "-out", out, cwd=tmp_path)
    assert kept.read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_links_are_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "000.png").write_text("x")
    (tmp_path / "mine" / "train").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "latin_0041").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="did not write"):
        make_glyphs(tmp_path / "mine", **SMALL)
    assert (tmp_path / "elsewhere" / "000.png").read_text() == "x"


def test_file_that_comes_while_drawing_is_kept(tmp_path, monkeypatch):
    out = tmp_path / "glyphs"
    out.mkdir()
    draw = module._draw

    def draw_and_interfere(*arguments):
        (out / "thesis.txt").write_text("x")
        return draw(*arguments)

    monkeypatch.setattr(module, "_draw", draw_and_interfere)
    with pytest.raises(InputError, match=r"thesis\.txt"):
        make_glyphs(out, **SMALL)
    assert tree(tmp_path) == {"glyphs/thesis.txt": b"x"}


@pytest.mark.parametrize("below", ["", "glyphs"])
def test_path_taken_by_a_file(tmp_path, below):
    (tmp_path / "file").write_text("x")
    assert "file" in refused(1, "-out", tmp_path / "file" / below, cwd=tmp_path)
    assert tree(tmp_path) == {"file": b"x"}


@pytest.mark.parametrize(
    "flags", [["-size", "7"], ["-size", "513"], ["-per_class", "10001"], ["-seed", "1.5"], ["surplus"]]
)
def test_bad_flags(tmp_path, monkeypatch, flags):
    monkeypatch.setattr(module, "make_glyphs", lambda *_, **__: pytest.fail("accepted"))
    refused(2, *flags, cwd=tmp_path)


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left"), 1)])
def test_stopped_halfway_leaves_the_earlier_set(tmp_path, monkeypatch, error, status):
    out = tmp_path / "glyphs"
    make_glyphs(out, **SMALL)
    before = tree(tmp_path)
    draw = module._draw

    def draw_then_stop(letter, *arguments):
        if letter == "Δ":
            raise error
        return draw(letter, *arguments)

    monkeypatch.setattr(module, "_draw", draw_then_stop)
    refused(status, "-out", out, "-size", 9, cwd=tmp_path)
    assert tree(tmp_path) == before


def test_two_processes_may_write_the_same_tree(tmp_path, monkeypatch):
    draw = module._draw

    def draw_beside_another(*arguments):
        monkeypatch.setattr(module, "_draw", draw)
        make_glyphs(tmp_path / "glyphs", **SMALL)
        return draw(*arguments)

    monkeypatch.setattr(module, "_draw", draw_beside_another)
    make_glyphs(tmp_path / "glyphs", **{**SMALL, "seed": 2})
    monkeypatch.setattr(module, "_draw", draw)
    make_glyphs(tmp_path / "alone", **{**SMALL, "seed": 2})
    assert tree(tmp_path / "glyphs") == tree(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "glyphs"]
