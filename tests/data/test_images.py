"""Image files become what a person sees: upright, on white, 8 bits per channel - or they are refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
from data_helpers import open_split
from helpers import write_images
from PIL import Image

from dataloader.images import decode_image, read_image
from utils import InputError

RANDOM = np.random.RandomState(0)
SIDE = 12
COLOURS = RANDOM.randint(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
ALPHA = RANDOM.randint(0, 256, (SIDE, SIDE)).astype(np.uint8)
ALPHA[0, 0] = 255
RGBA = Image.fromarray(np.dstack([COLOURS, ALPHA]))
GREY = RGBA.convert("L")


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


def encode(image: Image.Image, kind: str, **settings) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file


def pixels(file, **settings) -> np.ndarray:
    image = decode_image(file, **settings)[0]
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def same(found: np.ndarray, expected: np.ndarray, within: float = 1.0) -> bool:
    if expected.ndim == 2:
        expected = np.repeat(expected[..., None], 3, axis=2)
    return found.shape == expected.shape and np.abs(found - expected).max() <= within


# --- transparency ---


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "TGA", "ICO", "JPEG2000", "SGI"])
def test_transparent_images_are_put_on_white(kind):
    settings = {"ICO": {"sizes": [(SIDE, SIDE)]}, "WEBP": {"lossless": True, "exact": True}}.get(kind, {})
    file = encode(RGBA, kind, **settings)
    assert same(pixels(file), on_white(COLOURS, ALPHA))
    assert decode_image(file)[1].is_transparent
    opaque = encode(Image.fromarray(COLOURS), kind, **settings)
    assert same(pixels(opaque), COLOURS, within=0)
    assert not decode_image(opaque)[1].is_transparent


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_transparent_grey_images_are_put_on_white(kind):
    grey = GREY.copy()
    grey.putalpha(Image.fromarray(ALPHA))
    assert same(pixels(encode(grey, kind)), on_white(np.asarray(GREY)[..., None], ALPHA).repeat(3, 2))


def test_transparent_palettes_are_put_on_white():
    palette = RGBA.convert("RGB").quantize(8)
    plain = np.asarray(palette.convert("RGB"))
    index = np.asarray(palette)
    alpha = np.array([0, 127] + [255] * 254)[index]
    assert same(pixels(encode(palette, "PNG", transparency=b"\0\x7f")), on_white(plain, alpha))
    for kind in ("PNG", "GIF"):
        expected = on_white(plain, np.where(index == 3, 0, 255))
        assert same(pixels(encode(palette, kind, transparency=3)), expected, within=0)
    with_alpha = RGBA.convert("PA")
    layers = np.asarray(with_alpha.convert("RGBA"))
    assert same(pixels(encode(with_alpha, "TIFF")), on_white(layers[..., :3], layers[..., 3]))


def test_a_transparent_colour_is_put_on_white():
    colours, grey = COLOURS.copy(), np.asarray(GREY).copy()
    colours[2, 3], grey[2, 3] = (7, 8, 9), 77
    colours[5, 5], grey[5, 5] = colours[2, 3], grey[2, 3]
    expected = np.where((colours == (7, 8, 9)).all(2)[..., None], 255, colours)
    assert same(pixels(encode(Image.fromarray(colours), "PNG", transparency=(7, 8, 9))), expected, within=0)
    expected = np.where(grey == 77, 255, grey)
    assert same(pixels(encode(Image.fromarray(grey), "PNG", transparency=77)), expected, within=0)


def test_premultiplied_colours_are_put_on_white():
    premultiplied = np.round(COLOURS * (ALPHA[..., None] / 255)).astype(np.uint8)
    content = bytearray(encode(Image.fromarray(np.dstack([premultiplied, ALPHA])), "TIFF").getvalue())
    tag = content.index(struct.pack("<HHI", 338, 3, 1))  # ExtraSamples: 2 is alpha, 1 is alpha that is multiplied in
    content[tag + 8 : tag + 10] = struct.pack("<H", 1)
    assert same(pixels(io.BytesIO(content)), on_white(COLOURS, ALPHA), within=2)


def test_a_data_set_shows_ink_on_a_transparent_ground_as_black_on_white(tmp_path):
    (tmp_path / "test" / "a").mkdir(parents=True)
    page = np.zeros((40, 40, 4), np.uint8)
    page[:20, :, 3] = 255
    Image.fromarray(page).save(tmp_path / "test" / "a" / "ink.png")
    found = open_split("folder", tmp_path)[0][0]
    assert (found[:, :7].max(), found[:, 9:].min()) == (0, 255)


# --- orientation ---

TURNED = {  # orientation -> what shows the stored pixels as they were seen
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p),
}
TALL = COLOURS[:, :7]


def exif(orientation: object) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
def test_images_are_turned_upright(kind, orientation):
    blocks = np.kron(TALL, np.ones((16, 16, 1), np.uint8))
    settings = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}, "MPO": {"quality": 100}}
    file = encode(Image.fromarray(blocks), kind, exif=exif(orientation), **settings.get(kind, {}))
    found, facts = decode_image(file)
    assert facts.is_turned == (orientation != 1)
    expected = TURNED[orientation](blocks)
    assert np.asarray(found).shape == expected.shape
    assert np.abs(np.asarray(found).astype(int) - expected).mean() < (8 if kind == "MPO" else 2)
    stored = decode_image(file, upright=kind == "TIFF")[0]  # Pillow itself turns TIFF files
    assert stored.size == (found.size if kind == "TIFF" else (7 * 16, SIDE * 16))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("orientation", [5, 6])
def test_uncompressed_tiff_files_are_turned_upright(tmp_path, orientation, mode):
    """Pillow maps such a file into memory if it is given its path, with width and height mistaken for each other."""
    grey = Image.fromarray(TALL).convert("L")
    stored = (
        Image.fromarray(np.asarray(grey) * np.uint16(257)) if mode == "I;16" else Image.fromarray(TALL).convert(mode)
    )
    stored.save(tmp_path / "0.tif", tiffinfo={274: orientation})
    expected = TURNED[orientation](np.asarray((grey if mode == "I;16" else stored).convert("RGB")).astype(int))
    assert same(np.asarray(read_image(str(tmp_path / "0.tif"))).astype(int), expected, within=0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("data", [b"", b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_leaves_an_image_as_it_is(kind, data):
    assert pixels(encode(Image.fromarray(TALL), kind, exif=data)).shape == TALL.shape


@pytest.mark.parametrize("value", [0, 9, 77])
def test_unknown_orientations_leave_an_image_as_it_is(value):
    assert same(pixels(encode(Image.fromarray(TALL), "PNG", exif=exif(value))), TALL, within=0)


def test_published_sets_stay_as_stored(tmp_path):
    for folder in ("FC100/test/a", "test/a"):
        (tmp_path / folder).mkdir(parents=True)
        blocks = np.arange(3 * 32 * 32, dtype=np.uint32).astype(np.uint8).reshape(32, 32, 3)
        Image.fromarray(blocks).save(tmp_path / folder / "0.png", exif=exif(3))
    stored, turned = (open_split(name, tmp_path)[0][0] for name in ("fc100", "folder"))
    assert not stored.equal(turned)
    assert stored.equal(turned.flip(1, 2))


# --- more than 8 bits ---

RAMP = np.arange(0, 2**16, 16, dtype=np.uint16).reshape(64, 64)


def deep_png(values: np.ndarray, colour_type: int, transparent: bytes = b"") -> io.BytesIO:
    """A PNG file of 16 bits per channel: 0 is grey, 2 RGB, 4 grey with alpha, 6 RGBA."""
    return write_png(values.astype(">u2"), values.shape[1], 16, colour_type, transparent)


def write_png(rows: np.ndarray, width: int, bits: int, colour_type: int, transparent: bytes) -> io.BytesIO:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, colour_type, 0, 0, 0))
    rows = b"".join(b"\0" + row.tobytes() for row in rows)
    clear = chunk(b"tRNS", transparent) if transparent else b""
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + header + clear + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def deep_tiff(values: np.ndarray, **settings) -> io.BytesIO:
    return encode(Image.fromarray(values), "TIFF", **settings)


@pytest.mark.parametrize(
    ("values", "suffix", "mode"),
    [
        (RAMP, ".png", "I;16"),
        (RAMP, ".tif", "I;16"),
        (RAMP.astype(">u2"), ".tif", "I;16B"),
        (RAMP.astype(np.int32), ".tif", "I"),
        (RAMP, ".pgm", "I"),
        (RAMP, ".jp2", "I;16"),
    ],
)
def test_16_bit_grey_is_scaled(tmp_path, values, suffix, mode):
    file = tmp_path / f"ramp{suffix}"
    Image.fromarray(values).save(file, **({"compress_level": 0} if suffix == ".png" else {}))
    assert Image.open(file).mode == mode
    assert same(np.asarray(read_image(str(file))).astype(int), np.rint(RAMP / 257), within=0)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(InputError, match=f"{file} cannot be read as an image"):
        read_image(str(file))


LOW = RANDOM.randint(0, 256, (SIDE, SIDE, 3)).astype(np.uint16)


def test_values_of_8_bits_in_16_are_not_black():
    grey = LOW[..., 0]
    for file in (
        deep_png(grey, 0),
        deep_tiff(grey),
        deep_tiff(grey.astype(np.int32)),
        encode(Image.fromarray(grey), "PPM"),
    ):
        assert same(pixels(file), grey, within=0)
    assert same(pixels(deep_png(LOW, 2)), LOW, within=0)
    for alpha in (ALPHA.astype(np.uint16), ALPHA.astype(np.uint16) * 257):
        assert same(pixels(deep_png(np.dstack([LOW, alpha]), 6)), on_white(LOW, ALPHA))
        assert same(pixels(deep_png(np.dstack([grey, alpha]), 4)), on_white(LOW[..., :1], ALPHA).repeat(3, 2))


def test_16_bit_colours_are_scaled_and_put_on_white():
    values = RANDOM.randint(0, 2**16, (SIDE, SIDE, 3)).astype(np.uint16)
    alpha = ALPHA.astype(np.uint16) * 257
    assert same(pixels(deep_png(values, 2)), values / 257)
    assert same(pixels(deep_png(np.dstack([values, alpha]), 6)), on_white(values / 257, ALPHA), within=2.5)
    assert same(pixels(deep_png(np.dstack([values, ALPHA]), 6)), on_white(values / 257, ALPHA), within=2.5)
    clear = values[4, 4]
    expected = np.where((values == clear).all(2)[..., None], 255, values / 257)
    assert same(pixels(deep_png(values, 2, struct.pack(">HHH", *map(int, clear)))), expected)
    expected = np.where(values[..., 0] == clear[0], 255, values[..., 0] / 257)
    assert same(pixels(deep_png(values[..., 0], 0, struct.pack(">H", int(clear[0])))), expected)


@pytest.mark.parametrize("bits", [9, 12, 15])
def test_fewer_bits_in_16_need_a_word_from_the_file(bits, tmp_path):
    largest = 2**bits - 1
    values = RANDOM.randint(0, largest + 1, (SIDE, SIDE, 3)).astype(np.uint16)
    values[0, 0] = largest
    grey = values[..., 0]
    for stated, dark in ((largest, grey), (4095, LOW[..., 0])):  # which stays as dark as it is
        header = f"P5 {SIDE} {SIDE} {stated}\n".encode()
        assert same(pixels(io.BytesIO(header + dark.astype(">u2").tobytes())), dark * (255 / stated))
    alpha = np.full((SIDE, SIDE), 2**16 - 1)
    for file in (
        deep_png(grey, 0),
        deep_png(values, 2),
        deep_png(np.dstack([values, alpha]), 6),
        deep_tiff(grey),
        deep_tiff(grey.astype(np.int32)),
        io.BytesIO(f"P6 {SIDE} {SIDE} 65535\n".encode() + values.astype(">u2").tobytes()),
    ):
        path = tmp_path / "deep.png"
        path.write_bytes(file.getvalue())
        with pytest.raises(
            InputError, match=r"deep.png cannot be read as an image \(it.* bits.*\. Convert it to 8 bits per channel\)"
        ):
            read_image(str(path))


@pytest.mark.parametrize("kind", [1, 2], ids=["premultiplied", "straight"])
def test_alpha_of_fewer_bits_in_16_is_refused(kind):
    ramp = np.linspace(0, 1, SIDE**2).reshape(SIDE, SIDE, 1)

    def file(bits: int, alpha: np.ndarray) -> io.BytesIO:
        colours = COLOURS / 255 * (alpha if kind == 1 else 1)
        return rgba_tiff(np.rint(np.dstack([colours, alpha]) * (2**bits - 1)).astype("<u2"), kind)

    assert same(pixels(file(16, ramp)), on_white(COLOURS, ramp[..., 0] * 255), within=4)
    for bits, largest in [(9, 1), (10, 0.1), (12, 1), (12, 0.03), (15, 1)]:
        with pytest.raises(InputError, match="of 16 bits reach.* only"):
            decode_image(file(bits, ramp * largest))


def rgba_tiff(values: np.ndarray, kind: int) -> io.BytesIO:
    """An uncompressed TIFF file of 16 bits per channel; ``kind`` is 1 for premultiplied alpha, 2 for straight alpha."""
    tags = {256: SIDE, 257: SIDE, 258: 142, 259: 1, 262: 2, 273: 150, 277: 4, 278: SIDE, 279: 8 * SIDE**2, 338: kind}
    entries = [struct.pack("<HHII", tag, 3, 4 if tag == 258 else 1, value) for tag, value in tags.items()]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + b"".join(entries) + bytes(4)
    return io.BytesIO(head.ljust(142, b"\0") + struct.pack("<4H", 16, 16, 16, 16) + values.tobytes())


@pytest.mark.parametrize("values", [LOW[..., 0].astype(np.uint8), RAMP // 2], ids=["8 bits", "16 bits"])
def test_signed_values_are_refused(values):
    with pytest.raises(InputError, match="its values are signed. Convert it"):
        decode_image(deep_tiff(values, tiffinfo={339: 2}))


def test_jpeg_2000_colours_of_16_bits_are_refused():
    """Pillow makes black of their white; it cannot write them, so this is an 8-bit file whose header says 16."""
    content = bytearray(encode(Image.fromarray(COLOURS), "JPEG2000").getvalue())
    size_marker = content.index(b"\xff\x51")
    assert same(pixels(io.BytesIO(content)), COLOURS, within=0)
    for channel in range(3):
        content[size_marker + 40 + 3 * channel] = 15
    with pytest.raises(InputError, match="JPEG 2000 colours of more than 8 bits. Convert it"):
        decode_image(io.BytesIO(content))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_grey_of_few_bits_is_put_on_white(bits):
    levels = np.tile(np.arange(2**bits, dtype=np.uint8), (2, 1))
    packed = np.packbits(np.unpackbits(levels[..., None], axis=2)[..., -bits:].reshape(2, -1), axis=1)
    clear = 2**bits // 3
    content = write_png(packed, levels.shape[1], bits, 0, struct.pack(">H", clear))
    assert same(pixels(content), np.where(levels == clear, 255, levels * (255 // (2**bits - 1))), within=0)


def test_white_is_zero():
    assert same(pixels(deep_tiff(RAMP, tiffinfo={262: 0})), 255 - np.rint(RAMP / 257), within=0)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (RAMP / np.float32(2**16), "floating-point numbers"),
        (RAMP.astype(np.int32) + 1000, "1000 to 66520"),
        (RAMP.astype(np.int32) - 1, "-1 to 65519"),
    ],
)
def test_images_of_other_numbers_are_refused(tmp_path, values, what):
    Image.fromarray(values).save(tmp_path / "deep.tif")
    with pytest.raises(InputError, match=rf"its pixels are (from )?{what}, not of 8 or 16 bits. Convert it"):
        read_image(str(tmp_path / "deep.tif"))


# --- other colours ---


@pytest.mark.parametrize(
    ("mode", "kind", "within"),
    [("CMYK", "JPEG", 12), ("CMYK", "TIFF", 0), ("YCbCr", "TIFF", 3), ("YCbCr", "JPEG", 12), ("LAB", "TIFF", 20)],
)
def test_other_colour_spaces_come_out_as_rgb(mode, kind, within):
    blocks = np.kron(COLOURS, np.ones((8, 8, 1), np.uint8))
    settings = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    assert same(pixels(encode(Image.fromarray(blocks).convert(mode), kind, **settings)), blocks, within)


def test_black_and_white_images_are_0_and_255():
    marks = COLOURS[..., 0] > 127
    for kind in ("PNG", "TIFF", "GIF", "PPM"):
        assert same(pixels(encode(Image.fromarray(marks), kind)), 255 * marks, within=0)


def test_an_image_in_a_file_of_another_suffix_is_read(tmp_path):
    write_images(tmp_path, 1, suffix=".jpg")
    (tmp_path / "0000.jpg").rename(tmp_path / "0000.tga")
    assert read_image(str(tmp_path / "0000.tga")).size == (20, 20)
