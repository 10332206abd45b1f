"""Make the quick-start data set: letters of several scripts, drawn in the typefaces that matplotlib ships.

    python datasets/make_glyphs.py                  writes datasets/glyphs/{train,val,test}/<letter>/*.png

Each class is a letter, each image that letter in one face with a random rotation, scale, shear and shift. The splits
share no script, so the test asks for letters that training has never seen. Needs no network.

An earlier glyphs tree in the output folder is replaced; a folder that holds anything else is refused and left alone.
The new tree is written to ``<folder>.part`` and moved into place when complete. Exit status: 1 if it cannot be written,
2 for bad flags, 130 after Ctrl-C.
"""

import argparse
import math
import os
import random
import re
import shutil
import sys
import unicodedata
from pathlib import Path

import matplotlib
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

FACES = [
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansDisplay"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "DejaVuSerifDisplay"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
]


def _letters(*ranges: tuple[str, str]) -> str:
    points = (chr(code) for first, last in ranges for code in range(ord(first), ord(last) + 1))
    return "".join(letter for letter in points if unicodedata.category(letter) in ("Lu", "Ll", "Lo"))


# Letters that look like one of another script, or like their own other case, would be two classes of one shape.
LETTERS = {
    "train": {
        "latin": "ABDEFGHIJKLMNPQRTYabcdefghijklmnopqrstuvwxyz",
        "cyrillic": "БГДЖЗИЛПФЦЧШЩЪЫЬЭЮЯбвгджзийклмнптцчшщъыэюяђљњћѓѢѦѪ",
    },
    "val": {"georgian": _letters(("ა", "ჰ"))},
    "test": {"greek": "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρςστφχψω", "armenian": _letters(("Ա", "Ֆ"))},
}

# What the tree looks like, from its root: nothing else is ever removed.
TREE_FOLDER = re.compile(f"({'|'.join(LETTERS)})(/[a-z]+_[0-9a-f]{{4,}})?")
TREE_FILE = re.compile(TREE_FOLDER.pattern.removesuffix("?") + r"/\d{3,}\.png")

SIZES, MOST_IMAGES = (8, 512), 10000

Face = tuple[ImageFont.FreeTypeFont, set[int]]  # and the code points that it has


