"""The packed sequences that Megatron hands to every layer.

Shape suffix legend: C = tokens of this context-parallel rank; S = tokens that this rank holds between layers; W = image
tokens among S; h = hidden size; H = attention heads of this rank; E = values per attention head.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class AttentionPlan:
    """The facts about packed sequences that attention needs, worked out once per micro-batch and read by every layer.

    Each implementation of attention has a plan of its own: `BucketPlan` in attention.py, `SequenceBounds` in
    te_parts.py.
    """


@dataclass
class PackedSequences(PackedSeqParams):
    """The argument `packed_seq_params` of every layer.

    Its format is deliberately not 'thd': Megatron would then apply rotary angles sequence by sequence, in a Python loop
    in each layer. As it is, explicit angles are applied to all tokens at once ([C, 1, H, E]).
    """

    plan: AttentionPlan | None = None
    window_plan: AttentionPlan | None = None
    """The plan of layers whose attention stays within windows; only vision towers have them."""
    deepstack: Deepstack | None = None
    """The features that the first language layers add to image tokens."""


@dataclass(frozen=True)
class Deepstack:
    """Vision features that the first language layers add to their outputs; see deepstack.py."""

    features_Wh: tuple[Tensor, ...]
    """One per language layer, from the first on; leaves of the autograd graph."""
    image_token_index_W: Tensor
    """int64; the rows of [S, 1, h] that they are added to."""
