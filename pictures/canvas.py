"""What all pictures share: colours, names that can be displayed, and the way from a figure to a file.

Colours are those of Okabe and Ito, which colour-blind people can tell apart; what a colour says, a word or a line style says
too. Figures are made without pyplot, so that no window system and no global state is involved.
"""

import io
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.text import Text

from utils import printable, write_output

RIGHT, WRONG, NEUTRAL = "#0072B2", "#D55E00", "#555555"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FORMATS = {"png": "pixels, 150 per inch", "pdf": "vector graphics"}
DOTS_PER_INCH = 150
FONT = "DejaVu Sans"  # comes with matplotlib


def make_figure(width: float, height: float) -> Figure:
    """A figure of that size in inches, whose parts matplotlib lays out."""
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.07)  # inches
    return figure


def picture_path(folder: Path, stem: str, suffix: str) -> Path:
    """The path of a picture; a stem that is too long for the file system is cut."""
    return folder / f"{os.fsdecode(os.fsencode(stem)[:200])}.{suffix}"


def save(figure: Figure, path: Path) -> Path:
    """Write a figure, in the format of its suffix.

    Raises:
        InputError: the file cannot be written.
    """
    content = io.BytesIO()
    _use_plain_text(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(content, format=path.suffix[1:], dpi=DOTS_PER_INCH)
    write_output(path, content.getbuffer())
    return path


def to_pixels(figure: Figure) -> np.ndarray:
    """A figure as ``(height, width, 3)`` uint8."""
    canvas = FigureCanvasAgg(figure)
    _use_plain_text(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _use_plain_text(figure: Figure) -> None:
    """No formulas between the dollar signs of a name, and further fonts for what the usual one lacks."""
    texts = figure.findobj(Text)
    families = [FONT, *sorted(set(_find_fonts("".join(text.get_text() for text in texts)).values()) - {FONT, None})]
    for text in texts:
        lines = "\n".join(map(printable, text.get_text().split("\n")))
        text.set(text=lines, parse_math=False, usetex=False, fontfamily=families)


# --- Names ------------------------------------------------------------------------------------------------------------

_font_of: dict[str, str | None] = {}  # character: the family of a font that has it


def _find_fonts(text: Iterable[str]) -> dict[str, str | None]:
    """For each character, the usual font or the first installed one that has it; None where no font does."""
    characters = set(text)
    missing = characters - _font_of.keys()
    for font in sorted(fontManager.ttflist, key=lambda font: (font.name != FONT, font.name)):
        if not missing:
            break
        if "Last Resort" in font.name:  # a box for every character
            continue
        try:
            face = get_font(font.fname)
        except (OSError, RuntimeError):
            continue
        found = {one for one in missing if face.get_char_index(ord(one))} if face.scalable else set()
        _font_of.update(dict.fromkeys(found, font.name))
        missing -= found
    _font_of.update(dict.fromkeys(missing))
    return {character: _font_of[character] for character in characters}


def display_names(names: Sequence[str], room: int) -> list[str]:
    """Names that fit on one line and can be drawn: a character that no font has is written as its code."""
    names = [printable(name) for name in names]
    fonts = _find_fonts("".join(names))
    drawable = [
        "".join(one if fonts[one] else one.encode("ascii", "backslashreplace").decode() for one in name)
        for name in names
    ]
    return short_names(drawable, room)


def short_names(names: Sequence[str], room: int) -> list[str]:
    """Names of up to ``room`` characters; if the cut takes away what tells them apart, their common beginning goes too."""
    short = [shorten(name, room) for name in names]
    if len(set(short)) == len(set(names)):
        return short
    alike = [name for name, cut in zip(names, short, strict=True) if short.count(cut) > 1]
    common = len(os.path.commonprefix(alike))
    return [
        shorten(name, room) if name not in alike else "…" + shorten(name[common:], room - 1, from_end=True)
        for name in names
    ]


def shorten(text: str, room: int, *, from_end: bool = False) -> str:
    """Cut the middle (or the end) out of what is too long."""
    if len(text) <= room:
        return text
    head = room - 1 if from_end else -(-(room - 1) // 2)
    return text[:head] + "…" + text[len(text) - (room - 1 - head) :]


def wrap(text: str, room: int) -> str:
    """Lines of up to ``room`` characters, broken behind blanks, underscores, hyphens and slashes where possible."""
    lines = [""]
    for part in re.split(r"(?<=[\s_/-])", text):
        for piece in (part[k : k + room] for k in range(0, len(part), room)):
            if len(lines[-1]) + len(piece.rstrip()) <= room:
                lines[-1] += piece
            else:
                lines.append(piece)
    return "\n".join(line.strip() for line in lines)


def image_settings(pixels: np.ndarray) -> dict[str, Any]:
    """How a raster is scaled: small ones keep their pixels."""
    return {"interpolation": "nearest" if max(pixels.shape[:2]) < 200 else "antialiased"}
