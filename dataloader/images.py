"""One image file as a person sees it: the right way up, on a white page, with 8 bits per channel."""

import re
import sys
import warnings
from functools import cache
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from utils import InputError, printable, warn

# Pillow's own warnings would appear in the middle of a progress bar. What matters in them is checked here.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Formats that Pillow identifies but cannot show by itself (pages that need Ghostscript or Windows, files of measurements),
# and movies.
_NO_PICTURES = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "IPTC", "MPEG", "FLI"}

_ADVICE = "Replace it, or skip unreadable files with -verify_images"
_CONVERT = "Convert it to 8 bits per channel"
_ORIENTATION, _PHOTOMETRIC, _BITS, _NUMBERS = 0x0112, 262, 258, 339  # tags of EXIF and of TIFF
_TURNED = range(2, 9)  # orientations that ask for a turn or a flip

Image.init()
_formats = (Image.OPEN.keys() | {"MPO"}) - _NO_PICTURES  # MPO is opened as the JPEG that it begins with
IMAGE_SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _formats)


class ImageFacts(NamedTuple):
    """What a file says about its image."""

    shape: tuple[int, int, str]  # width, height and Pillow's colour mode
    is_transparent: bool  # some pixel is not opaque
    is_turned: bool  # its EXIF orientation asks for a turn or a flip


