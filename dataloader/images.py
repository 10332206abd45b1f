"""One image file as a person sees it: the right way up, on a white page, with 8 bits per channel."""

import re
import sys
import warnings
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

from utils import InputError, printable, warn

# Pillow's own warnings would appear in the middle of a progress bar. What matters in them is checked here.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Formats that Pillow identifies but cannot show by itself (pages that need Ghostscript or Windows, files of measurements),
# and movies.
_NO_PICTURES = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "IPTC", "MPEG", "FLI"}

_ADVICE = "Replace it, or skip unreadable files with -verify_images"
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _MAX_SAMPLE_VALUE = 258, 262, 281  # TIFF tags
_WHITE_IS_ZERO = 0
_GREY = {"I", "I;16", "I;16L", "I;16B", "I;16N", "F"}  # Pillow's modes of one channel with more than 8 bits
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_LARGEST_8_BIT, _LARGEST_14_BIT, _LARGEST_16_BIT = 2**8 - 1, 2**14 - 1, 2**16 - 1
_warned_of: set[str] = set()  # paths of huge images, so that each is named once per process


def _readable_suffixes() -> frozenset[str]:
    Image.init()
    formats = (Image.OPEN.keys() | {"MPO"}) - _NO_PICTURES  # MPO is opened as the JPEG that it begins with
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


IMAGE_SUFFIXES = _readable_suffixes()


class ImageFacts(NamedTuple):
    """What a file says about its image.

    Attributes:
        shape: width, height and Pillow's colour mode.
        is_transparent: some pixel is not opaque.
        is_turned: its EXIF orientation asks for a turn or a flip.
    """

    shape: tuple[int, int, str]
    is_transparent: bool
    is_turned: bool


def read_image(path: str, *, upright: bool = True, advice: str = _ADVICE) -> Image.Image:
    """Decode an image file to RGB, 8 bits per channel; transparent pixels become white.

    Args:
        upright: turn the image as its EXIF orientation asks. Published sets were made without that.
        advice: what to do about an image that cannot be read, for the message.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return decode_image(path, upright=upright)[0]
    except Exception as error:  # whatever a broken file makes Pillow raise
        raise unreadable(path, error, advice) from error


def unreadable(path: str, error: Exception, advice: str = _ADVICE) -> InputError:
    """The error of an image that cannot be read, in one line."""
    message = f"expected an image in {printable(path)}; it cannot be read ({reason(error)})"
    return InputError(f"{message}. {advice}" if advice else message)


def reason(error: Exception) -> str:
    """What Pillow, or the system, has against a file, without the name of the file."""
    text = getattr(error, "strerror", None) or re.sub(r" (in )?('[^']*'|<_io\.[^>]*>)$", "", str(error))
    return " ".join(printable(text).split()) or type(error).__name__


def decode_image(file: str | IO[bytes], *, upright: bool = True) -> tuple[Image.Image, ImageFacts]:
    """The image of a file, as :func:`read_image` returns it, and what the file says; raises whatever Pillow does."""
    with Image.open(file) as image:
        if isinstance(file, str):
            _warn_if_huge(file, image.size)
        shape = (*image.size, image.mode)
        tiles = list(image.tile)  # loading, which PNG's EXIF data may need, consumes them
        stored_orientation = _orientation(image)
        image.load()
        pixels = _in_8_bits(image, tiles, file)
        turn = _TURNS.get(_orientation(image)) if upright else None  # Pillow has turned TIFF files by now
    pixels, is_transparent = _on_white(pixels)
    facts = ImageFacts(shape, is_transparent, stored_orientation in _TURNS)
    return (pixels if turn is None else pixels.transpose(turn)), facts


def _warn_if_huge(path: str, size: tuple[int, int]) -> None:
    pixels = size[0] * size[1]
    if Image.MAX_IMAGE_PIXELS and pixels > Image.MAX_IMAGE_PIXELS and path not in _warned_of:
        _warned_of.add(path)
        warn(f"{printable(path)} has {pixels / 1e6:.0f} million pixels, and every use decodes all of them. Shrink it")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data leaves an image as it is stored
        return 1
    return value if isinstance(value, int) else 1


def _on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """An RGB image without transparency, and whether there was any."""
    if not image.has_transparency_data:
        return image.convert("RGB"), False
    layer = image.convert("LA" if image.mode == "La" else image.mode).convert("RGBA")
    page = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(page, layer).convert("RGB"), layer.getchannel("A").getextrema()[0] < _LARGEST_8_BIT


# --- More than 8 bits -------------------------------------------------------------------------------------------------
# Pillow's own conversions would cut grey values at 255 and keep the upper byte of colours, whatever range is in use.


def _in_8_bits(image: Image.Image, tiles: list, file: str | IO[bytes]) -> Image.Image:
    """The loaded image with 8 bits per channel, in a mode that may have transparency."""
    codec, args = (tiles[0][0], tiles[0][3]) if tiles else ("", None)
    args = args if isinstance(args, tuple) and args else (args,)
    raw_mode = str(args[0])
    clear = image.info.get("transparency")
    if image.mode in _GREY:
        values = np.array(image)
        grey = _scale(values, _stated_maximum(image, codec))
        if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            grey = _LARGEST_8_BIT - grey
        if clear is None:
            return Image.fromarray(grey)
        return Image.fromarray(np.stack([grey, _opaque(values != clear)], axis=2), "LA")
    if raw_mode in ("L;2", "L;4") and isinstance(clear, int):
        image.info["transparency"] = clear * (85 if raw_mode == "L;2" else 17)  # the pixels were scaled to 8 bits
    _refuse_hidden_depth(image, codec, args, file)
    if not re.fullmatch(r"(LA|CMYK|RGB[AaX]?|[RGBA]);16[BLN]", raw_mode):
        return image
    upper = np.array(image)  # (H, W, C)
    colours = 3 if image.mode == "RGBA" else upper.shape[2]
    stated = _stated_maximum(image, codec)
    is_bright = upper[..., :colours].max() > _LARGEST_14_BIT >> 8
    if is_bright and clear is None and stated is None and (colours == upper.shape[2] or upper[..., colours:].any()):
        return image
    values = upper.astype(np.uint16) << 8 | _lower_bytes(file, raw_mode)
    channels = [_scale(values[..., :colours], stated)]
    if clear is not None:
        channels.append(_opaque((values != clear).any(2, keepdims=True)))
    elif colours < upper.shape[2]:
        channels.append(_scale(values[..., colours:], _LARGEST_16_BIT if upper[..., colours:].any() else None))
    pixels = np.concatenate(channels, axis=2)
    return Image.frombytes("RGBA" if clear is not None else image.mode, image.size, pixels.tobytes())


def _refuse_hidden_depth(image: Image.Image, codec: str, args: tuple, file: str | IO[bytes]) -> None:
    """Raise InputError for colours of 16 bits whose lower bytes Pillow's decoder does not give."""
    if codec == "jpeg2k" and _bits_of_jpeg2000(file) > 8:  # white, rounded up, becomes black
        raise InputError(f"Pillow misreads JPEG 2000 colours of more than 8 bits. {_CONVERT}")
    is_deep = (codec, args[-1]) in (("ppm", _LARGEST_16_BIT), ("ppm_plain", _LARGEST_16_BIT), ("sgi_rle", 2))
    if (is_deep or codec == "SGI16") and np.array(image).max() <= 2**14 >> 8:
        raise InputError(f"it uses so little of 16 bits per channel that they may mean fewer bits. {_CONVERT}")


