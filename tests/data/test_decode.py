"""Encoded images as a viewer shows them: transparency, grey levels of every width, colour spaces, orientations."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from megatron_vppo.data.decode import check_complete, decode, has_transparent_pixels, to_rgb, upright_size

WHITE = (255, 255, 255)
EVERY_TAG = range(1, 9)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(data: bytes, background: tuple[int, int, int] = WHITE) -> NDArray[np.uint8]:
    image = to_rgb(decode(data), background)
    assert image.mode == "RGB"
    return np.asarray(image)


# --- Transparency -----------------------------------------------------------------------------------------------------


def strokes(mode: str) -> Image.Image:
    """56 x 56 pixels of which a share of 250 / 3136 are black and opaque; all others are black and transparent."""
    alpha = np.zeros((56, 56), dtype=np.uint8)
    alpha[3:8, 3:53] = 255
    black = Image.new("L", (56, 56))
    canvas = Image.merge("LA", [black, Image.fromarray(alpha)])
    return canvas if mode == "LA" else canvas.convert(mode)


def palette(*, table: bool) -> tuple[Image.Image, dict[str, Any]]:
    """The strokes with a palette: one transparent index, or an opacity for each index."""
    indices = (np.asarray(strokes("LA"))[..., 1] == 0).astype(np.uint8)  # 0: stroke, 1: paper
    image = Image.fromarray(indices).convert("P")
    image.putpalette([0, 0, 0] * 2)
    return image, {"transparency": bytes([255, 0]) if table else 1}


def transparent_files() -> dict[str, bytes]:
    one, one_options = palette(table=False)
    table, table_options = palette(table=True)
    return {
        "RGBA PNG": encoded(strokes("RGBA"), "PNG"),
        "LA PNG": encoded(strokes("LA"), "PNG"),
        "palette PNG, one index": encoded(one, "PNG", **one_options),
        "palette PNG, a table": encoded(table, "PNG", **table_options),
        "WebP": encoded(strokes("RGBA"), "WEBP", lossless=True, exact=True),
        "GIF": encoded(one, "GIF", **one_options),
        "TIFF": encoded(strokes("RGBA"), "TIFF"),
        "LA TIFF": encoded(strokes("LA"), "TIFF"),
        "AVIF": encoded(strokes("RGBA"), "AVIF", quality=100),
    }


@pytest.mark.parametrize("kind", transparent_files())
def test_strokes_are_seen_on_white(kind: str) -> None:
    data = transparent_files()[kind]
    pixels = rgb(data)
    expected = 255 * (1 - 250 / 3136)
    assert pixels.mean() == pytest.approx(expected, abs=0.5)
    assert pixels[5, 20].max() < 5 and pixels[30, 30].min() > 250
    assert has_transparent_pixels(decode(data))
    assert rgb(data, (10, 200, 30))[30, 30].tolist() == pytest.approx([10, 200, 30], abs=2)


@pytest.mark.parametrize(
    ("image", "transparency", "expected"),
    [
        (Image.fromarray(np.array([[[9, 8, 7], [1, 2, 3]]], dtype=np.uint8)), (1, 2, 3), [[9, 8, 7], [255] * 3]),
        (Image.fromarray(np.array([[9, 1]], dtype=np.uint8)), 1, [[9] * 3, [255] * 3]),
        (Image.fromarray(np.array([[257 * 9, 300]], dtype=np.uint16)), 300, [[9] * 3, [255] * 3]),
    ],
    ids=["RGB", "L", "I;16"],
)
def test_a_color_that_stands_for_transparency(image: Image.Image, transparency: Any, expected: list[list[int]]) -> None:
    """PNG's tRNS chunk without a palette."""
    data = encoded(image, "PNG", transparency=transparency) if image.mode != "I;16" else _with_trns(image, transparency)
    assert rgb(data)[0].tolist() == expected
    assert has_transparent_pixels(decode(data))


def _with_trns(image: Image.Image, level: int) -> bytes:
    """A grey PNG of 16 bits with the transparent level that PIL does not write."""
    data = encoded(image, "PNG")
    chunk = b"tRNS" + struct.pack(">H", level)
    place = data.index(b"IDAT") - 4
    return data[:place] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[place:]


def test_half_transparent_pixels_are_mixed() -> None:
    pixel = Image.new("RGBA", (1, 1), (100, 0, 200, 51))  # an opacity of 51 / 255 = 0.2
    assert np.asarray(to_rgb(pixel, WHITE))[0, 0].tolist() == [224, 204, 244]
    for mode in ("RGBa", "La", "PA"):
        assert to_rgb(pixel.convert("LA" if mode != "RGBa" else "RGBA").convert(mode), WHITE).mode == "RGB"


def test_an_opaque_image_has_no_transparent_pixel_whatever_its_mode() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "I", "F"):
        assert not has_transparent_pixels(noise.convert(mode)), mode
    opaque = noise.convert("RGBA")
    assert np.array_equal(np.asarray(to_rgb(opaque, (1, 2, 3))), np.asarray(noise))


# --- Grey levels and colour spaces ------------------------------------------------------------------------------------

RAMP = np.arange(0, 256, 5)


