"""Perturbations against the authors' numbers, and against the pixels they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vppo.algorithm.types import ImageRef, PerturbKey
from megatron_vppo.data.perturb import (
    PerturbSettings,
    add_gaussian_noise,
    black_out_blocks,
    black_out_patches,
    black_patch_mask,
    merge_order,
    perturb_image,
    perturb_rng,
)
from tests.data.images import noise_image

REF = ImageRef("train", 7, 0)
KEY = PerturbKey(step=3, response_row=1)


def test_golden_mask_of_the_authors() -> None:
    """Spec T9: white 40x20 picture, 14-pixel blocks, p 0.5, np.random.seed(1)."""
    white = Image.new("RGB", (40, 20), "white")
    rng = np.random.RandomState(1)
    pixels = np.asarray(black_out_blocks(white, patch_size=14, probability=0.5, rng=rng))
    assert pixels[::14, ::14, 0].tolist() == [[0, 255, 0], [0, 0, 0]]
    # Blocks are uniform to their cut-off edges, in every channel.
    grid = np.array([[0, 255, 0], [0, 0, 0]], dtype=np.uint8)
    expected = np.kron(grid, np.ones((14, 14), dtype=np.uint8))[:20, :40]
    assert np.array_equal(pixels, np.stack([expected] * 3, axis=-1))


def test_draws_are_the_authors_scalar_draws_in_row_major_order() -> None:
    scalar = np.random.RandomState(5)
    expected = [[scalar.rand() < 0.3 for _ in range(11)] for _ in range(4)]
    assert black_patch_mask(4, 11, probability=0.3, rng=np.random.RandomState(5)).tolist() == expected


def test_merge_order_of_a_small_grid() -> None:
    # 2x4 patches, merged 2x2: the left block (0 1 / 4 5) comes before the right one (2 3 / 6 7).
    assert merge_order(2, 4, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert merge_order(4, 2, 2).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("rows, columns", [(4, 6), (2, 10), (8, 2)])
def test_black_patches_equal_black_pixels_before_the_processor(processor, rows: int, columns: int) -> None:
    """The same mask, once on the patches and once on the picture that the processor then cuts up."""
    picture = noise_image(columns * 14, rows * 14)
    limits = {"shortest_edge": 28 * 28, "longest_edge": 1 << 30}

    def process(image: Image.Image) -> torch.Tensor:
        return processor.image_processor(images=[image], size=limits, return_tensors="pt")["pixel_values"]

    hidden_RC = black_patch_mask(rows, columns, probability=0.5, rng=np.random.RandomState(3))
    assert 0 < hidden_RC.sum() < hidden_RC.size
    black_D = process(Image.new("RGB", (28, 28)))[0]
    in_patches = black_out_patches(process(picture), hidden_RC, black_D, merge=2)
    in_pixels = process(black_out_blocks(picture, patch_size=14, probability=0.5, rng=np.random.RandomState(3)))
    assert torch.equal(in_patches, in_pixels)
    assert not torch.equal(in_patches, process(picture))


def test_black_is_the_normalised_value_and_not_zero(processor) -> None:
    patches_PD = torch.zeros(4, 1176)
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    black_D = processor.image_processor(images=[Image.new("RGB", (56, 56))], return_tensors="pt")["pixel_values"][0]
    hidden = np.array([[True, False], [False, False]])
    out_PD = black_out_patches(patches_PD, hidden, black_D, merge=2)
    expected = [-mean[c] / std[c] for c in range(3)]
    assert out_PD[0].reshape(3, 2, 14, 14)[:, 1, 5, 5].tolist() == pytest.approx(expected, abs=1e-6)
    assert out_PD[1:].abs().max() == 0 and patches_PD.abs().max() == 0


def test_other_perturbations() -> None:
    picture = noise_image(60, 40)
    grey = perturb_image(picture, PerturbSettings(kind="grey"), np.random.default_rng(0))
    assert grey.size == (60, 40) and set(np.asarray(grey).reshape(-1)) == {128}
    # Blur of a step edge: dark and bright side meet half way, far from the edge nothing changes.
    step = Image.fromarray(np.repeat(np.array([[0] * 60 + [200] * 60], dtype=np.uint8), 90, axis=0)).convert("RGB")
    blurred = np.asarray(perturb_image(step, PerturbSettings(kind="gaussian_blur"), np.random.default_rng(0)))[45, :, 0]
    assert blurred[5] == 0 and blurred[115] == 200 and 80 < blurred[59] < 120
    assert blurred[59 - 6] == pytest.approx(200 * 0.159, abs=10)  # one standard deviation out
    # Noise of small std: its moments, on a grey that is never clipped.
    level = Image.new("RGB", (200, 200), (128, 128, 128))
    noisy = np.asarray(add_gaussian_noise(level, std=10.0, rng=np.random.default_rng(1)), dtype=np.float64)
    assert noisy.mean() == pytest.approx(128, abs=0.2) and noisy.std() == pytest.approx(10, abs=0.2)
    # Noise of the paper's std: P(clipped to black) = Phi(-128/189) = 0.249, and channels are independent.
    strong = np.asarray(perturb_image(level, PerturbSettings(kind="gaussian_noise"), np.random.default_rng(2)))
    assert (strong == 0).mean() == pytest.approx(0.249, abs=0.01)
    assert abs(np.corrcoef(strong[..., 0].ravel(), strong[..., 1].ravel())[0, 1]) < 0.02


def test_generator_depends_on_every_part_of_its_key() -> None:
    settings = PerturbSettings()

    def draws(settings=settings, ref=REF, key=KEY, seed=0):
        return tuple(perturb_rng(settings, ref, key, run_seed=seed).random(4))

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
    shared = PerturbSettings(per="image")
    assert draws(settings=shared, key=PerturbKey(3, 1)) == draws(settings=shared, key=PerturbKey(3, None))
    with pytest.raises(ValueError, match="response_row"):
        draws(key=PerturbKey(3, None))


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="patch_size"):
        PerturbSettings(stage="pixels")
    with pytest.raises(ValueError, match="patch_size"):
        PerturbSettings(stage="patches", patch_size=14)
    PerturbSettings(kind="grey", stage="pixels", patch_size=14)
