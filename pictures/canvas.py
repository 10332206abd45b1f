"""What all pictures share: colours, names that can be displayed, and the way from a figure to a file.

Colours are those of Okabe and Ito; what a colour says, a word or a line style says too. No pyplot: it has global state.
"""

import io
import os
import re
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.text import Text
from PIL import Image

from utils import check_writable, printable, write_output

RIGHT, WRONG, NEUTRAL = "#0072B2", "#D55E00", "#555555"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FORMATS = ("png", "pdf")
DOTS_PER_INCH = 150
FONT = "DejaVu Sans"  # comes with matplotlib


def make_figure(width: float, height: float) -> Figure:
    """A figure of that size in inches, whose parts matplotlib lays out."""
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.07)  # inches
    return figure


def picture_path(folder: Path, stem: str, suffix: str) -> Path:
    """The path of a picture, with its stem cut to what a file system takes; InputError if it cannot be written."""
    path = folder / f"{os.fsdecode(os.fsencode(stem)[:200])}.{suffix}"
    check_writable(path)
    return path


def save(figure: Figure, path: Path) -> Path:
    """Write a figure, in the format of its suffix; InputError if it cannot be written."""
    write_output(path, _render(figure, path.suffix[1:]).getbuffer())
    return path


def to_pixels(figure: Figure) -> np.ndarray:
    """A figure as ``(height, width, 3)`` uint8."""
    return np.asarray(Image.open(_render(figure, "png")).convert("RGB"))


def _render(figure: Figure, suffix: str) -> io.BytesIO:
    """The file of a figure. Text is drawn as it is, without formulas; "?" stands for what no font has."""
    texts = figure.findobj(Text)
    fonts = {character: find_font(character) for text in texts for character in text.get_text()}
    families = [FONT, *sorted(set(fonts.values()) - {FONT, None})]
    for text in texts:
        drawn = "".join(one if one == "\n" or fonts[one] else "?" for one in text.get_text())
        text.set(text=drawn, parse_math=False, usetex=False, fontfamily=families)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(content, format=suffix, dpi=DOTS_PER_INCH)
    return content


@cache
def find_font(character: str) -> str | None:
    """The family of the usual font, or of another installed one, that has a character; None where no font does."""
    if not character.isprintable():
        return None
    fonts = sorted(fontManager.ttflist, key=lambda font: (font.name != FONT, font.name))
    return next((font.name for font in fonts if ord(character) in _characters(font.fname)), None)


@cache
def _characters(file: str) -> frozenset[int]:
    """The codes of the characters that a font has; none for a font that cannot be used."""
    try:
        font = get_font(file)
    except (OSError, RuntimeError):
        return frozenset()
    is_usable = font.scalable and "Last Resort" not in font.family_name  # that one has a box for every character
    return frozenset(font.get_charmap() if is_usable else ())


def shorten(name: str, room: int) -> str:
    """A name on one line of up to ``room`` characters: the middle of a longer one is cut out."""
    name = printable(name)
    tail = (room - 1) // 2
    return name if len(name) <= room else f"{name[: room - 1 - tail]}…{name[len(name) - tail :]}"


def wrap(text: str, room: int) -> str:
    """Lines of up to ``room`` characters, broken behind blanks, underscores, hyphens and slashes where possible."""
    lines = re.findall(rf".{{1,{room}}}(?:(?<=[\s_/-])|$)|.{{1,{room}}}", text)
    return "\n".join(line.strip() for line in lines)