@pytest.mark.parametrize(
    ("levels", "kinds"),
    [
        ((RAMP * 257).astype(np.uint16), ["PNG", "TIFF"]),
        ((RAMP * 257).astype(np.int32), ["TIFF"]),
        (RAMP.astype(np.int32), ["TIFF"]),
        ((RAMP / 255).astype(np.float32), ["TIFF"]),
        (RAMP.astype(np.float32), ["TIFF"]),
        (RAMP.astype(np.uint8), ["PNG", "TIFF", "BMP", "PPM"]),
    ],
    ids=["16 bits", "16 bits in 32", "8 bits in 32", "floats to 1", "floats to 255", "8 bits"],
)
def test_grey_levels_of_every_width(levels: np.ndarray, kinds: list[str]) -> None:
    for kind in kinds:
        data = encoded(Image.fromarray(levels[None, :]), kind)
        assert rgb(data)[0, :, 0].tolist() == RAMP.tolist(), kind
        assert check_complete(data) == (len(RAMP), 1)


@pytest.mark.parametrize("levels", [[-1.0, 2.0], [0.0, 256.0], [0.0, float("nan")], [0.0, float("inf")]])
def test_grey_levels_without_a_meaning_are_refused(levels: list[float]) -> None:
    data = encoded(Image.fromarray(np.array([levels], dtype=np.float32)), "TIFF")
    with pytest.raises(ValueError, match=r"grey levels reach from .* write 8 or 16 bits"):
        check_complete(data)


def test_sixteen_bits_whose_zero_is_white() -> None:
    """TIFF's tag 262 is 0, as in many scans of X-rays; PIL gives the levels as they are stored."""
    data = encoded(Image.fromarray((RAMP * 257).astype(np.uint16)[None, :]), "TIFF")
    tag = struct.pack("<HHI", 262, 3, 1)
    assert data.count(tag + b"\1\0") == 1
    data = data.replace(tag + b"\1\0", tag + b"\0\0")
    assert rgb(data)[0, :, 0].tolist() == RAMP[::-1].tolist()
    assert check_complete(data) == (len(RAMP), 1)


def test_color_spaces() -> None:
    red = Image.new("RGB", (2, 2), (254, 0, 0))
    assert np.abs(rgb(encoded(red.convert("CMYK"), "TIFF"))[0, 0].astype(int) - [254, 0, 0]).max() <= 1
    assert np.abs(rgb(encoded(red.convert("CMYK"), "JPEG", quality=100))[0, 0].astype(int) - [254, 0, 0]).max() <= 3
    # Under D50, the white of TIFF, red is L* 54.3, a* 80.8, b* 69.9. PIL holds L in 0..255, a and b with 128 added.
    lab = Image.merge("LAB", [Image.new("L", (2, 2), v) for v in (138, 209, 198)])
    assert np.abs(rgb(encoded(lab, "TIFF"))[0, 0].astype(int) - [255, 0, 0]).max() <= 6
    bits = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1")
    for kind in ("PNG", "TIFF", "BMP"):
        assert rgb(encoded(bits, kind))[0, :, 0].tolist() == [0, 255]


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], **{"duration": 10} if kind != "TIFF" else {}
        )
        assert rgb(data)[4, 4].tolist() == pytest.approx([255, 0, 0], abs=4), kind


# --- Orientation ------------------------------------------------------------------------------------------------------

TURNED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.swapaxes(np.rot90(a, 2), 0, 1),
    8: lambda a: np.rot90(a, 1),
}
"""Stored pixels to those seen, by EXIF's definition of the tag: 6 is turned a quarter clockwise."""


def corners() -> NDArray[np.uint8]:
    """40 rows of 72 pixels with a colour of its own in each quarter, in blocks that survive lossy files."""
    pixels = np.zeros((40, 72, 3), dtype=np.uint8)
    pixels[:20, :36], pixels[:20, 36:] = (250, 0, 0), (0, 250, 0)
    pixels[20:, :36], pixels[20:, 36:] = (0, 0, 250), (250, 250, 250)
    return pixels


def tagged(kind: str, tag: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = tag
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}, "AVIF": {"quality": 100}}
    image = Image.fromarray(corners())
    if kind == "PNG, tag after the pixels":
        data = encoded(image, "PNG", exif=exif)
        place = data.index(b"eXIf") - 4
        size = 12 + struct.unpack_from(">I", data, place)[0]
        end = data.index(b"IEND") - 4
        return data[:place] + data[place + size : end] + data[place : place + size] + data[end:]
    return encoded(image, kind, exif=exif, **options.get(kind, {}))


@pytest.mark.parametrize("tag", EVERY_TAG)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG, tag after the pixels", "WEBP", "TIFF", "AVIF", "MPO"])
def test_every_orientation_of_every_type(kind: str, tag: int) -> None:
    data = tagged(kind, tag)
    expected = TURNED[tag](corners())
    seen = rgb(data)
    assert seen.shape == expected.shape
    height, width = seen.shape[:2]
    for row, column in ((1, 1), (1, 3), (3, 1), (3, 3)):  # the middle of each quarter: edges are blurred in lossy files
        place = row * height // 4, column * width // 4
        assert np.abs(seen[place].astype(int) - expected[place]).max() < 8, place
    size = (expected.shape[1], expected.shape[0])
    assert upright_size(data) == check_complete(data) == decode(data).size == size


@pytest.mark.parametrize(
    ("kind", "exif"),
    [
        ("PNG", b"no EXIF"),
        # Big-endian TIFF with one entry: tag 0x0112, a fraction, at byte 26: 6 / 0.
        ("JPEG", b"Exif\0\0" + struct.pack(">2sHIHHHIIIII", b"MM", 42, 8, 1, 0x0112, 5, 1, 26, 0, 6, 0)),
    ],
    ids=["no EXIF", "no number"],
)
def test_exif_data_that_cannot_be_read_turn_no_image(kind: str, exif: bytes) -> None:
    """Viewers show such an image as it is stored."""
    image = Image.fromarray(corners())
    data = encoded(image, kind, exif=exif)
    assert upright_size(data) == check_complete(data) == decode(data).size == image.size
