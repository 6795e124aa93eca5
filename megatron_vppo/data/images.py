"""Pictures as the model takes them, from image references: resized for vLLM, patches for the trainer, perturbed.

Shape suffix legend: P = vision patches in the processor's order (merge blocks first), D = patch_dim = channels *
frames * patch * patch (channel-major; a still picture fills all frames alike).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_vppo.algorithm.types import ImageRef, PerturbKey
from megatron_vppo.data.dataset import RowError, VisionDataset
from megatron_vppo.data.geometry import ImageGeometry
from megatron_vppo.data.perturb import PerturbSettings, black_out_patches, black_patch_mask, perturb_image, perturb_rng

Value = TypeVar("Value")


class VisionInputs:
    """The pictures of a run. Deterministic: the same reference and key give the same bits on every rank, at any time.

    `datasets` maps the split names of ImageRef to data sets; `image_processor` is the model's own, of transformers;
    `geometry` holds the pixel budget; `cache_bytes` bounds what is kept of decoded pictures and unperturbed patches.
    """

    def __init__(
        self,
        datasets: Mapping[str, VisionDataset],
        image_processor: Any,
        *,
        geometry: ImageGeometry,
        perturb: PerturbSettings | None = None,
        run_seed: int = 0,
        cache_bytes: int = 1 << 30,
    ) -> None:
        self._datasets = datasets
        self._processor = image_processor
        self._geometry = geometry
        self._perturb = perturb
        self._run_seed = run_seed
        self._pictures: _ByteLru[Image.Image] = _ByteLru(cache_bytes // 4)
        self._patches: _ByteLru[Tensor] = _ByteLru(cache_bytes - cache_bytes // 4)
        # All rows of an all-black picture are alike; the processor itself says what black is after its normalisation.
        side = geometry.patch_size * geometry.merge_size
        black = self._process(Image.new("RGB", (side, side)), size=dict(shortest_edge=1, longest_edge=side * side))
        self._black_D = black[0]

    @property
    def patch_dim(self) -> int:
        return self._black_D.numel()

    @property
    def mm_processor_kwargs(self) -> dict[str, Any]:
        """For vLLM's engine arguments; with it, its processor turns `pil(ref)` into what `patches(ref)` gives.

        vLLM 0.32 leaves the normalisation to its model unless the engine has mm_device_do_normalize=False; only then
        are the values equal bit for bit, and not just to rounding.
        """
        return {"size": self._size_limits()}

    def pil(self, ref: ImageRef) -> Image.Image:
        """RGB picture under the pixel budget. Do not change it in place. Raises RowError for an unusable image."""
        picture = self._pictures.get(ref)
        if picture is None:
            picture = self._resized(ref)
            self._pictures.put(ref, picture, picture.width * picture.height * 3)
        return picture

    def grid(self, ref: ImageRef) -> tuple[int, int, int]:
        """(frames, rows, columns) in vision patches, from the file's header. Raises RowError."""
        dataset = self._datasets[ref.split]
        size = dataset.image_size(ref.row, ref.index)
        try:
            return self._geometry.grid(*size)
        except ValueError as error:
            raise RowError(dataset.source, ref.row, f"image {ref.index}: {error}") from error

    def patches(self, ref: ImageRef, perturb: PerturbKey | None = None) -> Tensor:
        """fp32 [P, D] by the model's image processor; perturbed where a key is given. Do not change it in place.

        Raises RowError for an unusable image, ValueError for a key without PerturbSettings.
        """
        if perturb is None:
            return self._clean_patches(ref)
        settings, rng = self._perturbation(ref, perturb)
        if _in_patch_space(settings):
            _, rows, columns = self.grid(ref)
            hidden_RC = black_patch_mask(rows, columns, probability=settings.probability, rng=rng)
            return black_out_patches(
                self._clean_patches(ref), hidden_RC, self._black_D, merge=self._geometry.merge_size
            )
        return self._process(perturb_image(self.pil(ref), settings, rng), size=self._size_limits())

    def perturbed_pil(self, ref: ImageRef, key: PerturbKey) -> Image.Image:
        """The picture that `patches(ref, key)` shows to the model; for reports."""
        settings, rng = self._perturbation(ref, key)
        if not _in_patch_space(settings):
            return perturb_image(self.pil(ref), settings, rng)
        _, rows, columns = self.grid(ref)
        hidden_RC = black_patch_mask(rows, columns, probability=settings.probability, rng=rng)
        grey_levels_PD = self._process(self.pil(ref), size=self._size_limits(), raw=True)
        hidden_PD = black_out_patches(
            grey_levels_PD, hidden_RC, torch.zeros_like(self._black_D), merge=self._geometry.merge_size
        )
        return self._assemble(hidden_PD, rows, columns)

    def _perturbation(self, ref: ImageRef, key: PerturbKey) -> tuple[PerturbSettings, np.random.Generator]:
        if self._perturb is None:
            raise ValueError("a perturbed picture was asked for, but VisionInputs was built without PerturbSettings")
        return self._perturb, perturb_rng(self._perturb, ref, key, run_seed=self._run_seed)

    def _clean_patches(self, ref: ImageRef) -> Tensor:
        patches_PD = self._patches.get(ref)
        if patches_PD is None:
            patches_PD = self._process(self.pil(ref), size=self._size_limits())
            self._patches.put(ref, patches_PD, patches_PD.numel() * patches_PD.element_size())
        return patches_PD

    def _resized(self, ref: ImageRef) -> Image.Image:
        dataset = self._datasets[ref.split]
        picture = dataset.image(ref.row, ref.index)
        try:
            target = self._geometry.budget_size(*picture.size)
        except ValueError as error:
            raise RowError(dataset.source, ref.row, f"image {ref.index}: {error}") from error
        if self._geometry.mode == "easyr1":
            # The authors resize in the picture's own mode, with PIL's default filter, and only then convert to RGB.
            return (picture if picture.size == target else picture.resize(target)).convert("RGB")
        picture = picture.convert("RGB")
        while picture.size != target:  # one pass, except for shapes at the edge of the budget
            patches_PD = self._process(picture, size=self._size_limits(), raw=True)
            _, rows, columns = self._grid_after_processor(picture.size)
            picture = self._assemble(patches_PD, rows, columns)
        return picture

    def _grid_after_processor(self, size: tuple[int, int]) -> tuple[int, int, int]:
        limits = self._size_limits()
        width, height = self._geometry.smart_size(*size, limits["shortest_edge"], limits["longest_edge"])
        return 1, height // self._geometry.patch_size, width // self._geometry.patch_size

    def _size_limits(self) -> dict[str, int]:
        geometry = self._geometry
        if geometry.mode == "easyr1":
            return {"shortest_edge": geometry.processor_min_pixels, "longest_edge": geometry.processor_max_pixels}
        return {"shortest_edge": geometry.min_pixels, "longest_edge": geometry.max_pixels}

    def _process(self, picture: Image.Image, *, size: dict[str, int], raw: bool = False) -> Tensor:
        """The processor's pixel values [P, D]: fp32 normalised, or the resized grey levels as uint8 where `raw`."""
        options: dict[str, Any] = {"do_rescale": False, "do_normalize": False} if raw else {}
        out = self._processor(images=[picture], size=size, return_tensors="pt", **options)["pixel_values"]
        return out.to(torch.uint8 if raw else torch.float32)

    def _assemble(self, grey_levels_PD: Tensor, rows: int, columns: int) -> Image.Image:
        """The RGB picture that these patches (uint8) were cut from."""
        merge, patch = self._geometry.merge_size, self._geometry.patch_size
        frames = self.patch_dim // (3 * patch * patch)
        blocks = grey_levels_PD.numpy().reshape(rows // merge, columns // merge, merge, merge, 3, frames, patch, patch)[
            :, :, :, :, :, 0
        ]
        pixels = blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * patch, columns * patch, 3)
        return Image.fromarray(np.ascontiguousarray(pixels))


def _in_patch_space(settings: PerturbSettings) -> bool:
    """Noise, blur and grey fill have no grid: they act on the picture at either stage."""
    return settings.kind == "patch_black" and settings.stage == "patches"


class _ByteLru(Generic[Value]):
    """Keeps the most recently used values, as many as fit into `capacity_bytes`."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._used_bytes = 0
        self._entries: OrderedDict[ImageRef, tuple[Value, int]] = OrderedDict()

    def get(self, ref: ImageRef) -> Value | None:
        entry = self._entries.get(ref)
        if entry is None:
            return None
        self._entries.move_to_end(ref)
        return entry[0]

    def put(self, ref: ImageRef, value: Value, num_bytes: int) -> None:
        if num_bytes > self._capacity_bytes:
            return
        self._entries[ref] = (value, num_bytes)
        self._used_bytes += num_bytes
        while self._used_bytes > self._capacity_bytes:
            _, (_, freed) = self._entries.popitem(last=False)
            self._used_bytes -= freed