def read_image(path: str, *, upright: bool = True, advice: str = _ADVICE) -> Image.Image:
    """Decode an image file to RGB, 8 bits per channel; transparent pixels become white.

    ``upright`` turns the image as its EXIF orientation asks; published sets were made without that. InputError, which ends
    with ``advice``, if it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            image, facts = decode_image(file, upright=upright)
    except Exception as error:  # whatever a broken file makes Pillow raise
        message = f"{printable(path)} cannot be read as an image ({reason(error)})"
        raise InputError(f"{message}. {advice}" if advice else message) from error
    pixels = facts.shape[0] * facts.shape[1]
    if Image.MAX_IMAGE_PIXELS and pixels > Image.MAX_IMAGE_PIXELS:
        _warn_of_huge(path, pixels)
    return image


@cache  # once per process
def _warn_of_huge(path: str, pixels: int) -> None:
    warn(f"{printable(path)} has {pixels / 1e6:.0f} million pixels, and every use decodes all of them. Shrink it")


def picture_of(image: Image.Image | np.ndarray) -> Image.Image:
    """An image in memory as :func:`read_image` would give it: a PIL image, or an array ``(H, W)`` or ``(H, W, 1..4)`` of uint8.

    InputError for anything else.
    """
    if isinstance(image, np.ndarray):
        channels = image.shape[2] if image.ndim == 3 else 3
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or not image.size or channels > 4:
            found = f"this one is {image.dtype} with the shape {image.shape}"
            advice = "Put the channels last, and scale floats to 0 to 255 before astype(np.uint8)"
            raise InputError(f"an array must be an image of uint8, (H, W) or (H, W, 3); {found}. {advice}")
        image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    if not isinstance(image, Image.Image):
        raise InputError(f"an image must be a path, a PIL image or an array, not {type(image).__name__}")
    if image.mode == "F" or image.mode.startswith("I"):
        raise InputError(f"the image has the mode {image.mode}, of more than 8 bits. {_CONVERT}")
    try:
        return _turned(_on_white(image)[0], _orientation(image))
    except Exception as error:  # whatever a broken file that was not read yet makes Pillow raise
        raise InputError(f"the image cannot be read ({reason(error)})") from error


def reason(error: Exception) -> str:
    """Why Pillow, or the system, refuses a file, without the name of the file."""
    text = getattr(error, "strerror", None) or re.sub(r" (in )?('[^']*'|<_io\..*>)$", "", str(error))
    return " ".join(printable(text).split()) or type(error).__name__


def decode_image(file: IO[bytes], *, upright: bool = True) -> tuple[Image.Image, ImageFacts]:
    """The image of a file, as :func:`read_image` returns it, and what the file says; raises whatever Pillow does."""
    with Image.open(file) as image:
        shape = (*image.size, image.mode)
        tiles = list(image.tile)  # loading, which PNG's EXIF data may need, consumes them
        stored_orientation = _orientation(image)
        image.load()
        pixels = _in_8_bits(image, tiles, file)
        orientation = _orientation(image)  # Pillow has turned TIFF files by now
    pixels, is_transparent = _on_white(pixels)
    pixels = _turned(pixels, orientation) if upright else pixels
    return pixels, ImageFacts(shape, is_transparent, stored_orientation in _TURNED)


def _turned(pixels: Image.Image, orientation: object) -> Image.Image:
    """Pixels as they are meant to be seen, by the EXIF orientation of their file."""
    if orientation not in _TURNED:
        return pixels
    pixels.getexif()[_ORIENTATION] = orientation
    return ImageOps.exif_transpose(pixels)


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF data leaves an image as it is stored
        return None


def _on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """An RGB image without transparency, and whether there was any."""
    if not image.has_transparency_data:
        return image.convert("RGB"), False
    layer = image.convert("LA" if image.mode == "La" else image.mode).convert("RGBA")
    page = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(page, layer).convert("RGB"), layer.getchannel("A").getextrema()[0] < 255


# --- More than 8 bits -------------------------------------------------------------------------------------------------
# Pillow's own conversions would cut grey values at 255 and keep the upper byte of colours, whatever range is in use.


def _in_8_bits(image: Image.Image, tiles: list, file: IO[bytes]) -> Image.Image:
    """The loaded image with 8 bits per channel, in a mode that may have transparency."""
    codec, args = (tiles[0][0], tiles[0][3]) if tiles else ("", None)
    args = args if isinstance(args, tuple) and args else (args,)
    tags = getattr(image, "tag_v2", {})
    if 2 in tags.get(_NUMBERS, ()) and max(tags.get(_BITS, (1,))) <= 16:  # not scaled, or read as unsigned
        raise InputError(f"its values are signed. {_CONVERT}")
    raw_mode, clear = str(args[0]), image.info.get("transparency")
    if raw_mode in ("L;2", "L;4") and isinstance(clear, int):
        image.info["transparency"] = clear * (85 if raw_mode == "L;2" else 17)  # the pixels were scaled to 8 bits
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.array(image)[..., None]
    elif re.fullmatch(r"(LA|CMYK|RGB[AaX]?);16[BLN]", raw_mode):
        values = np.array(image).astype(np.uint16) << 8 | _lower_bytes(file, raw_mode)
    else:
        _refuse_hidden_depth(image, codec, args[-1], file)
        return image
    colours = 3 if image.mode == "RGBA" else values.shape[2]
    channels = [_scale(values[..., :colours], codec in ("ppm", "ppm_plain"))]  # Pillow has scaled these to 16 bits
    if tags.get(_PHOTOMETRIC) == 0 and colours == 1:  # white is 0
        channels[0] = 255 - channels[0]
    if clear is not None:
        is_opaque = (values != clear).any(2, keepdims=True)
        channels.append(np.where(is_opaque, np.uint8(255), np.uint8(0)))
    elif colours < values.shape[2]:
        if 0 < (highest := values[..., colours:].max()) < 255:  # of 8 bits, or of any number above
            raise InputError(f"its alpha of 16 bits reaches {highest} only: it may have 8 to 16 bits. {_CONVERT}")
        channels.append(_scale(values[..., colours:]))
    mode = {1: "L", 2: "LA"}.get(colours + len(channels) - 1, "RGBA" if len(channels) == 2 else image.mode)
    return Image.frombytes(mode, image.size, np.concatenate(channels, axis=2).tobytes())


def _lower_bytes(file: IO[bytes], raw_mode: str) -> np.ndarray:
    """The lower bytes ``(H, W, C)`` of an image of 16 bits per channel, by reading it in the other byte order."""
    # Pillow has no "LA;16L": the four bytes of a pixel are read as four channels.
    other_byte = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
    other = "RGBA" if raw_mode.startswith("LA") else raw_mode[:-1] + other_byte[raw_mode[-1]]
    with Image.open(file) as image:
        for number, tile in enumerate(image.tile):
            image.tile[number] = tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:]))
        image.load()
        pixels = np.array(image)
    return pixels[..., [1, 1, 1, 3]] if raw_mode.startswith("LA") else pixels


def _refuse_hidden_depth(image: Image.Image, codec: str, depth: object, file: IO[bytes]) -> None:
    """Raise InputError for colours of 16 bits whose lower bytes Pillow's decoder does not give."""
    if codec == "jpeg2k":
        file.seek(0)
        start = file.read(4096)
        bits = start[start.find(b"\xff\x51") :][40:41]  # of the first channel, in the marker of the sizes
        if bits and bits[0] & 0x7F > 7:
            raise InputError(f"Pillow misreads JPEG 2000 colours of more than 8 bits. {_CONVERT}")
    if codec in ("ppm", "ppm_plain") and depth == 65535 and np.array(image).max() < 2**15 >> 8:
        raise InputError(f"it uses so little of 16 bits per channel that they may mean fewer bits. {_CONVERT}")


def _scale(values: np.ndarray, has_16_bits: bool = False) -> np.ndarray:
    """Values as 8-bit ones, rounded: unless known, those of at most 255 have 8 bits, and those that reach 2**15 have 16.

    InputError if they may have another number of bits.
    """
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" or low < 0 or high > 65535:
        found = "floating-point numbers" if values.dtype.kind == "f" else f"from {low} to {high}"
        raise InputError(f"its pixels are {found}, not of 8 or 16 bits. {_CONVERT}")
    if high <= 255 and not has_16_bits:
        return values.astype(np.uint8)
    if high < 2**15 and not has_16_bits:
        raise InputError(f"its values of 16 bits reach {high} only, so that they may have 9 to 16 bits. {_CONVERT}")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
