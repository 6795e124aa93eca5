"""The ways to hide what an image shows, one class per kind, to find out which tokens needed it (paper section 3.1).

Each is a frozen record of its own parameters and is called with a random generator; none keeps state. Kinds differ in
what they act on: an `ImagePerturbation` on the RGB image, before the model's image processor, and a `PatchPerturbation`
on the patches that the processor makes of it. `data/images.py` calls either at its place.

Both `np.random.Generator` and `np.random.RandomState` serve as a generator: only `random` and `normal` are called, and
an array of draws consumes the stream in row-major order.

Shape suffix legend: P = patches, in the processor's order; Y = rows of a patch grid; X = columns of a patch grid.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from megatron_vppo.algorithm.types import ImageRef, PerturbKey
from megatron_vppo.config.choices import PerturbUnit

Rng = np.random.Generator | np.random.RandomState


class ImagePerturbation(ABC):
    """A perturbation of the image, before the image processor cuts it into patches."""

    @abstractmethod
    def __call__(self, image: Image.Image, rng: Rng) -> Image.Image:
        """Returns a perturbed copy of an RGB image, of the same size."""


class PatchPerturbation(ABC):
    """A perturbation that blacks some of the patches that the image processor made."""

    @abstractmethod
    def __call__(self, rng: Rng, *, grid: tuple[int, int], merge: int) -> NDArray[np.bool_]:
        """Returns bool [P], True for the patches that are blacked.

        Args:
            grid: rows and columns of patches.
            merge: patches along one side of a merge block.
        """


Perturbation = ImagePerturbation | PatchPerturbation


@dataclass(frozen=True, slots=True)
class BlackPatches(PatchPerturbation):
    """Blacks patches of the model's own grid, each with the same chance."""

    probability: float
    """The chance of each patch."""

    def __call__(self, rng: Rng, *, grid: tuple[int, int], merge: int) -> NDArray[np.bool_]:
        hidden_YX = draw_hidden(*grid, probability=self.probability, rng=rng)
        return hidden_YX.reshape(-1)[merge_order(*grid, merge)]


@dataclass(frozen=True, slots=True)
class BlackSquares(ImagePerturbation):
    """Blacks squares of the image, each with the same chance: the authors' perturbation.

    The squares begin at the top left and are cut off at the right and bottom edge (the authors' `perc_utils.py`).
    """

    probability: float
    """The chance of each square."""
    side: int
    """Pixels; the authors' is 14."""

    def __call__(self, image: Image.Image, rng: Rng) -> Image.Image:
        width, height = image.size
        rows, columns = -(-height // self.side), -(-width // self.side)
        hidden_YX = draw_hidden(rows, columns, probability=self.probability, rng=rng)
        hidden_pixels = hidden_YX.repeat(self.side, axis=0).repeat(self.side, axis=1)[:height, :width]
        pixels = np.array(image)
        pixels[hidden_pixels] = 0
        return Image.fromarray(pixels)


@dataclass(frozen=True, slots=True)
class GaussianNoise(ImagePerturbation):
    """Adds independent noise to each pixel and channel, then rounds and clips to 0..255."""

    std: float
    """Grey levels."""

    def __call__(self, image: Image.Image, rng: Rng) -> Image.Image:
        pixels = np.asarray(image, dtype=np.float64)
        noisy = pixels + rng.normal(0.0, self.std, pixels.shape)
        return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


@dataclass(frozen=True, slots=True)
class GaussianBlur(ImagePerturbation):
    """Blurs the image; it draws nothing."""

    radius: float
    """Pixels; the standard deviation."""

    def __call__(self, image: Image.Image, rng: Rng) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(self.radius))


@dataclass(frozen=True, slots=True)
class GreyImage(ImagePerturbation):
    """Replaces the image by one grey; it draws nothing."""

    level: int
    """0 (black) to 255 (white)."""

    def __call__(self, image: Image.Image, rng: Rng) -> Image.Image:
        return Image.new("RGB", image.size, (self.level,) * 3)


# --- What the kinds are made of ---------------------------------------------------------------------------------------


def perturb_rng(ref: ImageRef, key: PerturbKey, *, per: PerturbUnit, run_seed: int) -> np.random.Generator:
    """Returns the generator of one perturbation, seeded by a hash of (run seed, step, image[, draw]).

    Raises ValueError where an image has several perturbations (`per` is not 'image') and the key does not say which.
    """
    if per != "image" and key.draw is None:
        raise ValueError(f"perturb.per={per} needs PerturbKey.draw, and the key has none")
    draw = None if per == "image" else key.draw
    text = f"{run_seed}|{key.step}|{ref.split}|{ref.row}|{ref.index}|{draw}"
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def draw_hidden(rows: int, columns: int, *, probability: float, rng: Rng) -> NDArray[np.bool_]:
    """Draws which cells of a grid are hidden: bool [Y, X], one draw per cell, row by row from the top left."""
    return rng.random((rows, columns)) < probability


def merge_order(rows: int, columns: int, merge: int) -> NDArray[np.int64]:
    """Returns the row-by-row index of each patch in the processor's order: int64 [P].

    The processor lists the patches merge block by merge block. For 2 rows of 4 with blocks of 2 x 2:

        0 1 | 2 3
        4 5 | 6 7    ->  0 1 4 5  2 3 6 7
    """
    grid = np.arange(rows * columns, dtype=np.int64).reshape(rows // merge, merge, columns // merge, merge)
    return grid.transpose(0, 2, 1, 3).reshape(-1)
