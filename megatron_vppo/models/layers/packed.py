"""A micro-batch of packed sequences, as every model family takes it.

Shape suffix legend: K = tokens of all packed sequences, one after the other; I = image tokens among them (merged
vision features); P = vision patches; D = values per patch (frames x channels x rows x columns).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_vppo.models.layers.packing import Packing


@dataclass(frozen=True)
class PackedBatch:
    """Sequences without padding between or after them; attention never crosses a sequence."""

    token_ids_K: Tensor
    """int64."""
    positions_3K: Tensor
    """int64; rotary position of each token along (frame, row, column); the three are equal for text."""
    packing: Packing
    """Where each sequence lies in K."""
    image_token_index_I: Tensor
    """int64; where in K the image tokens are."""
    image_feature_index_I: Tensor
    """int64; which merged vision feature fills each of them. Sequences that show the same picture may point to the
    same features, so that its vision forward runs once."""
    pixels_PD: Tensor | None = None
    """Float patches in the processor's order, of the distinct images. Where ranks share the images, those of this
    rank's images (see image_parallel.py). None where no sequence shows an image, and on pipeline stages without the
    vision tower."""
    grids_thw: tuple[tuple[int, int, int], ...] = ()
    """Per distinct picture: (frames, rows, columns) in patches."""

    def __post_init__(self) -> None:
        tokens = self.token_ids_K.shape[0]
        if self.packing.num_tokens != tokens or min(self.packing.lengths, default=0) < 1:
            raise ValueError(
                f"the packed lengths {self.packing.lengths} must each be at least 1 and sum to the {tokens} tokens of "
                "the batch"
            )
        if tuple(self.positions_3K.shape) != (3, tokens):
            raise ValueError(f"positions have shape {tuple(self.positions_3K.shape)}, expected (3, {tokens})")
        if self.image_token_index_I.shape != self.image_feature_index_I.shape:
            raise ValueError(
                f"{self.image_token_index_I.numel()} image tokens but {self.image_feature_index_I.numel()} features "
                "assigned to them; give one feature index per image token"
            )
