"""The packed sequences that Megatron hands to every layer.

Shape suffix legend: T = tokens that the layers of this rank hold; I = image tokens among them; h = hidden size; H =
attention heads of this rank; D = values per head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

Plan = Any
"""What a kind of attention wants to know of packed sequences: an AttentionPlan here, SequenceBounds in te_parts.py."""


@dataclass
class PackedSequences(PackedSeqParams):
    """What Megatron hands down to every attention layer.

    The format is deliberately not 'thd': Megatron would then apply rotary angles sequence by sequence in a Python loop,
    in each layer. As it stands, explicit angles per token are applied to all tokens at once ([T, 1, H, D]).
    """

    plan: Plan | None = None
    window_plan: Plan | None = None
    """For layers whose attention stays within windows; only vision towers have them."""
    deepstack: Deepstack | None = None
    """What the first language layers add; see deepstack.py."""


@dataclass(frozen=True)
class Deepstack:
    features_Ih: tuple[Tensor, ...]
    """One per language layer, from the first on; leaves of the graph."""
    image_token_index_I: Tensor
    """int64; the rows of T that they are added to."""
