"""Attention over packed sequences in plain torch: padded buckets, planned once per micro-batch, used by every layer.

Shape suffix legend: T = tokens of all sequences; B = sequences of a bucket; L = longest sequence of a bucket;
H = attention heads of this rank; D = values per head.

Sequences of like length share one call of torch's scaled_dot_product_attention. Causal attention needs no mask where
the padding comes last: no real token looks ahead at it, and what padding itself attends to is thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from megatron_vppo.models.deepstack import Deepstack

_SHORTEST_TO_LONGEST = 0.8
"""Least ratio of lengths within a bucket: at most 1/5 of its tokens and 1/3 of its attention scores are padding."""


@dataclass(frozen=True)
class Bucket:
    sequences: int
    longest: int
    token_index: Tensor | slice
    """[B*L] int64: which of the T tokens fills each place; padding repeats a real token. A slice where the bucket's
    tokens lie together and have no padding."""
    key_mask_B11L: Tensor | None
    """False where a key is padding; None where none is, or where causality hides it."""


@dataclass(frozen=True)
class AttentionPlan:
    lengths: tuple[int, ...]
    causal: bool
    buckets: tuple[Bucket, ...]
    restore_T: Tensor | None
    """Place of each token among the outputs of all buckets, one bucket after the other; None: they are in order."""


def plan_attention(lengths: Sequence[int], *, causal: bool, device: torch.device) -> AttentionPlan:
    """Groups packed sequences by length. Costs a few small tensor operations per bucket, none per sequence."""
    lengths_S = torch.tensor(lengths, dtype=torch.int64)
    starts_S = lengths_S.cumsum(0) - lengths_S
    order_S = torch.argsort(lengths_S, descending=True, stable=True)
    sorted_lengths = lengths_S[order_S].tolist()
    total = int(lengths_S.sum())

    buckets: list[Bucket] = []
    restore_T = torch.empty(total, dtype=torch.int64)
    first, done = 0, 0
    while first < len(sorted_lengths):
        longest = sorted_lengths[first]
        last = first + 1
        while last < len(sorted_lengths) and sorted_lengths[last] >= _SHORTEST_TO_LONGEST * longest:
            last += 1
        members = order_S[first:last]
        offset_1L = torch.arange(longest)[None, :]
        real_BL = offset_1L < lengths_S[members][:, None]
        index_BL = starts_S[members][:, None] + torch.minimum(offset_1L, lengths_S[members][:, None] - 1)
        place_BL = done + torch.arange(real_BL.numel()).view_as(real_BL)
        restore_T[index_BL[real_BL]] = place_BL[real_BL]
        buckets.append(_bucket(index_BL, real_BL, causal=causal, device=device))
        done += real_BL.numel()
        first = last
    in_order = done == total and torch.equal(restore_T, torch.arange(total))
    return AttentionPlan(tuple(lengths), causal, tuple(buckets), None if in_order else restore_T.to(device))


def _bucket(index_BL: Tensor, real_BL: Tensor, *, causal: bool, device: torch.device) -> Bucket:
    sequences, longest = index_BL.shape
    index = index_BL.flatten()
    whole = bool(real_BL.all())
    together = whole and torch.equal(index, torch.arange(int(index[0]), int(index[0]) + index.numel()))
    return Bucket(
        sequences=sequences,
        longest=longest,
        token_index=slice(int(index[0]), int(index[-1]) + 1) if together else index.to(device),
        key_mask_B11L=None if whole or causal else real_BL[:, None, None, :].to(device),
    )


def packed_attention(
    query_THD: Tensor, key_THD: Tensor, value_THD: Tensor, plan: AttentionPlan, *, scale: float
) -> Tensor:
    """softmax(q k^T * scale) v within each sequence; [T, H*D]. Key and value may have fewer heads (grouped queries)."""
    outputs = []
    for bucket in plan.buckets:
        query, key, value = (
            x[bucket.token_index].view(bucket.sequences, bucket.longest, *x.shape[1:]).transpose(1, 2)
            for x in (query_THD, key_THD, value_THD)
        )
        output_BHLD = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bucket.key_mask_B11L,
            is_causal=plan.causal,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(output_BHLD.transpose(1, 2).reshape(bucket.sequences * bucket.longest, -1))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output if plan.restore_T is None else output[plan.restore_T]


@dataclass
class PackedSequences(PackedSeqParams):
    """What Megatron hands down to every attention layer.

    The format is deliberately not 'thd': Megatron would then apply rotary angles sequence by sequence in a Python loop,
    in each layer. As it stands, explicit angles per token are applied to all tokens at once ([T, 1, H, D]).
    """

    plan: AttentionPlan | None = None
    window_plan: AttentionPlan | None = None
    """For layers whose attention stays within windows; only vision towers have them."""
    deepstack: Deepstack | None = None
    """What the first language layers add; see deepstack.py."""


class PackedAttention(nn.Module):
    """Megatron's core attention, over the plan of whole sequences."""

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
        super().__init__()
        assert config.kv_channels is not None
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

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
        output = packed_attention(query.squeeze(1), key.squeeze(1), value.squeeze(1), plan, scale=self.scale)
        return output.unsqueeze(1)

    def select_plan(self, sequences: PackedSequences) -> AttentionPlan:
        assert sequences.plan is not None
        return sequences.plan


class WindowAttention(PackedAttention):
    """The same, over the plan of windows."""

    def select_plan(self, sequences: PackedSequences) -> AttentionPlan:
        assert sequences.window_plan is not None
        return sequences.window_plan
