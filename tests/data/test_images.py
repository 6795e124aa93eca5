"""Sizes, grids and pixel values against the model's own image processor of transformers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLImageProcessor

from megatron_vppo.algorithm.types import ImageRef, PerturbKey
from megatron_vppo.data.dataset import RowError, VisionDataset
from megatron_vppo.data.geometry import ImageGeometry
from megatron_vppo.data.images import Perturbing, VisionInputs, _ByteLru
from megatron_vppo.data.perturb import BlackPatches, BlackSquares, GaussianBlur, GaussianNoise, GreyImage, perturb_rng
from tests.data.images import noise_image
from tests.data.rows import open_rows

MIN_PIXELS, MAX_PIXELS = 4 * 784, 40 * 784

LIMITS = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}

# Smaller than the budget, inside it, larger; a strip; odd sizes; one that is right as it is.
SIZES = [(20, 30), (90, 60), (400, 300), (300, 9), (181, 203), (112, 56), (57, 55)]

KEY = PerturbKey(step=5, draw=2)


@pytest.fixture
def dataset(tmp_path: Path) -> VisionDataset:
    """Row i holds an image of SIZES[i]; the row after the last a greyscale one with transparency."""
    rows = []
    for i, size in enumerate(SIZES):
        noise_image(*size, seed=i).save(tmp_path / f"{i}.png")
        rows.append({"problem": "<image>?", "answer": "1", "images": [f"{i}.png"]})
    noise_image(70, 70, mode="LA").save(tmp_path / "alpha.png")
    rows.append({"problem": "<image>?", "answer": "1", "images": ["alpha.png"]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_rows(str(tmp_path / "rows.jsonl"))


def vision(dataset: VisionDataset, processor=None, *, mode="smart", perturbing=None, **options) -> VisionInputs:
    processor = processor or Qwen2VLImageProcessor()
    geometry = ImageGeometry.from_processor(processor, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, mode=mode)
    return VisionInputs(
        {"train": dataset}, processor, geometry=geometry, background=(255, 255, 255), perturbing=perturbing, **options
    )


def ref(row: int) -> ImageRef:
    return ImageRef("train", row, 0)


def values(inputs: VisionInputs, ref: ImageRef, perturb: PerturbKey | None = None) -> Tensor:
    """Returns the values that the model reads of an image."""
    patches = inputs.patches(ref, perturb)
    assert patches.bytes_PD.dtype == torch.uint8
    return inputs.values(patches.bytes_PD, patches.hidden_P)


@pytest.mark.parametrize(
    "image_processor",
    [Qwen2VLImageProcessor(), Qwen2VLImageProcessor(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)],
    ids=["patch14", "patch16"],
)
def test_patches_are_bit_equal_to_the_processor_on_the_original_image(dataset, image_processor) -> None:
    inputs = vision(dataset, image_processor)
    for row in range(len(dataset)):
        original = dataset.image(row, 0)
        expected = image_processor(images=[original], size=LIMITS, return_tensors="pt")
        patches_PD = values(inputs, ref(row))
        assert inputs.grid(ref(row)) == tuple(expected["image_grid_thw"][0].tolist())
        assert patches_PD.dtype == torch.float32
        assert torch.equal(patches_PD, expected["pixel_values"])
        # What vLLM is handed gives the same pixels there: its processor gets these keyword arguments.
        again = image_processor(images=[inputs.image(ref(row))], return_tensors="pt", **inputs.mm_processor_kwargs)
        assert torch.equal(patches_PD, again["pixel_values"])


def test_resized_image_has_its_final_size(dataset) -> None:
    inputs = vision(dataset)
    for row, size in enumerate(SIZES):
        image = inputs.image(ref(row))
        _, rows, columns = inputs.grid(ref(row))
        assert image.mode == "RGB" and image.size == (columns * 14, rows * 14)
        assert MIN_PIXELS <= image.width * image.height <= MAX_PIXELS
        if size == (112, 56):
            assert np.array_equal(np.asarray(image), np.asarray(dataset.image(row, 0)))


def test_refused_aspect_ratio_names_its_row(tmp_path: Path) -> None:
    noise_image(1000, 4).save(tmp_path / "strip.png")
    (tmp_path / "r.jsonl").write_text(json.dumps({"problem": "<image>", "answer": "1", "images": ["strip.png"]}))
    inputs = vision(open_rows(str(tmp_path / "r.jsonl")))
    for use in (inputs.image, inputs.grid, inputs.patches):
        with pytest.raises(RowError, match=r"r\.jsonl, row 0: image 0: 1000x4 pixels: the aspect ratio is over 200"):
            use(ref(0))


def test_easyr1_mode_is_the_authors_process_image_followed_by_the_processor(dataset) -> None:
    image_processor = Qwen2VLImageProcessor()
    inputs = vision(dataset, mode="easyr1")
    for row, (width, height) in enumerate(SIZES):
        target = (width, height)
        if width * height > MAX_PIXELS:
            target = tuple(int(side * math.sqrt(MAX_PIXELS / (width * height))) for side in (width, height))
        elif width * height < MIN_PIXELS:
            target = tuple(int(side * math.sqrt(MIN_PIXELS / (width * height))) for side in (width, height))
        image = dataset.image(row, 0)
        image = image if target == (width, height) else image.resize(target)
        expected = image_processor(images=[image], return_tensors="pt")
        assert inputs.image(ref(row)).size == target
        assert inputs.grid(ref(row)) == tuple(expected["image_grid_thw"][0].tolist())
        assert torch.equal(values(inputs, ref(row)), expected["pixel_values"])
        again = image_processor(images=[inputs.image(ref(row))], return_tensors="pt", **inputs.mm_processor_kwargs)
        assert torch.equal(values(inputs, ref(row)), again["pixel_values"])


KINDS = [
    BlackPatches(0.5),
    BlackSquares(0.5, side=14),
    GaussianNoise(189.0),
    GaussianBlur(6.0),
    GreyImage(128),
]


@pytest.mark.parametrize("mode", ["smart", "easyr1"])
@pytest.mark.parametrize("perturbation", KINDS, ids=lambda kind: type(kind).__name__)
def test_reported_image_is_what_the_model_sees(dataset, perturbation, mode) -> None:
    inputs = vision(dataset, perturbing=Perturbing(perturbation, per="row"), mode=mode)
    for row in range(len(dataset)):
        patches_PD = values(inputs, ref(row), KEY)
        image = inputs.perturbed_image(ref(row), KEY)
        seen = Qwen2VLImageProcessor()(images=[image], return_tensors="pt", **inputs.mm_processor_kwargs)
        assert torch.equal(patches_PD, seen["pixel_values"])
        assert patches_PD.shape == values(inputs, ref(row)).shape
        assert not torch.equal(patches_PD, values(inputs, ref(row)))


def test_patch_stage_blacks_whole_patches_of_the_image(dataset) -> None:
    inputs = vision(dataset, perturbing=Perturbing(BlackPatches(0.5), per="row"), run_seed=9)
    rng = perturb_rng(ref(2), KEY, per="row", run_seed=9)
    expected = BlackSquares(0.5, side=14)(inputs.image(ref(2)), rng)
    assert np.array_equal(np.asarray(inputs.perturbed_image(ref(2), KEY)), np.asarray(expected))


def test_perturbations_repeat_and_differ_as_their_keys_do(dataset) -> None:
    per_row, per_image = (Perturbing(BlackPatches(0.5), per=per) for per in ("row", "image"))
    inputs, other_process = (vision(dataset, perturbing=per_row, cache_bytes=n) for n in (1 << 30, 0))
    first = values(inputs, ref(1), KEY)
    assert torch.equal(first, values(inputs, ref(1), KEY)) and torch.equal(first, values(other_process, ref(1), KEY))
    for key in (PerturbKey(5, 3), PerturbKey(6, 2)):
        assert not torch.equal(first, values(inputs, ref(1), key))
    shared = vision(dataset, perturbing=per_image)
    assert torch.equal(values(shared, ref(1), KEY), values(shared, ref(1), dataclasses.replace(KEY, draw=7)))
    with pytest.raises(ValueError, match="without Perturbing"):
        values(vision(dataset), ref(1), KEY)


def test_transparent_pixels_are_white_and_in_the_authors_mode_black(tmp_path: Path) -> None:
    """A canvas of black strokes, of which only the opacity tells strokes from paper."""
    canvas = Image.new("RGBA", (112, 56))
    canvas.paste((0, 0, 0, 255), (0, 0, 112, 14))
    canvas.save(tmp_path / "strokes.png")
    (tmp_path / "r.jsonl").write_text(json.dumps({"problem": "<image>", "answer": "1", "images": ["strokes.png"]}))
    dataset = open_rows(str(tmp_path / "r.jsonl"))
    smart = np.asarray(vision(dataset).image(ref(0)))
    assert (smart[:14] == 0).all() and (smart[14:] == 255).all()
    assert not np.asarray(vision(dataset, mode="easyr1").image(ref(0))).any()
    white = (1.0 - np.array(Qwen2VLImageProcessor().image_mean)) / np.array(Qwen2VLImageProcessor().image_std)
    patches_PD = values(vision(dataset), ref(0))
    assert patches_PD[-1].reshape(3, -1).mean(1).tolist() == pytest.approx(white.tolist(), abs=1e-5)


def test_cache_is_used_and_bounded(dataset, monkeypatch) -> None:
    decoded: list[int] = []
    decode = VisionDataset.image

    def counting(self: VisionDataset, row: int, index: int) -> Image.Image:
        decoded.append(row)
        return decode(self, row, index)

    monkeypatch.setattr(VisionDataset, "image", counting)
    inputs = vision(dataset, cache_bytes=1 << 30)
    before = values(inputs, ref(0)).clone()
    values(inputs, ref(0), None)
    assert decoded == [0] and torch.equal(values(inputs, ref(0)), before)

    bounded = vision(dataset, cache_bytes=inputs.patches(ref(2)).bytes_PD.numel())  # half is too little for a large one
    decoded.clear()
    for row in (2, 2, 0):
        assert torch.equal(values(bounded, ref(row)), values(inputs, ref(row)))
    assert decoded == [2, 2, 0]


def test_an_image_is_decoded_and_processed_once_in_a_step(dataset, monkeypatch) -> None:
    """An engine needs it, scoring in two views under two perturbations, and the update."""
    decoded, processed = [], []
    decode, process = VisionDataset.image, VisionInputs._process
    monkeypatch.setattr(VisionDataset, "image", lambda *args: decoded.append(args[1]) or decode(*args))
    inputs = vision(dataset, perturbing=Perturbing(BlackPatches(0.5), per="row"))
    monkeypatch.setattr(VisionInputs, "_process", lambda *a, **options: processed.append(1) or process(*a, **options))
    for row in (0, 1):
        inputs.image(ref(row))
    for key in (None, KEY, PerturbKey(5, 3), None):
        for row in (0, 1):
            inputs.patches(ref(row), key)
    assert decoded == [0, 1] and len(processed) == 2, "a resize and the patches are one pass"


def test_least_recently_used_entries_go_first() -> None:
    cache: _ByteLru[str] = _ByteLru(10)
    for row in range(3):
        cache.put(ref(row), str(row), 3)
    assert cache.get(ref(0)) == "0"  # used again, so row 1 is now the oldest
    cache.put(ref(3), "3", 4)
    assert [cache.get(ref(row)) for row in range(4)] == ["0", None, "2", "3"]
    cache.put(ref(4), "4", 11)
    assert cache.get(ref(4)) is None and cache.get(ref(3)) == "3"
    cache.put(ref(3), "again", 4)
    cache.put(ref(3), "again", 4)
    assert [cache.get(ref(row)) for row in (0, 2, 3)] == ["0", "2", "3"], "what is there already takes no more room"
