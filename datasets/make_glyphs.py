"""Make the quick-start data set: letters of several scripts, drawn in the typefaces that matplotlib ships.

    python datasets/make_glyphs.py                  writes datasets/glyphs/{train,val,test}/<letter>/*.png

Each class is a letter, each image that letter in one face with a random rotation, scale, shear and shift. The splits
share no script, so the test asks for letters that training has never seen. Needs no network.

An earlier glyphs tree is replaced when the new one is complete; a folder that holds anything else is refused.
"""

import math
import os
import random
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from engine.command_line import make_parser
from utils import InputError, number_between, run_script

FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique", "Display")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic", "Display")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)

# Left out: letters that look like one of another script or like their own other case, which would be two equal classes.
LETTERS = {
    "train": {
        "latin": "ABDEFGHIJKLMNPQRTYabcdefghijklmnopqrstuvwxyz",
        "cyrillic": "БГДЖЗИЛПФЦЧШЩЪЫЬЭЮЯбвгджзийклмнптцчшщъыэюяђљњћѓѢѦѪ",
    },
    "val": {"georgian": "".join(map(chr, range(ord("ა"), ord("ჰ") + 1)))},
    "test": {"greek": "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρςστφχψω", "armenian": "".join(map(chr, range(ord("Ա"), ord("Ֆ") + 1)))},
}

# The folders and files of a tree, from its root: nothing else is ever removed.
TREE = re.compile(r"(train|val|test)(/[a-z]+_[0-9a-f]{4,}(/\d{3,}\.png)?)?")

Face = tuple[ImageFont.FreeTypeFont, set[int]]  # and the code points that it has


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__.splitlines()[0])
    default = Path(__file__).parent / "glyphs"
    parser.add_argument("-out", type=Path, metavar="DIR", default=default, help="folder to write")
    images, pixels = number_between(1, 10000, int), number_between(8, 512, int)
    parser.add_argument("-per_class", type=images, default=20, help="images per letter, 1 to 10000")
    parser.add_argument("-size", type=pixels, default=40, help="pixels along an edge, 8 to 512")
    parser.add_argument("-seed", type=int, default=1, help="same seed, same images")
    args = parser.parse_args(argv)
    counts = make_glyphs(args.out, per_class=args.per_class, size=args.size, seed=args.seed)
    print(f"wrote {args.out}: " + ", ".join(f"{split} {count} letters" for split, count in counts.items()))


def make_glyphs(out: Path, *, per_class: int, size: int, seed: int) -> dict[str, int]:
    """Write the data set in place of an earlier one or an empty folder; returns the number of classes per split."""
    out = Path(os.path.realpath(out))
    _check_replaceable(out)
    files = [Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf") for name in FACES]
    faces = [(ImageFont.truetype(str(file), 2 * size), set(TTFont(file).getBestCmap())) for file in files]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".part") as scratch:
        new = Path(scratch, "new")
        counts = {split: _write_split(split, new, faces, per_class, size, seed) for split in LETTERS}
        _check_replaceable(out)  # again: drawing took a while
        if out.exists():
            out.rename(Path(scratch, "old"))
        new.rename(out)
    return counts


def _check_replaceable(folder: Path) -> None:
    """Raise unless ``folder`` is absent, empty, or holds nothing but what this script writes."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Choose another -out")
    for entry in folder.rglob("*"):
        name = entry.relative_to(folder).as_posix()
        if entry.is_symlink() or not TREE.fullmatch(name) or entry.is_dir() == name.endswith(".png"):
            raise InputError(f"{folder} holds {name}, which this script did not write. Choose another -out")


def _write_split(split: str, root: Path, faces: list[Face], per_class: int, size: int, seed: int) -> int:
    """Write the classes of one split; returns their number."""
    letters = [(script, letter) for script, members in LETTERS[split].items() for letter in members]
    for script, letter in letters:
        able = [font for font, known in faces if ord(letter) in known]
        folder = root / split / f"{script}_{ord(letter):04x}"
        folder.mkdir(parents=True)
        draw = random.Random(f"{seed} {letter}")
        order = draw.sample(able, len(able))
        for number in range(per_class):
            _draw(letter, order[number % len(order)], size, draw).save(folder / f"{number:03d}.png")
    return len(letters)


def _draw(letter: str, font: ImageFont.FreeTypeFont, size: int, draw: random.Random) -> Image.Image:
    """Black on white, ``size`` x ``size``: drawn large, then mapped back by one random affine map."""
    canvas = Image.new("L", (4 * size, 4 * size), 255)
    ImageDraw.Draw(canvas).text((2 * size, 2 * size), letter, fill=0, font=font, anchor="mm")
    left, upper, right, lower = Image.eval(canvas, lambda value: 255 - value).getbbox()
    extent = max(right - left, lower - upper)
    angle, shear, stretch = math.radians(draw.uniform(-15, 15)), draw.uniform(-0.2, 0.2), draw.uniform(0.85, 1.15)
    scale = extent / (size * draw.uniform(0.55, 0.8))  # canvas pixels per image pixel
    shift_x, shift_y = draw.uniform(-0.08, 0.08) * size, draw.uniform(-0.08, 0.08) * size
    a, b = scale * stretch * math.cos(angle), scale * (shear - math.sin(angle))
    d, e = scale * math.sin(angle), scale / stretch * math.cos(angle)
    middle = size / 2
    c = (left + right) / 2 - a * (middle + shift_x) - b * (middle + shift_y)
    f = (upper + lower) / 2 - d * (middle + shift_x) - e * (middle + shift_y)
    # Drawn at twice the size and halved, for smooth edges.
    inverse, double = (a / 2, b / 2, c, d / 2, e / 2, f), (2 * size, 2 * size)
    mapped = canvas.transform(double, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR, fillcolor=255)
    return mapped.resize((size, size), Image.Resampling.BOX)


if __name__ == "__main__":
    run_script(main)
