"""The images of a run, made from references in the forms that are needed.

vLLM gets them resized, the trainer as patches, and the second view of scoring as patches of the perturbed image.

Shape suffix legend: P = patches in the processor's order, merge block by merge block; D = values of one patch, channel
by channel; as bytes, those of a single frame.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_vppo.algorithm.patches import Patches, PatchValues
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
            cache_bytes: the bound on decoded images, and on unperturbed patches, that are kept; half of it for each.
        """
        self._datasets = datasets
        self._processor = image_processor
        self._geometry = geometry
        self._background = background
        self._perturbing = perturbing
        self._run_seed = run_seed
        self._images: _ByteLru[Image.Image] = _ByteLru(cache_bytes // 2)
        self._patches: _ByteLru[Tensor] = _ByteLru(cache_bytes // 2)
        self.values = self._values_of_bytes()
        """The values of the bytes that `patches` returns."""

    @property
    def mm_processor_kwargs(self) -> dict[str, Any]:
        """The engine argument of this name, with which vLLM's processor turns `image(ref)` into the values of
        `patches(ref)`.

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

    def patches(self, ref: ImageRef, perturb: PerturbKey | None = None) -> Patches:
        """Returns the patches that the model's image processor makes, perturbed if a key is given.

        Raises RowError for an unusable image, ValueError for a key if these inputs have no perturbation.
        """
        if perturb is None:
            return Patches(self._original_bytes(ref))
        perturbation, rng = self._perturbation(ref, perturb)
        if isinstance(perturbation, PatchPerturbation):
            _, rows, columns = self.grid(ref)
            hidden = perturbation(rng, grid=(rows, columns), merge=self._geometry.merge_size)
            return Patches(self._original_bytes(ref), torch.from_numpy(hidden))
        return Patches(self._to_bytes(perturbation(self.image(ref), rng)))

    def perturbed_image(self, ref: ImageRef, key: PerturbKey) -> Image.Image:
        """Returns the image that `patches(ref, key)` shows to the model; for reports."""
        perturbation, rng = self._perturbation(ref, key)
        if not isinstance(perturbation, PatchPerturbation):
            return perturbation(self.image(ref), rng)
        shown = self.patches(ref, key)
        assert shown.hidden_P is not None
        _, rows, columns = self.grid(ref)
        return self._assemble(shown.bytes_PD.masked_fill(shown.hidden_P[:, None], 0), rows, columns)

    def _perturbation(self, ref: ImageRef, key: PerturbKey) -> tuple[Perturbation, np.random.Generator]:
        if self._perturbing is None:
            raise ValueError("a perturbed image was asked for, but these VisionInputs were built without Perturbing")
        return self._perturbing.perturbation, perturb_rng(ref, key, per=self._perturbing.per, run_seed=self._run_seed)

    def _original_bytes(self, ref: ImageRef) -> Tensor:
        bytes_PD = self._patches.get(ref)
        if bytes_PD is None:
            image = self.image(ref)
            bytes_PD = self._patches.get(ref)  # resizing an image may have made them
        if bytes_PD is None:
            bytes_PD = self._to_bytes(image)
            self._keep(ref, bytes_PD)
        return bytes_PD

    def _keep(self, ref: ImageRef, bytes_PD: Tensor) -> None:
        self._patches.put(ref, bytes_PD, bytes_PD.numel())

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
            bytes_PD = self._to_bytes(image)
            _, rows, columns = self._grid_after_processor(image.size)
            image = self._assemble(bytes_PD, rows, columns)
            if image.size == target:  # a further pass would not resize, so these are the image's patches
                self._keep(ref, bytes_PD)
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

    def _to_bytes(self, image: Image.Image) -> Tensor:
        """Runs the image processor without its normalisation: uint8 [P, D]."""
        raw = self._process(image, self._size_limits(), do_rescale=False, do_normalize=False).to(torch.uint8)
        return self._first_frame(raw).contiguous()

    def _values_of_bytes(self) -> PatchValues:
        """Finds out what the image processor makes of each byte, from an image that holds all of them."""
        factor = self._geometry.patch_size * self._geometry.merge_size
        side = factor * math.ceil(16 / factor)  # not resized, and of 256 pixels or more
        ramp = (np.arange(side * side) % 256).astype(np.uint8).reshape(side, side, 1)
        image, size = Image.fromarray(ramp.repeat(3, axis=2)), {"shortest_edge": 1, "longest_edge": side * side}
        raw = self._process(image, size, do_rescale=False, do_normalize=False)
        patch_pixels = self._geometry.patch_size**2
        channels, frames = 3, raw.shape[1] // (3 * patch_pixels)
        bytes_, values = (
            patches.view(-1, channels, frames, patch_pixels)[:, :, 0].transpose(0, 1).flatten(1)
            for patches in (raw, self._process(image, size))
        )
        of_bytes = torch.zeros(channels, 256).scatter(1, bytes_.to(torch.int64), values)
        return PatchValues(of_bytes, frames=frames)

    def _process(self, image: Image.Image, size: dict[str, int], **options: bool) -> Tensor:
        """Runs the image processor: float32 [P, D], all frames."""
        out = self._processor(images=[image], size=size, return_tensors="pt", **options)["pixel_values"]
        return out.to(torch.float32)

    def _first_frame(self, all_PD: Tensor) -> Tensor:
        return all_PD.view(len(all_PD), 3, self.values.frames, -1)[:, :, 0].flatten(1)

    def _assemble(self, bytes_PD: Tensor, rows: int, columns: int) -> Image.Image:
        """Puts patches back together to the RGB image that they were cut from."""
        merge, patch = self._geometry.merge_size, self._geometry.patch_size
        # [block row, block column, row in block, column in block, channel, pixel row, pixel column]
        blocks = bytes_PD.numpy().reshape(rows // merge, columns // merge, merge, merge, 3, patch, patch)
        # To [block row, row in block, pixel row, block column, column in block, pixel column, channel].
        pixels = blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * patch, columns * patch, 3)
        return Image.fromarray(np.ascontiguousarray(pixels))


class _ByteLru(Generic[Value]):
    """A cache of the values used last, as many as fit into `capacity_bytes`. Several threads may use it."""

    def __init__(self, capacity_bytes: int) -> None:
        self._lock = threading.Lock()
        self._capacity_bytes = capacity_bytes
        self._used_bytes = 0
        self._entries: OrderedDict[ImageRef, tuple[Value, int]] = OrderedDict()

    def get(self, ref: ImageRef) -> Value | None:
        with self._lock:
            entry = self._entries.get(ref)
            if entry is None:
                return None
            self._entries.move_to_end(ref)
            return entry[0]

    def put(self, ref: ImageRef, value: Value, num_bytes: int) -> None:
        if num_bytes > self._capacity_bytes:
            return
        with self._lock:
            if ref in self._entries:  # another thread was faster
                return
            self._entries[ref] = (value, num_bytes)
            self._used_bytes += num_bytes
            while self._used_bytes > self._capacity_bytes:
                _, (_, freed) = self._entries.popitem(last=False)
                self._used_bytes -= freed
