"""Perturbations against the authors' numbers, and against the pixels they stand for."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image

from megatron_vppo.algorithm.types import ImageRef, PerturbKey
from megatron_vppo.data.perturb import (
    BlackPatches,
    BlackSquares,
    GaussianBlur,
    GaussianNoise,
    GreyImage,
    ImagePerturbation,
    draw_hidden,
    merge_order,
    perturb_rng,
)
from tests.data.images import noise_image

REF = ImageRef("train", 7, 0)
KEY = PerturbKey(step=3, draw=1)


def test_golden_mask_of_the_authors() -> None:
    """The authors' `perc_utils.py` on a white 40x20 image: squares of 14 pixels, p 0.5, np.random.seed(1)."""
    white = Image.new("RGB", (40, 20), "white")
    rng = np.random.RandomState(1)
    pixels = np.asarray(BlackSquares(0.5, side=14)(white, rng))
    assert pixels[::14, ::14, 0].tolist() == [[0, 255, 0], [0, 0, 0]]
    # Squares are uniform to their cut-off edges, in every channel.
    grid = np.array([[0, 255, 0], [0, 0, 0]], dtype=np.uint8)
    expected = np.kron(grid, np.ones((14, 14), dtype=np.uint8))[:20, :40]
    assert np.array_equal(pixels, np.stack([expected] * 3, axis=-1))


def test_draws_are_the_authors_scalar_draws_in_row_major_order() -> None:
    scalar = np.random.RandomState(5)
    expected = [[scalar.rand() < 0.3 for _ in range(11)] for _ in range(4)]
    assert draw_hidden(4, 11, probability=0.3, rng=np.random.RandomState(5)).tolist() == expected


def test_merge_order_of_a_small_grid() -> None:
    # 2x4 patches, merged 2x2: the left block (0 1 / 4 5) comes before the right one (2 3 / 6 7).
    assert merge_order(2, 4, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert merge_order(4, 2, 2).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("rows, columns", [(4, 6), (2, 10), (8, 2)])
def test_black_patches_are_black_pixels_before_the_processor(processor, rows: int, columns: int) -> None:
    """The same draws, once on the patches and once on the image that the processor then cuts up."""
    image = Image.new("RGB", (columns * 14, rows * 14), "white")
    limits = {"shortest_edge": 28 * 28, "longest_edge": 1 << 30}
    black = BlackSquares(0.5, side=14)(image, np.random.RandomState(3))
    cut = processor.image_processor(
        images=[black], size=limits, return_tensors="pt", do_rescale=False, do_normalize=False
    )["pixel_values"]
    hidden_P = BlackPatches(0.5)(np.random.RandomState(3), grid=(rows, columns), merge=2)
    assert 0 < hidden_P.sum() < hidden_P.size
    assert np.array_equal(cut.numpy() == 0, np.broadcast_to(hidden_P[:, None], cut.shape))


def test_other_perturbations() -> None:
    image = noise_image(60, 40)
    grey = GreyImage(128)(image, np.random.default_rng(0))
    assert grey.size == (60, 40) and set(np.asarray(grey).reshape(-1)) == {128}
    # Blur of a step edge: dark and bright side meet half way, far from the edge nothing changes.
    step = Image.fromarray(np.repeat(np.array([[0] * 60 + [200] * 60], dtype=np.uint8), 90, axis=0)).convert("RGB")
    blurred = np.asarray(GaussianBlur(6.0)(step, np.random.default_rng(0)))[45, :, 0]
    assert blurred[5] == 0 and blurred[115] == 200 and 80 < blurred[59] < 120
    assert blurred[59 - 6] == pytest.approx(200 * 0.159, abs=10)  # one standard deviation out
    # Noise of small std: its moments, on a grey that is never clipped.
    level = Image.new("RGB", (200, 200), (128, 128, 128))
    noisy = np.asarray(GaussianNoise(10.0)(level, np.random.default_rng(1)), dtype=np.float64)
    assert noisy.mean() == pytest.approx(128, abs=0.2) and noisy.std() == pytest.approx(10, abs=0.2)
    # Noise of the paper's std: P(clipped to black) = Phi(-128/189) = 0.249, and channels are independent.
    strong = np.asarray(GaussianNoise(189.0)(level, np.random.default_rng(2)))
    assert (strong == 0).mean() == pytest.approx(0.249, abs=0.01)
    assert abs(np.corrcoef(strong[..., 0].ravel(), strong[..., 1].ravel())[0, 1]) < 0.02


def test_generator_depends_on_every_part_of_its_key() -> None:
    def draws(per="row", ref=REF, key=KEY, seed=0):
        return tuple(perturb_rng(ref, key, per=per, run_seed=seed).random(4))

    variants = {
        draws(),
        draws(seed=1),
        draws(key=PerturbKey(4, 1)),
        draws(key=PerturbKey(3, 2)),
        draws(ref=ImageRef("val", 7, 0)),
        draws(ref=ImageRef("train", 8, 0)),
        draws(ref=ImageRef("train", 7, 1)),
    }
    assert len(variants) == 7 and draws() == draws()
    assert len({draws(2, key=PerturbKey(3, -1)), draws(2, key=PerturbKey(3, -2)), draws("image")}) == 3
    assert draws("image", key=PerturbKey(3, 1)) == draws("image", key=PerturbKey(3, None))
    with pytest.raises(ValueError, match="draw"):
        draws(key=PerturbKey(3, None))


# --- Runs of earlier versions go on with the same draws: numbers of commit fa01c45 ------------------------------------

BEFORE = {
    BlackSquares(0.5, side=14): "d3d62289775bdbb5",
    GaussianNoise(189.0): "cb1beab0455f3183",
    GaussianBlur(6.0): "e7d405ba8066461e",
    GreyImage(128): "1c12165d854fd38a",
}
"""First 16 hexadecimal digits of the sha256 of the pixels."""


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("perturbation", BEFORE, ids=lambda p: type(p).__name__)
def test_images_are_perturbed_as_by_earlier_versions(perturbation: ImagePerturbation) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8))
    assert digest(np.asarray(perturbation(image, np.random.default_rng(11)))) == BEFORE[perturbation]


def test_patches_are_perturbed_as_by_earlier_versions() -> None:
    patches_PD = np.arange(24 * 12, dtype=np.float32).reshape(24, 12)
    patches_PD[BlackPatches(0.5)(np.random.default_rng(11), grid=(4, 6), merge=2)] = -1.5
    assert digest(patches_PD) == "0f5bdcfce6a193ab"


def test_generators_draw_as_those_of_earlier_versions() -> None:
    per_row = perturb_rng(REF, KEY, per="row", run_seed=5).random(3)
    assert per_row.tolist() == [0.569993554722711, 0.42567175814412295, 0.40805769166942674]
    per_image = perturb_rng(REF, PerturbKey(step=3, draw=None), per="image", run_seed=5).random(2)
    assert per_image.tolist() == [0.9470051029999644, 0.7778544648774742]
