"""Attention over packed sequences in plain torch: padded buckets, planned once per micro-batch, used by every layer.

Shape suffix legend: T = tokens of this rank; K = tokens of all context-parallel ranks (T where there is one); B =
pieces of a bucket (sequences, or chunks of them); Q, L = longest query and key length of a bucket; H = attention heads
of this rank; D = values per head.

Pieces of like length share one call of torch's scaled_dot_product_attention. Causal attention of whole sequences needs
no mask where the padding comes last: no real token looks ahead at it, and what padding itself attends to is thrown
away. With context parallelism each rank asks for the keys and values of all ranks, and attends with its chunks of each
sequence to what lies before them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from megatron_vppo.models.layers.context_parallel import chunks_of_rank, tokens_of_rank
from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.layers.sequences import PackedSequences

_SHORTEST_TO_LONGEST = 0.8
"""Least ratio of lengths within a bucket: at most 1/5 of its tokens and 1/3 of its attention scores are padding."""


@dataclass(frozen=True)
class Bucket:
    pieces: int
    query_index: Tensor | slice
    """[B*Q] int64: which of the T tokens fills each place; padding repeats a real token. A slice where the bucket's
    tokens lie together and have no padding."""
    key_index: Tensor | slice
    """[B*L] int64, of the K tokens; the same where each piece attends to itself."""
    mask: Tensor | None
    """Which keys a query sees: True in [B, 1, 1, L], or the end of the keys being causal (`causal_lower_right`, which
    fused kernels know without a mask in memory); None where `causal` says it all."""
    causal: bool
    """Within pieces that attend to themselves."""


@dataclass(frozen=True)
class AttentionPlan:
    buckets: tuple[Bucket, ...]
    restore_T: Tensor | None
    """Place of each token among the outputs of all buckets, one bucket after the other; None: they are in order."""
    gathers_keys: bool = False
    """Keys and values of all context-parallel ranks are needed, one rank after the other."""


def plan_attention(packing: Packing, *, causal: bool, device: torch.device) -> AttentionPlan:
    """Groups packed sequences by length. Costs a few small tensor operations per bucket, none per sequence."""
    lengths_S, starts_S = (torch.tensor(n, dtype=torch.int64) for n in (packing.lengths, packing.starts))
    buckets, places = [], []
    for members, longest in _groups(lengths_S):
        index_BQ, real_BQ = _padded(starts_S[members], lengths_S[members], longest)
        whole = bool(real_BQ.all())
        index = _as_slice(index_BQ.flatten(), whole=whole, device=device)
        mask = None if whole or causal else real_BQ[:, None, None, :].to(device)
        buckets.append(Bucket(len(members), index, index, mask, causal))
        places.append((index_BQ, real_BQ))
    return AttentionPlan(tuple(buckets), _restore(places, packing.num_tokens, device))


def plan_context_attention(packing: Packing, *, rank: int, size: int, device: torch.device) -> AttentionPlan:
    """Causal attention of one context-parallel rank's chunks; see context_parallel.py for which they are.

    A chunk is the end of the keys that it sees. Only chunks of one length share a bucket: none needs padding, so none
    needs a mask, whose size would be that of the attention scores.

    Args:
        packing: the whole sequences; their lengths are multiples of twice the number of ranks.
    """
    lengths_S, starts_S = (torch.tensor(n, dtype=torch.int64) for n in (packing.lengths, packing.starts))
    chunks_S = lengths_S // (2 * size)
    gathered_T = torch.empty(packing.num_tokens, dtype=torch.int64)
    gathered_T[torch.cat([tokens_of_rank(packing, rank=other, size=size) for other in range(size)])] = torch.arange(
        len(gathered_T)
    )
    own_starts_S = starts_S // size
    buckets, places = [], []
    for half, chunk in enumerate(chunks_of_rank(rank=rank, size=size)):
        for members, length in _groups(chunks_S, shortest_to_longest=1.0):
            lengths_B = chunks_S[members]
            query_BQ, real_BQ = _padded(own_starts_S[members] + half * lengths_B, lengths_B, length)
            key_BL, _ = _padded(starts_S[members], (chunk + 1) * lengths_B, (chunk + 1) * length)
            buckets.append(
                Bucket(
                    len(members),
                    query_BQ.flatten().to(device),
                    gathered_T[key_BL.flatten()].to(device),
                    causal_lower_right(length, (chunk + 1) * length),
                    causal=False,
                )
            )
            places.append((query_BQ, real_BQ))
    return AttentionPlan(tuple(buckets), _restore(places, len(gathered_T) // size, device), gathers_keys=True)


def plan_packed(packing: Packing, *, causal: bool, device: torch.device, rank: int = 0, size: int = 1) -> AttentionPlan:
    """See LayerParts.plan."""
    if size > 1:
        return plan_context_attention(packing, rank=rank, size=size, device=device)
    return plan_attention(packing, causal=causal, device=device)


def _groups(lengths_S: Tensor, *, shortest_to_longest: float = _SHORTEST_TO_LONGEST) -> list[tuple[Tensor, int]]:
    """(sequences, longest length) of each bucket; the longest sequences first."""
    order_S = torch.argsort(lengths_S, descending=True, stable=True)
    descending = lengths_S[order_S].tolist()
    groups = []
    first = 0
    while first < len(descending):
        last = first + 1
        while last < len(descending) and descending[last] >= shortest_to_longest * descending[first]:
            last += 1
        groups.append((order_S[first:last], descending[first]))
        first = last
    return groups


def _padded(starts_B: Tensor, lengths_B: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Indices of the tokens of each piece, its last one repeated up to the longest length; and which are real."""
    offset_1L = torch.arange(longest)[None, :]
    index_BL = starts_B[:, None] + torch.minimum(offset_1L, lengths_B[:, None] - 1)
    return index_BL, offset_1L < lengths_B[:, None]


