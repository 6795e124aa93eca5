"""What VPPO hides of a picture to find out which tokens needed it (paper section 3.1, spec 1.5).

Functions of an image or of patches and a random generator; nothing here keeps state. Both `np.random.Generator` and
`np.random.RandomState` serve: only `random` and `normal` are called, and an array of draws consumes the stream in
row-major order.

Shape suffix legend: H, W = pixels; P = vision patches in the processor's order; D = channels * frames * patch * patch;
R, C = rows and columns of the patch grid.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor, from_numpy

from megatron_vppo.algorithm.types import ImageRef, PerturbKey
from megatron_vppo.config.choices import PerturbKind, PerturbSpace, PerturbUnit

Rng = np.random.Generator | np.random.RandomState


@dataclass(frozen=True, slots=True)
class PerturbSettings:
    kind: PerturbKind = "patch_black"
    probability: float = 0.5
    """Chance of each patch to be blacked (patch_black)."""
    stage: PerturbSpace = "patches"
    """'patches': on the model's own grid; 'pixels': before the processor's resize, on a fixed grid (the authors')."""
    patch_size: int | None = None
    """Pixels; grid of stage 'pixels'. None for stage 'patches'."""
    per: PerturbUnit = "row"
    """A fresh one for each response, or one per image and step."""
    noise_std: float = 189.0
    """Grey levels."""
    blur_radius: float = 6.0
    """Pixels."""
    grey_level: int = 128

    def __post_init__(self) -> None:
        if self.kind == "patch_black" and (self.stage == "pixels") != (self.patch_size is not None):
            raise ValueError(
                f"perturb.stage={self.stage} with perturb.patch_size={self.patch_size}: stage 'pixels' needs a "
                "patch_size (the authors': 14), stage 'patches' uses the model's own"
            )
        if not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"perturb.probability={self.probability} is outside [0, 1]")


def perturb_rng(settings: PerturbSettings, ref: ImageRef, key: PerturbKey, *, run_seed: int) -> np.random.Generator:
    """The generator of one perturbation, seeded by a hash of (run seed, step, split, row, image[, response row]).

    Raises ValueError where `settings.per` is 'row' and the key names none.
    """
    if settings.per == "row" and key.response_row is None:
        raise ValueError("perturb.per=row needs PerturbKey.response_row; with per=image one mask serves all responses")
    response_row = key.response_row if settings.per == "row" else None
    text = f"{run_seed}|{key.step}|{ref.split}|{ref.row}|{ref.index}|{response_row}"
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def merge_order(rows: int, columns: int, merge: int) -> NDArray[np.int64]:
    """int64 [P]: for each patch in the processor's order (merge blocks first), its raster index in the grid."""
    grid = np.arange(rows * columns, dtype=np.int64).reshape(rows // merge, merge, columns // merge, merge)
    return grid.transpose(0, 2, 1, 3).reshape(-1)


def black_patch_mask(rows: int, columns: int, *, probability: float, rng: Rng) -> NDArray[np.bool_]:
    """bool [R, C], True where the patch is hidden: one draw per patch, in raster order whatever the model's is."""
    return rng.random((rows, columns)) < probability


def black_out_patches(patches_PD: Tensor, hidden_RC: NDArray[np.bool_], black_D: Tensor, *, merge: int) -> Tensor:
    """A copy of the patches in which the hidden ones hold `black_D`, the processor's values for black pixels."""
    rows, columns = hidden_RC.shape
    hidden_P = hidden_RC.reshape(-1)[merge_order(rows, columns, merge)]
    out_PD = patches_PD.clone()
    out_PD[from_numpy(hidden_P)] = black_D.to(out_PD.dtype)
    return out_PD


def black_out_blocks(image: Image.Image, *, patch_size: int, probability: float, rng: Rng) -> Image.Image:
    """The authors' grid: blocks of `patch_size` pixels from the top left, cut off at the right and bottom edge, each
    black with `probability`, drawn row by row (`perc_utils.py`, spec T9)."""
    width, height = image.size
    hidden = black_patch_mask(-(-height // patch_size), -(-width // patch_size), probability=probability, rng=rng)
    hidden_HW = hidden.repeat(patch_size, axis=0).repeat(patch_size, axis=1)[:height, :width]
    pixels = np.array(image)
    pixels[hidden_HW] = 0
    return Image.fromarray(pixels)


def add_gaussian_noise(image: Image.Image, *, std: float, rng: Rng) -> Image.Image:
    """Independent noise per pixel and channel, in grey levels, rounded and clipped to 0..255."""
    pixels = np.asarray(image, dtype=np.float64)
    noisy = pixels + rng.normal(0.0, std, pixels.shape)
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def perturb_image(image: Image.Image, settings: PerturbSettings, rng: Rng) -> Image.Image:
    """A perturbed copy of an RGB image, of the same size. patch_black is the authors' grid ('pixels')."""
    if settings.kind == "patch_black":
        if settings.patch_size is None:
            raise ValueError("patch_black on pixels needs perturb.patch_size (the authors': 14)")
        return black_out_blocks(image, patch_size=settings.patch_size, probability=settings.probability, rng=rng)
    if settings.kind == "gaussian_noise":
        return add_gaussian_noise(image, std=settings.noise_std, rng=rng)
    if settings.kind == "gaussian_blur":
        return image.filter(ImageFilter.GaussianBlur(settings.blur_radius))
    return Image.new("RGB", image.size, (settings.grey_level,) * 3)
