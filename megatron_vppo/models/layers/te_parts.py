"""TransformerEngine's modules, as Megatron wraps them. Imported only where TransformerEngine is installed.

Shape suffix legend: T = tokens of this rank; H = attention heads of this rank; D = values per head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.extensions.transformer_engine import (
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.layers.parts import LayerParts
from megatron_vppo.models.layers.sequences import PackedSequences, Plan


@dataclass(frozen=True)
class SequenceBounds:
    """What TransformerEngine wants to know of packed sequences. With context parallelism: of the whole sequences, which
    it cuts as context_parallel.py does, and whose keys and values it passes round by itself.
    """

    bounds: Tensor
    """int32 [sequences + 1]: where each begins, and the end of the last."""
    longest: int
    """Tokens."""


def sequence_bounds(
    packing: Packing, *, causal: bool, device: torch.device, rank: int = 0, size: int = 1
) -> SequenceBounds:
    """See LayerParts.plan. Every rank gets the same."""
    bounds = torch.tensor([*packing.starts, packing.num_tokens], dtype=torch.int32)
    return SequenceBounds(bounds.to(device), packing.longest)


class TEPackedAttention(TEDotProductAttention):
    """Takes our packed sequences: Megatron keeps thinking that there is one, see PackedSequences."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            cp_comm_type=cp_comm_type,
            softmax_scale=softmax_scale,
            pg_collection=pg_collection,
        )
        self._mask_type = attn_mask_type

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """query [T, 1, H, D], key and value [T, 1, H or fewer, D] -> [T, 1, H*D]."""
        assert packed_seq_params is not None
        plan = self.select_plan(packed_seq_params)
        assert isinstance(plan, SequenceBounds)
        # The same tensor in all places says that there is no padding between sequences, without a look at its values.
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=plan.bounds,
            cu_seqlens_kv=plan.bounds,
            cu_seqlens_q_padded=plan.bounds,
            cu_seqlens_kv_padded=plan.bounds,
            max_seqlen_q=plan.longest,
            max_seqlen_kv=plan.longest,
        )
        output = super().forward(
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            None,
            attn_mask_type=self._mask_type,
            packed_seq_params=packed,
        )
        return output.view(len(query), 1, -1)

    def select_plan(self, sequences: PackedSequences) -> Plan | None:
        return sequences.plan


class TEWindowAttention(TEPackedAttention):
    """The same, within windows."""

    def select_plan(self, sequences: PackedSequences) -> Plan | None:
        return sequences.window_plan


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
