"""Patches of images as bytes, and the values that the model reads in their place.

Images stay bytes until they are on the device. Their values are float32, and the frames of a still image are alike, so
bytes take an eighth of the room in caches and on the way. What hides an image is applied there as well.

Shape suffix legend: P = patches in the processor's order, merge block by merge block; D = values of one patch, channel
by channel; as bytes, those of a single frame.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Patches:
    """The patches of one image, with those that a perturbation hides."""

    bytes_PD: Tensor
    """uint8. Do not change it in place."""
    hidden_P: Tensor | None = None
    """bool; True for patches that are shown black. None: none is hidden."""


@dataclass(frozen=True, slots=True)
class PatchValues:
    """The values that the image processor makes of bytes: each follows from its byte and its channel alone."""

    of_bytes: Tensor
    """float32 [channels, 256]; on a device in the model's dtype."""
    frames: int
    """The frames of a patch, all alike."""

    def to(self, device: torch.device, dtype: torch.dtype) -> PatchValues:
        """Returns the values on a device, rounded as the model would round each of them."""
        return replace(self, of_bytes=self.of_bytes.to(device, dtype))

    def __call__(self, bytes_PD: Tensor, hidden_P: Tensor | None = None) -> Tensor:
        """Returns [P, D], equal bit by bit to what the processor makes of the image with the patches blacked.

        Args:
            bytes_PD: uint8.
            hidden_P: bool or uint8; not 0 for patches to black. None: none.
        """
        channels, num_bytes = self.of_bytes.shape
        patches, of_frame = bytes_PD.shape
        shown_PD = bytes_PD if hidden_P is None else bytes_PD.masked_fill(hidden_P.bool()[:, None], 0)
        # Place in the flattened table: the rows of the channels lie one after the other.
        first = torch.arange(0, channels * num_bytes, num_bytes, dtype=torch.int32, device=bytes_PD.device)
        place = shown_PD.view(patches, channels, of_frame // channels).int() + first[:, None]
        of_one_frame = self.of_bytes.flatten().index_select(0, place.flatten()).view_as(place)
        return of_one_frame[:, :, None].expand(-1, -1, self.frames, -1).flatten(1)