class GlyphsError(Exception):
    """The data set cannot be made; the message says why."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} -h)\n")


def main() -> None:
    parser = _Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("-out", default=str(Path(__file__).parent / "glyphs"), help="folder to write")
    parser.add_argument("-per_class", type=int, default=20, help=f"images per letter, 1 to {MOST_IMAGES}")
    parser.add_argument("-size", type=int, default=40, help="pixels along an edge, {} to {}".format(*SIZES))
    parser.add_argument("-seed", type=int, default=1, help="same seed, same images")
    args = parser.parse_args()
    if not args.out:
        parser.error("expected a folder after -out")
    if not 1 <= args.per_class <= MOST_IMAGES:
        parser.error(f"expected -per_class between 1 and {MOST_IMAGES}, got {args.per_class}")
    if not SIZES[0] <= args.size <= SIZES[1]:
        parser.error(f"expected -size between {SIZES[0]} and {SIZES[1]}, got {args.size}")
    try:
        counts = make_glyphs(Path(args.out), per_class=args.per_class, size=args.size, seed=args.seed)
    except (GlyphsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; run it again to make the data set", file=sys.stderr)
        sys.exit(130)
    print(f"wrote {args.out}: " + ", ".join(f"{split} {count} letters" for split, count in counts.items()))


def make_glyphs(out: Path, *, per_class: int, size: int, seed: int) -> dict[str, int]:
    """Write the data set; returns the number of classes per split.

    The folder appears when it is complete. It replaces an earlier glyphs tree or an empty folder in ``out``; anything
    else there is left alone and raises GlyphsError.
    """
    out = Path(os.path.realpath(out))
    partial = out.with_name(out.name + ".part")
    for folder in (out, partial):
        _check_replaceable(folder)
    faces = _load_faces(size)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        counts = {split: _write_split(split, partial, faces, per_class, size, seed) for split in LETTERS}
        _check_replaceable(out)  # again: drawing took a while
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    return counts


def _check_replaceable(folder: Path) -> None:
    """Raise unless ``folder`` is absent, empty, or holds nothing but what this script writes."""
    if not folder.exists():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise GlyphsError(f"expected a folder at {folder}, or nothing; choose another -out")
    for entry in folder.rglob("*"):
        name = entry.relative_to(folder).as_posix()
        pattern = TREE_FOLDER if entry.is_dir() else TREE_FILE
        if entry.is_symlink() or not pattern.fullmatch(name):
            raise GlyphsError(
                f"{folder} holds {name}, which this script did not write; only an empty folder or one that holds "
                f"nothing but {{{','.join(LETTERS)}}}/<script>_<hex>/<number>.png is replaced; choose another -out"
            )


def _write_split(split: str, root: Path, faces: list[Face], per_class: int, size: int, seed: int) -> int:
    """Write the classes of one split; returns their number."""
    letters = [(script, letter) for script, members in LETTERS[split].items() for letter in members]
    for script, letter in letters:
        able = [font for font, known in faces if ord(letter) in known]
        if not able:
            raise GlyphsError(f"no typeface of this matplotlib has the letter {letter!r}")
        folder = root / split / f"{script}_{ord(letter):04x}"
        folder.mkdir(parents=True)
        draw = random.Random(f"{seed} {letter}")
        order = draw.sample(able, len(able))
        for number in range(per_class):
            _draw(letter, order[number % len(order)], size, draw).save(folder / f"{number:03d}.png")
    return len(letters)


def _load_faces(size: int) -> list[Face]:
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    files = [folder / f"{name}.ttf" for name in FACES]
    found = [
        (ImageFont.truetype(str(file), 2 * size), set(TTFont(file).getBestCmap())) for file in files if file.is_file()
    ]
    if not found:
        raise GlyphsError(f"expected matplotlib's typefaces in {folder}; found none")
    return found


def _draw(letter: str, font: ImageFont.FreeTypeFont, size: int, draw: random.Random) -> Image.Image:
    """Black on white, ``size`` x ``size``: drawn large, then mapped back by one random affine map."""
    canvas = Image.new("L", (4 * size, 4 * size), 255)
    ImageDraw.Draw(canvas).text((2 * size, 2 * size), letter, fill=0, font=font, anchor="mm")
    left, upper, right, lower = Image.eval(canvas, lambda value: 255 - value).getbbox()
    extent = max(right - left, lower - upper)

    angle, shear = math.radians(draw.uniform(-15, 15)), draw.uniform(-0.2, 0.2)
    stretch = draw.uniform(0.85, 1.15)
    scale = extent / (size * draw.uniform(0.55, 0.8))  # canvas pixels per image pixel
    shift_x, shift_y = draw.uniform(-0.08, 0.08) * size, draw.uniform(-0.08, 0.08) * size
    a, b = scale * stretch * math.cos(angle), scale * (shear - math.sin(angle))
    d, e = scale * math.sin(angle), scale / stretch * math.cos(angle)
    middle = size / 2
    c = (left + right) / 2 - a * (middle + shift_x) - b * (middle + shift_y)
    f = (upper + lower) / 2 - d * (middle + shift_x) - e * (middle + shift_y)
    # Drawn at twice the size and halved, for smooth edges.
    mapped = canvas.transform(
        (2 * size, 2 * size),
        Image.Transform.AFFINE,
        (a / 2, b / 2, c, d / 2, e / 2, f),
        Image.Resampling.BILINEAR,
        fillcolor=255,
    )
    return mapped.resize((size, size), Image.Resampling.BOX)


if __name__ == "__main__":
    main()
