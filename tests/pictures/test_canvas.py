"""Names that can be drawn, and figures written to files."""

import os

import numpy as np
import pytest
from helpers import ODD_NAMES
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from pictures import canvas


def test_long_names_are_cut():
    assert canvas.shorten("x" * 20 + "y" * 20, 8) == "xxxx…yyy"
    assert canvas.shorten("short", 5) == "short"
    for room in (4, 11):
        text = "a_rather-long name/of something_and_more"
        lines = canvas.wrap(text, room).split("\n")
        assert max(map(len, lines)) <= room
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert canvas.wrap("armenian_054f", 11) == "armenian_\n054f"


def test_any_name_can_be_drawn(tmp_path, capfd, recwarn):
    names = [canvas.shorten(name, 40) for name in ODD_NAMES]
    assert all(len(name) <= 40 and (name.isprintable() or not name) for name in names)
    assert len(set(names)) == len(ODD_NAMES)
    assert names[:2] == ["caf?", ODD_NAMES[1]]
    for name in (*ODD_NAMES, *names):  # also one that was not prepared
        figure = canvas.make_figure(2, 1)
        figure.text(0.1, 0.5, name)
        assert canvas.to_pixels(figure).shape == (150, 300, 3)
    for suffix in canvas.FORMATS:
        figure = canvas.make_figure(2, 4)
        for k, name in enumerate(names):
            figure.text(0.1, k / 9, name)
        canvas.save(figure, tmp_path / f"names.{suffix}")
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_a_font_that_has_a_character_is_used(monkeypatch):
    """U+2335 is in STIXGeneral, which comes with matplotlib, and not in its usual font."""

    def ink(character):
        figure = canvas.make_figure(1, 1)
        figure.text(0.2, 0.2, character, fontsize=40)
        return canvas.to_pixels(figure)

    found = ink("\u2335")
    assert not np.array_equal(found, ink("?"))
    monkeypatch.setattr(canvas, "find_font", lambda character: None)
    assert np.array_equal(ink("\u2335"), ink("?"))


def test_a_character_that_no_font_has_is_a_question_mark():
    figure = canvas.make_figure(1, 1)
    figure.text(0.2, 0.2, "a\U0010fffeb\nc")
    canvas.to_pixels(figure)
    assert "a?b\nc" in [text.get_text() for text in figure.findobj(Text)]


def test_settings_of_the_user_do_not_turn_names_into_formulas():
    figure = Figure()
    figure.text(0, 0, "$a", usetex=True)
    canvas.to_pixels(figure)
    (text,) = [text for text in figure.findobj(Text) if text.get_text()]
    assert not text.get_usetex()
    assert not text.get_parse_math()


def test_pictures_are_written_through_links(tmp_path):
    (tmp_path / "real.png").touch()
    (tmp_path / "real.png").chmod(0o640)
    (tmp_path / "link.png").symlink_to("real.png")
    assert canvas.save(canvas.make_figure(1, 1), tmp_path / "link.png") == tmp_path / "link.png"
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real.png").stat().st_mode & 0o777 == 0o640
    with Image.open(tmp_path / "real.png") as image:
        assert image.size == (150, 150)


@pytest.mark.parametrize("stem", ["x", "\u732b" * 200, "caf\udce9", "y" * 255])
def test_pictures_of_files_with_any_name_can_be_written(tmp_path, stem):
    path = canvas.save(canvas.make_figure(1, 1), canvas.picture_path(tmp_path, stem, "png"))
    assert path.is_file()
    assert os.fsencode(path.stem) == os.fsencode(stem)[:200]