def _as_slice(index: Tensor, *, whole: bool, device: torch.device) -> Tensor | slice:
    first = int(index[0])
    together = whole and torch.equal(index, torch.arange(first, first + index.numel()))
    return slice(first, first + index.numel()) if together else index.to(device)


def _restore(places: Sequence[tuple[Tensor, Tensor]], total: int, device: torch.device) -> Tensor | None:
    restore_T = torch.empty(total, dtype=torch.int64)
    done = 0
    for index_BL, real_BL in places:
        restore_T[index_BL[real_BL]] = done + torch.arange(real_BL.numel()).view_as(real_BL)[real_BL]
        done += real_BL.numel()
    in_order = done == total and torch.equal(restore_T, torch.arange(total))
    return None if in_order else restore_T.to(device)


def packed_attention(
    query_THD: Tensor, key_KHD: Tensor, value_KHD: Tensor, plan: AttentionPlan, *, scale: float
) -> Tensor:
    """softmax(q k^T * scale) v within each sequence; [T, H*D]. Key and value may have fewer heads (grouped queries)."""
    outputs = []
    for bucket in plan.buckets:
        query, key, value = (
            x[index].view(bucket.pieces, -1, *x.shape[1:]).transpose(1, 2)
            for x, index in (
                (query_THD, bucket.query_index),
                (key_KHD, bucket.key_index),
                (value_KHD, bucket.key_index),
            )
        )
        output_BHQD = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bucket.mask,
            is_causal=bucket.causal,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(output_BHQD.transpose(1, 2).flatten(2).flatten(0, 1))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output if plan.restore_T is None else output[plan.restore_T]


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
        assert config.kv_channels is not None and pg_collection is not None
        self.context_group = pg_collection.cp
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
        key, value = key.squeeze(1), value.squeeze(1)
        if plan.gathers_keys:
            # As one tensor: one collective here, and one that sums its gradient over the ranks.
            both = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), group=self.context_group)
            key, value = both.unbind(1)
        output = packed_attention(query.squeeze(1), key, value, plan, scale=self.scale)
        return output.unsqueeze(1)

    def select_plan(self, sequences: PackedSequences) -> AttentionPlan:
        assert isinstance(sequences.plan, AttentionPlan)
        return sequences.plan


class WindowAttention(PackedAttention):
    """The same, over the plan of windows."""

    def select_plan(self, sequences: PackedSequences) -> AttentionPlan:
        assert isinstance(sequences.window_plan, AttentionPlan)
        return sequences.window_plan
