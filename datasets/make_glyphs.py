"""Make the quick-start data set: letters of several scripts, drawn in the type faces that matplotlib ships.

    python datasets/make_glyphs.py                  writes datasets/glyphs/{train,val,test}/<letter>/*.png

Each class is a letter, each image that letter in one face with a random rotation, scale, shear and shift. The splits
share no script, so the test asks for letters that training has never seen. Needs no network.
"""

import argparse
import math
import random
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-out", default=str(Path(__file__).parent / "glyphs"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("-per_class", type=int, default=20, help="images per letter (default: %(default)s)")
    parser.add_argument("-size", type=int, default=40, help="pixels along an edge (default: %(default)s)")
    parser.add_argument("-seed", type=int, default=1, help="same seed, same images (default: %(default)s)")
    args = parser.parse_args()
    if args.per_class < 1 or args.size < 8:
        parser.error("expected -per_class of 1 or more and -size of 8 or more")
    counts = make_glyphs(Path(args.out), per_class=args.per_class, size=args.size, seed=args.seed)
    print(f"wrote {args.out}: " + ", ".join(f"{split} {count} letters" for split, count in counts.items()))


def make_glyphs(out: Path, *, per_class: int, size: int, seed: int) -> dict[str, int]:
    """Write the data set; returns the number of classes per split. An earlier one in ``out`` is replaced at the end."""
    partial = out.with_name(out.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    faces = _load_faces(size)
    counts = {}
    for split, scripts in LETTERS.items():
        counts[split] = 0
        for script, letters in scripts.items():
            for letter in letters:
                able = [font for font, known in faces if ord(letter) in known]
                if not able:
                    sys.exit(f"error: no face of this matplotlib has the letter {letter!r}")
                folder = partial / split / f"{script}_{ord(letter):04x}"
                folder.mkdir(parents=True)
                draw = random.Random(f"{seed} {letter}")
                order = draw.sample(able, len(able))
                for number in range(per_class):
                    image = _draw(letter, order[number % len(order)], size, draw)
                    image.save(folder / f"{number:03d}.png")
                counts[split] += 1
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    return counts


def _load_faces(size: int) -> list[tuple[ImageFont.FreeTypeFont, set[int]]]:
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    files = [folder / f"{name}.ttf" for name in FACES]
    found = [
        (ImageFont.truetype(str(file), 2 * size), set(TTFont(file).getBestCmap())) for file in files if file.is_file()
    ]
    if not found:
        sys.exit(f"error: expected matplotlib's type faces in {folder}; found none")
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
