"""The images of a run, made from references in the forms that are needed.

vLLM gets them resized, the trainer as patches, and the second view of scoring as patches of the perturbed image.

Shape suffix legend: P = patches in the processor's order, merge block by merge block; D = values of one patch, channel
by channel (a still image fills all frames of a patch alike).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_vppo.algorithm.types import ImageRef, PerturbKey
from megatron_vppo.config.choices import PerturbUnit
from megatron_vppo.data.dataset import VisionDataset
from megatron_vppo.data.decode import Rgb, to_rgb
from megatron_vppo.data.geometry import ImageGeometry
from megatron_vppo.data.perturb import PatchPerturbation, Perturbation, perturb_rng

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Perturbing:
    """The way a run hides what its images show."""

    perturbation: Perturbation
    per: PerturbUnit
    """The unit that gets a random perturbation of its own: each response ('row'), or each image once per step."""


class VisionInputs:
    """The images of a run: the same reference and key give the same bits on every rank, at any time."""

    def __init__(
        self,
        datasets: Mapping[str, VisionDataset],
        image_processor: Any,
        *,
        geometry: ImageGeometry,
        background: Rgb,
        perturbing: Perturbing | None = None,
        run_seed: int = 0,
        cache_bytes: int = 1 << 30,
    ) -> None:
        """
        Args:
            datasets: the data sets by the names of `ImageRef.split`, 'train' and 'val'.
            image_processor: the model's own, of transformers.
            geometry: the pixel budget.
            background: the colour behind transparent pixels.
            perturbing: None if no perturbed image will be asked for.
            cache_bytes: the bound on decoded images and unperturbed patches that are kept.
        """
        self._datasets = datasets
        self._processor = image_processor
        self._geometry = geometry
        self._background = background
        self._perturbing = perturbing
        self._run_seed = run_seed
        self._images: _ByteLru[Image.Image] = _ByteLru(cache_bytes // 4)
        self._patches: _ByteLru[Tensor] = _ByteLru(cache_bytes - cache_bytes // 4)
        # All patches of a black image are alike. The processor itself says what black is after its normalisation.
        side = geometry.patch_size * geometry.merge_size
        black = self._process(Image.new("RGB", (side, side)), size=dict(shortest_edge=1, longest_edge=side * side))
        self._black_D = black[0]

    @property
    def patch_dim(self) -> int:
        """Values of one patch: channels x frames x patch x patch."""
        return self._black_D.numel()

    @property
    def mm_processor_kwargs(self) -> dict[str, Any]:
        """The engine argument of this name, with which vLLM's processor turns `image(ref)` into `patches(ref)`.

        The values are equal bit for bit if the engine has mm_device_do_normalize=False as well. Without it vLLM 0.32
        normalises in the model, in another order of operations.
        """
        return {"size": self._size_limits()}

    def image(self, ref: ImageRef) -> Image.Image:
        """Returns the RGB image under the pixel budget. Do not change it in place.

        Raises RowError for an unusable image.
        """
        image = self._images.get(ref)
        if image is None:
            image = self._resized(ref)
            self._images.put(ref, image, image.width * image.height * 3)
        return image

    def grid(self, ref: ImageRef) -> tuple[int, int, int]:
        """Returns (frames, rows, columns) in patches, from the file's header. Raises RowError."""
        dataset = self._datasets[ref.split]
        size = dataset.image_size(ref.row, ref.index)
        try:
            return self._geometry.grid(*size)
        except ValueError as error:
            raise dataset.error(ref.row, f"image {ref.index}: {error}") from error

    def patches(self, ref: ImageRef, perturb: PerturbKey | None = None) -> Tensor:
        """Returns fp32 [P, D] of the model's image processor, perturbed if a key is given. Do not change it in place.

        Raises RowError for an unusable image, ValueError for a key if these inputs have no perturbation.
        """
        if perturb is None:
            return self._original_patches(ref)
        perturbation, rng = self._perturbation(ref, perturb)
        if isinstance(perturbation, PatchPerturbation):
            return self._perturb_patches(ref, perturbation, rng, self._original_patches(ref), self._black_D)
        return self._process(perturbation(self.image(ref), rng), size=self._size_limits())

    def perturbed_image(self, ref: ImageRef, key: PerturbKey) -> Image.Image:
        """Returns the image that `patches(ref, key)` shows to the model; for reports."""
        perturbation, rng = self._perturbation(ref, key)
        if not isinstance(perturbation, PatchPerturbation):
            return perturbation(self.image(ref), rng)
        raw_PD = self._process(self.image(ref), size=self._size_limits(), raw=True)
        black_D = torch.zeros_like(raw_PD[0])
        hidden_PD = self._perturb_patches(ref, perturbation, rng, raw_PD, black_D)
        _, rows, columns = self.grid(ref)
        return self._assemble(hidden_PD, rows, columns)

    def _perturbation(self, ref: ImageRef, key: PerturbKey) -> tuple[Perturbation, np.random.Generator]:
        if self._perturbing is None:
            raise ValueError("a perturbed image was asked for, but these VisionInputs were built without Perturbing")
        return self._perturbing.perturbation, perturb_rng(ref, key, per=self._perturbing.per, run_seed=self._run_seed)

    def _perturb_patches(
        self,
        ref: ImageRef,
        perturbation: PatchPerturbation,
        rng: np.random.Generator,
        patches_PD: Tensor,
        black_D: Tensor,
    ) -> Tensor:
        _, rows, columns = self.grid(ref)
        return perturbation(patches_PD, rng, grid=(rows, columns), merge=self._geometry.merge_size, black_D=black_D)

    def _original_patches(self, ref: ImageRef) -> Tensor:
        patches_PD = self._patches.get(ref)
        if patches_PD is None:
            patches_PD = self._process(self.image(ref), size=self._size_limits())
            self._patches.put(ref, patches_PD, patches_PD.numel() * patches_PD.element_size())
        return patches_PD

    def _resized(self, ref: ImageRef) -> Image.Image:
        dataset = self._datasets[ref.split]
        image = dataset.image(ref.row, ref.index)
        try:
            target = self._geometry.budget_size(*image.size)
        except ValueError as error:
            raise dataset.error(ref.row, f"image {ref.index}: {error}") from error
        try:
            if self._geometry.mode == "easyr1":
                # The authors resize in the image's own mode, with PIL's default filter, and only then convert to RGB,
                # by which PIL drops transparency.
                return (image if image.size == target else image.resize(target)).convert("RGB")
            image = to_rgb(image, self._background)
        except ValueError as error:
            raise dataset.error(ref.row, f"image {ref.index} has no RGB: {error}") from error
        # One pass, except for shapes at the edge of the budget. It ends: budget_size takes the same steps to `target`.
        while image.size != target:
            patches_PD = self._process(image, size=self._size_limits(), raw=True)
            _, rows, columns = self._grid_after_processor(image.size)
            image = self._assemble(patches_PD, rows, columns)
        return image

    def _grid_after_processor(self, size: tuple[int, int]) -> tuple[int, int, int]:
        limits = self._size_limits()
        width, height = self._geometry.smart_size(*size, limits["shortest_edge"], limits["longest_edge"])
        return 1, height // self._geometry.patch_size, width // self._geometry.patch_size

    def _size_limits(self) -> dict[str, int]:
        geometry = self._geometry
        if geometry.mode == "easyr1":
            return {"shortest_edge": geometry.processor_min_pixels, "longest_edge": geometry.processor_max_pixels}
        return {"shortest_edge": geometry.min_pixels, "longest_edge": geometry.max_pixels}

    def _process(self, image: Image.Image, *, size: dict[str, int], raw: bool = False) -> Tensor:
        """Runs the image processor: [P, D], fp32 normalised; or if `raw`, resized only, as uint8."""
        options: dict[str, Any] = {"do_rescale": False, "do_normalize": False} if raw else {}
        out = self._processor(images=[image], size=size, return_tensors="pt", **options)["pixel_values"]
        return out.to(torch.uint8 if raw else torch.float32)

    def _assemble(self, raw_PD: Tensor, rows: int, columns: int) -> Image.Image:
        """Puts patches (uint8) back together to the RGB image that they were cut from."""
        merge, patch = self._geometry.merge_size, self._geometry.patch_size
        frames = self.patch_dim // (3 * patch * patch)
        # [block row, block column, row in block, column in block, channel, frame, pixel row, pixel column]
        blocks = raw_PD.numpy().reshape(rows // merge, columns // merge, merge, merge, 3, frames, patch, patch)
        first_frame = blocks[:, :, :, :, :, 0]
        # To [block row, row in block, pixel row, block column, column in block, pixel column, channel].
        pixels = first_frame.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * patch, columns * patch, 3)
        return Image.fromarray(np.ascontiguousarray(pixels))


class _ByteLru(Generic[Value]):
    """A cache of the values used last, as many as fit into `capacity_bytes`."""

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