def _bits_of_jpeg2000(file: str | IO[bytes]) -> int:
    if isinstance(file, str):
        with open(file, "rb") as opened:
            start = opened.read(4096)
    else:
        file.seek(0)
        start = file.read(4096)
    size_marker = start.find(b"\xff\x51")
    return (start[size_marker + 40] & 0x7F) + 1 if 0 <= size_marker < len(start) - 40 else 8


def _lower_bytes(file: str | IO[bytes], raw_mode: str) -> np.ndarray:
    """The lower bytes ``(H, W, C)`` of an image of 16 bits per channel, by reading it in the other byte order."""
    if not isinstance(file, str):
        file.seek(0)
    with Image.open(file) as image:
        image.tile = [tile._replace(args=_in_other_order(tile.args)) for tile in image.tile]
        image.load()
        pixels = np.array(image)
    return pixels[..., [1, 1, 1, 3]] if raw_mode.startswith("LA") else pixels


def _in_other_order(args: str | tuple) -> str | tuple:
    if not isinstance(args, str):
        return (_in_other_order(args[0]), *args[1:])
    # Pillow has no "LA;16L": the four bytes of a pixel are read as four channels.
    return "RGBA" if args.startswith("LA") else args[:-1] + _OTHER_BYTE[args[-1]]


def _opaque(mask: np.ndarray) -> np.ndarray:
    return np.where(mask, np.uint8(_LARGEST_8_BIT), np.uint8(0))


def _stated_maximum(image: Image.Image, codec: str) -> int | None:
    """The largest value that the image can have according to its file, where it says more than "16 bits"."""
    if codec in ("ppm", "ppm_plain"):  # Pillow has scaled the values from the file's own maximum
        return _LARGEST_16_BIT
    tags = getattr(image, "tag_v2", {})
    bits, largest = tags.get(_BITS_PER_SAMPLE, 16), tags.get(_MAX_SAMPLE_VALUE)
    bits, largest = (value[0] if isinstance(value, tuple) else value for value in (bits, largest))
    if largest is None and bits < 16:
        largest = 2**bits - 1
    return largest if largest and _LARGEST_8_BIT < largest < _LARGEST_16_BIT else None


def _scale(values: np.ndarray, maximum: int | None) -> np.ndarray:
    """Values of 0 to ``maximum`` as 8-bit ones, rounded to the nearest; the values tell the range if nothing else does.

    Raises:
        InputError: they do not tell it.
    """
    if values.dtype.kind == "f":
        raise InputError(f"expected pixels of 8 or 16 bits; got floats. {_CONVERT}")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > (maximum or _LARGEST_16_BIT):
        raise InputError(f"expected pixels of 8 or 16 bits; got {low} to {high}. {_CONVERT}")
    if maximum is None:
        if _LARGEST_8_BIT < high <= _LARGEST_14_BIT:
            raise InputError(
                f"its values of 16 bits reach {high} only, so that they may have 10, 12, 14 or 16 bits. {_CONVERT}"
            )
        maximum = _LARGEST_8_BIT if high <= _LARGEST_8_BIT else _LARGEST_16_BIT
    return ((values.astype(np.uint32) * _LARGEST_8_BIT + maximum // 2) // maximum).astype(np.uint8)


_CONVERT = "Convert it to 8 bits per channel"
