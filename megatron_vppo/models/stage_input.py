"""The input of a pipeline stage: a packed micro-batch, with all that the host works out for it beforehand.

Shape suffix legend: K = all packed tokens; I = image tokens among K; C = tokens of this context-parallel rank; J =
image tokens among C; W = image tokens among the tokens that this rank holds between layers.

From the packed tokens to the tokens of a rank, with two context-parallel and two tensor-parallel ranks. One sequence of
8 tokens, of which 4 are image tokens `i`:

        all packed tokens            a  i  i  i  i  b  c  d
        of context rank              0  0  1  1  1  1  0  0     (chunks of 2, see context_parallel.py)
    C   tokens of context rank 0     a  i              c  d     J = 1, at 1 of C
        tokens of context rank 1           i  i  i  b           J = 3, at 0 1 2 of C
        of these, tensor rank 0            i  i                 W = 2, the first two of J
        of these, tensor rank 1                  i  b           W = 1, the third of J

Vision features take the places of image tokens while a rank has its C tokens. Then tensor-parallel ranks share the
tokens out (sequence parallelism), and the layers go on with those. Every rank has the vision features of all image
tokens, and picks those of its own J.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_vppo.models.layers.packed import PackedBatch
from megatron_vppo.models.layers.sequences import AttentionPlan
from megatron_vppo.models.vision.image_parallel import ImageWork
from megatron_vppo.models.vision.tower_run import KeptFeatures


@dataclass(frozen=True)
class ImageTokens:
    """The image tokens of a rank, and the features that fill them."""

    index_J: Tensor
    """int64, rising; their places in C."""
    feature_J: Tensor
    """int64; the merged vision feature of each."""
    held: slice
    """Those that this rank holds between layers; together they are W."""
    index_W: Tensor
    """int64; the places of those among the tokens that it holds."""


@dataclass(frozen=True)
class StageInput:
    """One micro-batch as a stage's forward pass takes it, apart from the pixels."""

    token_ids_C: Tensor
    """int64."""
    positions_3C: Tensor
    """int64; rotary position of each token along (frame, row, column)."""
    plan: AttentionPlan
    image_tokens: ImageTokens | None
    """None if no sequence shows an image, and on all stages but the first."""
    images: tuple[ImageWork, ...] = ()
    """The work on each run of the tower in this micro-batch; none on all stages but the first."""
    earlier: tuple[KeptFeatures, ...] = ()
    """The features of runs before, which come first in the numbers of features; none as above."""


def image_tokens_of_rank(batch: PackedBatch, own_C: Tensor, *, sequence_rank: int, sequence_ranks: int) -> ImageTokens:
    """Finds the image tokens that a rank has.

    Args:
        own_C: int64; the indices of its tokens among all packed tokens.
        sequence_rank: its number among the `sequence_ranks` that share these tokens out between layers.
    """
    place_K = np.full(batch.packing.num_tokens, -1)
    place_K[own_C.numpy()] = np.arange(len(own_C))
    place_I = place_K[batch.image_token_index_I.numpy()]
    here_I = place_I >= 0
    index_J = place_I[here_I]
    held = len(own_C) // sequence_ranks
    first, end = np.searchsorted(index_J, [sequence_rank * held, (sequence_rank + 1) * held]).tolist()
    return ImageTokens(
        index_J=torch.from_numpy(index_J),
        feature_J=torch.from_numpy(batch.image_feature_index_I.numpy()[here_I]),
        held=slice(first, end),
        index_W=torch.from_numpy(index_J[first:end] - sequence_rank * held),
    )
