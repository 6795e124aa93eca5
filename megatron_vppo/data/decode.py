"""Encoded images to pixels: upright, complete, and as RGB in the way a viewer shows them.

Data check, trainer, engine and report all take images through this file.

An image's header gives its mode: the number format and meaning of its pixels. Every mode becomes RGB by one function,
`to_rgb`. Transparent pixels are laid over a background; PIL's own conversion would drop the transparency and show the
colour that happens to be stored there, which is mostly black.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, ImageColor

Rgb = tuple[int, int, int]

_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSED = (5, 6, 7, 8)  # the orientations that swap width and height
_OPERATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PHOTOMETRIC = 262  # the TIFF tag that says whether a level of 0 is white (0) or black (1)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # grey levels of more than 8 bits
_SIXTEEN_BITS = 65535


# --- Decoding ---------------------------------------------------------------------------------------------------------


def decode(data: bytes) -> Image.Image:
    """Decodes an image, upright by its EXIF tag, in its own mode."""
    image = Image.open(io.BytesIO(data))
    image.load()
    if image.format == "TIFF" and image.mode == "I;16" and image.tag_v2.get(_PHOTOMETRIC) == 0:
        # Of all widths, these are the levels that Pillow leaves the wrong way round.
        image = Image.fromarray(_SIXTEEN_BITS - np.asarray(image))
    # After loading: Pillow turns TIFF images itself, and then removes the tag.
    operation = _OPERATIONS.get(_orientation(image, data))
    return image if operation is None else image.transpose(operation)


def upright_size(data: bytes) -> tuple[int, int]:
    """Reads the (width, height) that `decode` will give from the header, without decoding pixels."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow has swapped the sides already
            return width, height
        return (height, width) if _orientation(image, data) in _TRANSPOSED else (width, height)


def check_complete(data: bytes) -> tuple[int, int]:
    """Checks that an image is complete, and returns its upright (width, height).

    Raises whatever PIL raises for a damaged one, and ValueError for grey levels that cannot become RGB.

    PNG files are checked by their checksums, JPEG files by decoding them at an eighth of their size, all others by
    decoding them.
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "PNG":
            image.verify()  # walks all chunks and compares their checksums
            return upright_size(data)
        if image.format == "JPEG":
            size = (max(1, image.width // 8), max(1, image.height // 8))
            image.draft("RGB", size)  # still reads every block
            image.load()
            return upright_size(data)
    decoded = decode(data)
    if decoded.mode in _WIDE_MODES:
        _eight_bits(np.asarray(decoded))
    return decoded.size


def _orientation(image: Image.Image, data: bytes) -> int:
    """Returns the EXIF orientation, 1 (upright) if there is none, or none that can be read.

    A PNG may have its EXIF data after the pixels, where PIL finds it only by decoding them. So it is looked for by the
    names of the chunks, before PIL is asked.
    """
    if image.format == "PNG" and "exif" not in image.info and not _has_png_chunk(data, b"eXIf"):
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises whatever damaged EXIF data make it run into
        return 1


def _has_png_chunk(data: bytes, name: bytes) -> bool:
    """Looks for a chunk; each is its length in 4 bytes, its name, its content and a checksum of 4 bytes."""
    position = len(_PNG_SIGNATURE)
    while position + 8 <= len(data):
        length, found = struct.unpack_from(">I4s", data, position)
        if found == name:
            return True
        position += 12 + length
    return False


# --- Conversion to RGB ------------------------------------------------------------------------------------------------


def parse_color(text: str) -> Rgb:
    """Reads a colour such as 'white', '#ffeedd' or 'rgb(10, 20, 30)'. Raises ValueError."""
    color = ImageColor.getrgb(text)
    if len(color) != 3:
        raise ValueError(f"{text!r} has an opacity, which a background cannot have")
    return color


def to_rgb(image: Image.Image, background: Rgb) -> Image.Image:
    """Converts an image of any mode to RGB, transparent pixels over `background`.

    Grey levels of 16 bits are divided by 257, so that 65535 becomes 255. Those of 32 bits and floating-point ones have
    no range of their own: see `_eight_bits`.
    """
    transparent_level = image.info.get("transparency") if image.mode in _WIDE_MODES else None
    if image.mode in _WIDE_MODES:
        levels = np.asarray(image)
        grey = Image.fromarray(_eight_bits(levels))
        if transparent_level is None:
            return grey.convert("RGB")
        opaque = Image.fromarray(np.where(levels == transparent_level, 0, 255).astype(np.uint8))
        return _over(grey.convert("RGB"), opaque, background)
    if image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    with_alpha = image.convert("RGBA")
    return _over(with_alpha.convert("RGB"), with_alpha.getchannel("A"), background)


def has_transparent_pixels(image: Image.Image) -> bool:
    """Returns True if some pixel of a decoded image is not opaque."""
    if image.mode in _WIDE_MODES:
        level = image.info.get("transparency")
        return level is not None and bool((np.asarray(image) == level).any())
    if not image.has_transparency_data:
        return False
    image = image.convert("LA") if image.mode == "La" else image
    return int(image.convert("RGBA").getchannel("A").getextrema()[0]) < 255


def _over(image: Image.Image, alpha: Image.Image, background: Rgb) -> Image.Image:
    """Lays an RGB image over a background, with an opacity of 0 to 255 per pixel."""
    result = Image.new("RGB", image.size, background)
    result.paste(image, mask=alpha)
    return result


def _eight_bits(levels: np.ndarray) -> np.ndarray:
    """Converts grey levels to 0..255, as uint8.

    Integers above 255 are taken for 16 bits. Floating-point levels are taken for 0..1 if all are within it, else for
    0..255.

    Raises ValueError for negative levels, for integers above 65535, for floating-point levels above 255, and for levels
    that are not finite.
    """
    if levels.size == 0:
        return levels.astype(np.uint8)
    values = levels.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    limit = 255 if levels.dtype.kind == "f" else _SIXTEEN_BITS
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > limit:
        raise ValueError(f"its grey levels reach from {low:g} to {high:g}, which no viewer shows; write 8 or 16 bits")
    if levels.dtype.kind == "f" and high <= 1:
        values = values * 255
    elif levels.dtype.itemsize == 2 or high > 255:
        values = values / 257
    return np.rint(values).astype(np.uint8)
