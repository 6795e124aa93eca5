"""Sizes of images: the pixel budget, and the grid of patches that follows from a size alone.

There are two rules for the budget:

- 'smart': the processor's own smart resize under [min_pixels, max_pixels]. The image handed to vLLM already has its
  final size, and every later smart resize under the same budget leaves it as it is.
- 'easyr1': the authors' (`process_image` of EasyR1). The image is first scaled to the budget, sides rounded down; the
  processor then resizes it again under its own limits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from megatron_vppo.config.choices import ResizeMode

_MAX_ASPECT_RATIO = 200  # of the processor's smart resize; vLLM and transformers refuse more
_MAX_RESIZES = 8


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """The rule that leads from the size of an image to the size and the grid that the model sees."""

    patch_size: int
    """Pixels."""
    merge_size: int
    """Patches along one side of a merge block, which becomes one token of the language model."""
    min_pixels: int
    max_pixels: int
    """The pixel budget."""
    processor_min_pixels: int
    processor_max_pixels: int
    """The processor's own limits, which only 'easyr1' uses."""
    mode: ResizeMode

    @classmethod
    def from_processor(
        cls, image_processor: Any, *, min_pixels: int, max_pixels: int, mode: ResizeMode
    ) -> ImageGeometry:
        """Reads sizes of a Qwen-VL image processor of transformers. Raises ValueError for a budget as check_budget."""
        pixels_per_token = (image_processor.patch_size * image_processor.merge_size) ** 2
        check_budget(min_pixels=min_pixels, max_pixels=max_pixels, mode=mode, pixels_per_token=pixels_per_token)
        return cls(
            patch_size=image_processor.patch_size,
            merge_size=image_processor.merge_size,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            processor_min_pixels=image_processor.size["shortest_edge"],
            processor_max_pixels=image_processor.size["longest_edge"],
            mode=mode,
        )

    def budget_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns (width, height) of the image that goes to vLLM and to the image processor.

        Under 'smart' both are multiples of patch x merge, and another smart resize under this budget leaves them alone.
        Raises ValueError for an aspect ratio that the processor refuses, and for a size that every further resize
        changes again.
        """
        if self.mode == "easyr1":
            return _floor_scaled(width, height, self.min_pixels, self.max_pixels)
        size = (width, height)
        for _ in range(_MAX_RESIZES):
            resized = self.smart_size(*size, self.min_pixels, self.max_pixels)
            if resized == size:
                return size
            size = resized
        raise ValueError(
            f"{width}x{height} pixels have no stable size between data.min_pixels={self.min_pixels} and "
            f"data.max_pixels={self.max_pixels} (multiples of {self.patch_size * self.merge_size}): widen the budget"
        )

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """Returns (1 frame, rows, columns) in patches for an original size. Raises as `budget_size` does."""
        size = self.budget_size(width, height)
        if self.mode == "easyr1":
            size = self.smart_size(*size, self.processor_min_pixels, self.processor_max_pixels)
        return 1, size[1] // self.patch_size, size[0] // self.patch_size

    def tokens(self, grid_thw: tuple[int, int, int]) -> int:
        """Counts the image tokens that the language model reads for this grid."""
        return math.prod(grid_thw) // self.merge_size**2

    def smart_size(self, width: int, height: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
        """Returns (width, height) after one smart resize of the processor. Raises ValueError for the aspect ratio."""
        if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):
            raise ValueError(
                f"{width}x{height} pixels: the aspect ratio is over {_MAX_ASPECT_RATIO}, which the processor refuses"
            )
        factor = self.patch_size * self.merge_size
        new_height, new_width = smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
        return new_width, new_height


def check_budget(*, min_pixels: int, max_pixels: int, mode: ResizeMode, pixels_per_token: int) -> None:
    """Refuses a pixel budget that no image fits.

    Args:
        pixels_per_token: pixels of the square that becomes one token of the model.
    """
    if min_pixels > max_pixels or max_pixels < pixels_per_token:
        side = math.isqrt(pixels_per_token)
        raise ValueError(
            f"data.min_pixels={min_pixels}, data.max_pixels={max_pixels}: need min <= max, and "
            f"max >= {pixels_per_token} (one token of this model covers {side}x{side} pixels)"
        )
    fewest = least_tokens(min_pixels, pixels_per_token=pixels_per_token)
    if mode == "smart" and fewest * pixels_per_token > max_pixels:
        raise ValueError(
            f"data.min_pixels={min_pixels}, data.max_pixels={max_pixels}: no multiple of {pixels_per_token} (the "
            f"pixels of one token of this model) lies between them, so no image fits; set data.max_pixels to at least "
            f"{fewest * pixels_per_token}"
        )


def least_tokens(min_pixels: int, *, pixels_per_token: int) -> int:
    """Counts the tokens of the smallest image under 'smart', which enlarges every image to `min_pixels` at least."""
    return -(-min_pixels // pixels_per_token)


def _floor_scaled(width: int, height: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Scales down to max_pixels, then up to min_pixels, sides rounded down, as the authors' `process_image` does."""
    size = (width, height)
    if size[0] * size[1] > max_pixels:
        factor = math.sqrt(max_pixels / (size[0] * size[1]))
        size = int(size[0] * factor), int(size[1] * factor)
    if 0 < size[0] * size[1] < min_pixels:
        factor = math.sqrt(min_pixels / (size[0] * size[1]))
        size = int(size[0] * factor), int(size[1] * factor)
    if 0 in size:
        raise ValueError(f"{width}x{height} pixels: nothing is left of it at {max_pixels} pixels")
    return size
