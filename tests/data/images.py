"""Images for the tests of the data layer."""

from __future__ import annotations

import numpy as np
from PIL import Image


def noise_image(width: int, height: int, *, seed: int = 0, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)
