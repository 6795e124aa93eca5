"""A micro-batch of packed sequences, as every model family takes it.

Shape suffix legend: K = all packed tokens, one sequence after the other; I = image tokens among K.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.vision.tower_run import KeptFeatures, TowerRun


@dataclass(frozen=True)
class PackedBatch:
    """Sequences of tokens side by side, and the images that they show, on the host. Attention never crosses a sequence.

    `QwenVLModel.plan` makes of it what a rank's stage reads.

    Example: one image of (1, 2, 4) patches, which are 2 merged features, in two sequences of 4 tokens (`i` is an image
    token):

        token_ids_K              a  i  i  b | c  i  i  d
        image_token_index_I         1  2         5  6
        image_feature_index_I       0  1         0  1       the second sequence shows the same image
    """

    token_ids_K: Tensor
    """int64."""
    positions_3K: Tensor
    """int64; rotary position of each token along (frame, row, column). The three are equal for text."""
    packing: Packing
    """The place of each sequence in K."""
    image_token_index_I: Tensor
    """int64; the places of the image tokens in K."""
    image_feature_index_I: Tensor
    """int64; the merged vision feature that fills each image token. Sequences that show the same image may point to the
    same features. They are numbered in the order of `earlier` and then `runs`."""
    runs: tuple[TowerRun, ...] = ()
    """The images that the vision tower runs on in this micro-batch."""
    earlier: tuple[KeptFeatures, ...] = ()
    """The features of runs in micro-batches before."""

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
