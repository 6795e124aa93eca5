"""TransformerEngine's modules, as Megatron wraps them. Imported only where TransformerEngine is installed.

Shape suffix legend: C = tokens of this context-parallel rank (patches, in a vision tower); H = attention heads of this
rank; E = values per attention head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from transformer_engine.pytorch import DotProductAttention

from megatron_vppo.models.layers.continued import CONTINUED_MASK, ContinuedBounds, bounds_of, continued_bounds
from megatron_vppo.models.layers.core_attention import InWindows, PackedCoreAttention
from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.layers.parts import LayerParts
from megatron_vppo.models.layers.sequences import AttentionPlan
from megatron_vppo.models.layers.te_support import packed_arguments


@dataclass(frozen=True)
class SequenceBounds(AttentionPlan):
    """The beginnings and ends of packed sequences. With context parallelism these are the whole sequences:
    TransformerEngine cuts them as context_parallel.py does, and exchanges keys and values itself.
    """

    bounds: Tensor
    """int32 [sequences + 1]: where each begins, and the end of the last."""
    longest: int
    """Tokens of the longest sequence."""
    continued: ContinuedBounds | None = None
    """The continuations, which come after these sequences; None: there are none."""


def sequence_bounds(packing: Packing, *, causal: bool, rank: int = 0, size: int = 1) -> SequenceBounds:
    """See LayerParts.plan. Every rank gets the same bounds."""
    whole = packing.whole
    continued = continued_bounds(packing) if packing.prefixes else None
    return SequenceBounds(bounds_of(whole.lengths), whole.longest, continued)


class TEPackedAttention(PackedCoreAttention, TEDotProductAttention):
    """TransformerEngine's attention over our packed sequences.

    Megatron's attention layer is not told that sequences are packed (see PackedSequences). Only here do they get the
    format 'thd'.
    """

    def __init__(self, *, attn_mask_type: AttnMaskType, **of_megatron: Any) -> None:
        super().__init__(attn_mask_type=attn_mask_type, **of_megatron)
        self._mask_type = attn_mask_type

    def attend(self, query_CHE: Tensor, key_CHE: Tensor, value_CHE: Tensor, plan: AttentionPlan | None) -> Tensor:
        assert isinstance(plan, SequenceBounds)
        if plan.continued is None:
            return self._whole(query_CHE, key_CHE, value_CHE, plan)
        first = plan.continued.first
        return torch.cat(
            [
                self._whole(query_CHE[:first], key_CHE[:first], value_CHE[:first], plan),
                self._continued(query_CHE[first:], key_CHE, value_CHE, plan.continued),
            ]
        )

    def _whole(self, query_CHE: Tensor, key_CHE: Tensor, value_CHE: Tensor, plan: SequenceBounds) -> Tensor:
        return TEDotProductAttention.forward(
            self,
            query_CHE,
            key_CHE,
            value_CHE,
            None,
            attn_mask_type=self._mask_type,
            packed_seq_params=PackedSeqParams(**packed_arguments(plan.bounds, plan.longest)),
        )

    def _continued(self, query_CHE: Tensor, key_CHE: Tensor, value_CHE: Tensor, plan: ContinuedBounds) -> Tensor:
        # Megatron's wrapper has no name for this mask, so TransformerEngine is called directly.
        return DotProductAttention.forward(
            self,
            query_CHE,
            plan.keys(key_CHE),
            plan.keys(value_CHE),
            None,
            **packed_arguments(plan.bounds, plan.longest, plan.key_bounds, plan.longest_keys),
            attn_mask_type=CONTINUED_MASK,
        )


class TEWindowAttention(InWindows, TEPackedAttention):
    """The same, within windows."""


TE_PARTS = LayerParts(
    name="te",
    norm=TENorm,
    column_linear=TELayerNormColumnParallelLinear,
    row_linear=TERowParallelLinear,
    attention=TEPackedAttention,
    window_attention=TEWindowAttention,
    plan=sequence_bounds,
    fused_norms=(
        ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
        ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ),
)
