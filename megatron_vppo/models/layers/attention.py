"""Attention over packed sequences in plain torch: padded buckets, planned once per micro-batch, used by every layer.

Shape suffix legend: Z = packed sequences; C = tokens of this context-parallel rank (patches, in a vision tower); K =
all packed tokens (C where there is one rank); A = pieces of a bucket: packed sequences, or chunks of them; Q = query
positions of a bucket; L = key length of a bucket: tokens of one packed sequence, or of the beginning of one that a
chunk sees; H = attention heads of this rank; E = values per attention head.

A loop over sequences would launch a kernel per sequence, a single padded call would waste memory. So pieces of similar
length form a bucket, which is one call of torch's scaled_dot_product_attention:

    packed tokens   | a a a a a | b b | c c c c | d d |
    bucket 1        a a a a a   c c c c .           lengths 5 and 4, padded to 5
    bucket 2        b b         d d                 length 2, no padding
    outputs         a a a a a c c c c . b b d d     restored to the packed order by one index

Causal attention of whole sequences needs no mask where the padding comes last: real tokens do not look ahead at it, and
its own outputs are dropped. With context parallelism each rank gathers the keys and values of all ranks; its chunks of
a sequence attend to the keys before them. A bucket of continuations has one prefix, whose keys and values are put in
front of those of each piece: a view that costs no memory until then, and autograd sums its gradient over the pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from megatron_vppo.models.layers.context_parallel import chunks_of_rank, tokens_of_rank
from megatron_vppo.models.layers.core_attention import InWindows, PackedCoreAttention
from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.layers.sequences import AttentionPlan

Ints = NDArray[np.int64]

_SHORTEST_TO_LONGEST = 0.8
"""The least ratio of lengths within a bucket. So less than 20 % of its tokens and 36 % of its scores are padding."""


@dataclass(frozen=True)
class Bucket:
    """Pieces that share one attention call."""

    pieces: int
    """The number of pieces, A."""
    query_index: Tensor | slice
    """int64 [A*Q]; the index among the C tokens of each query. Padding repeats a real token. It is a slice if the
    bucket's tokens lie together and have no padding."""
    key_index: Tensor | slice
    """int64 [A*L]; the index of each key in the tensor of keys. Without context parallelism it is `query_index`. With
    it, the tensor holds the keys gathered from all ranks, one rank after the other."""
    mask: Tensor | None
    """The keys that each query sees: bool [A, 1, 1, L]; or `causal_lower_right`, which fused kernels apply without
    storing a mask. None if every query sees all keys, or those that `causal` says."""
    causal: bool
    """True if each query sees the keys up to itself. Queries and keys are then the same tokens."""
    prefix: slice | None = None
    """The tokens that come before the keys of every piece; None: none do."""


@dataclass(frozen=True)
class BucketPlan(AttentionPlan):
    """The buckets of a micro-batch, and the way back to the order of its tokens."""

    buckets: tuple[Bucket, ...]
    restore_C: Tensor | None
    """int64; the place of each token among the outputs of all buckets, one bucket after the other. None: in order."""
    gathers_keys: bool = False
    """True if keys and values of all context-parallel ranks are needed, one rank after the other."""


def plan_attention(packing: Packing, *, causal: bool) -> BucketPlan:
    """Groups packed sequences by length. Costs a few array operations per bucket, none per sequence."""
    lengths_Z, starts_Z = np.array(packing.lengths), np.array(packing.starts)
    buckets, places = [], []
    for prefix, sequences in _by_prefix(packing):
        for of_prefix, longest in _by_length(lengths_Z[sequences]):
            members = sequences[of_prefix]
            index_AL, real_AL = _padded_index(starts_Z[members], lengths_Z[members], longest)
            no_padding = bool(real_AL.all())
            index = _as_slice(index_AL.reshape(-1), no_padding=no_padding)
            mask = None if no_padding or causal else torch.from_numpy(real_AL[:, None, None, :])
            if prefix is None:
                buckets.append(Bucket(len(members), index, index, mask, causal))
            else:
                seen = causal_lower_right(longest, prefix.stop - prefix.start + longest)
                buckets.append(Bucket(len(members), index, index, seen, causal=False, prefix=prefix))
            places.append((index_AL, real_AL))
    return BucketPlan(tuple(buckets), _restoring_index(places, packing.num_tokens))


def _by_prefix(packing: Packing) -> list[tuple[slice | None, Ints]]:
    """Returns the tokens of each prefix and the numbers of its continuations; before them, those of whole sequences."""
    groups: list[tuple[slice | None, Ints]] = [(None, np.arange(packing.num_whole))]
    prefixes = np.array(packing.prefixes, dtype=np.int64)
    for prefix in dict.fromkeys(packing.prefixes):
        start = packing.starts[prefix]
        members = packing.num_whole + np.flatnonzero(prefixes == prefix)
        groups.append((slice(start, start + packing.lengths[prefix]), members))
    return groups


def plan_context_attention(packing: Packing, *, rank: int, size: int) -> BucketPlan:
    """Plans causal attention of one context-parallel rank's chunks; context_parallel.py says which they are.

    A chunk sees its sequence from the start to its own end, so its queries are the last of its keys:
    `causal_lower_right`. Only chunks of equal length share a bucket. Nothing is padded then, and no mask is stored,
    which would be as large as the attention scores.

    Args:
        packing: the whole sequences; their lengths are multiples of twice the number of ranks.
    """
    lengths_Z, starts_Z = np.array(packing.lengths), np.array(packing.starts)
    chunks_Z = lengths_Z // (2 * size)  # tokens of each of a sequence's 2 * size chunks
    # The gathered keys are ordered by rank, then by sequence and chunk: where in them is packed token k?
    rank_by_rank_K = np.concatenate([tokens_of_rank(packing, rank=other, size=size).numpy() for other in range(size)])
    gathered_K = np.empty_like(rank_by_rank_K)
    gathered_K[rank_by_rank_K] = np.arange(len(rank_by_rank_K))
    # Every rank holds 1/size of each sequence, so its share of a sequence starts at 1/size of the packed start.
    own_starts_Z = starts_Z // size
    buckets, places = [], []
    for half, chunk in enumerate(chunks_of_rank(rank=rank, size=size)):  # the rank's two chunks of a sequence, in order
        for members, length in _by_length(chunks_Z, shortest_to_longest=1.0):
            lengths_A = chunks_Z[members]
            visible = (chunk + 1) * length  # keys from the start of the sequence to the end of this chunk
            query_AQ, real_AQ = _padded_index(own_starts_Z[members] + half * lengths_A, lengths_A, length)
            key_AL, _ = _padded_index(starts_Z[members], (chunk + 1) * lengths_A, visible)
            buckets.append(
                Bucket(
                    len(members),
                    torch.from_numpy(query_AQ.reshape(-1)),
                    torch.from_numpy(gathered_K[key_AL.reshape(-1)]),
                    causal_lower_right(length, visible),
                    causal=False,
                )
            )
            places.append((query_AQ, real_AQ))
    return BucketPlan(tuple(buckets), _restoring_index(places, len(gathered_K) // size), gathers_keys=True)


def plan_packed(packing: Packing, *, causal: bool, rank: int = 0, size: int = 1) -> BucketPlan:
    """Plans attention for the torch backend (LayerParts.plan). Over several context-parallel ranks it is causal."""
    if size > 1:
        return plan_context_attention(packing, rank=rank, size=size)
    return plan_attention(packing, causal=causal)


def _by_length(lengths_Z: Ints, *, shortest_to_longest: float = _SHORTEST_TO_LONGEST) -> list[tuple[Ints, int]]:
    """Returns (indices of the sequences, longest length) of each bucket; the longest sequences first."""
    order_Z = np.argsort(-lengths_Z, kind="stable")
    descending = lengths_Z[order_Z].tolist()
    groups = []
    first = 0
    while first < len(descending):
        last = first + 1
        while last < len(descending) and descending[last] >= shortest_to_longest * descending[first]:
            last += 1
        groups.append((order_Z[first:last], descending[first]))
        first = last
    return groups


def _padded_index(starts_A: Ints, lengths_A: Ints, longest: int) -> tuple[Ints, NDArray[np.bool_]]:
    """Returns the indices of each piece's tokens, the last one repeated up to `longest`, and which of them are real."""
    offset_1L = np.arange(longest)[None, :]
    index_AL = starts_A[:, None] + np.minimum(offset_1L, lengths_A[:, None] - 1)
    return index_AL, offset_1L < lengths_A[:, None]


def _as_slice(index: Ints, *, no_padding: bool) -> Tensor | slice:
    """Returns the index as a slice if it counts up by one; indexing with a slice copies nothing."""
    first = int(index[0])
    together = no_padding and np.array_equal(index, np.arange(first, first + len(index)))
    return slice(first, first + len(index)) if together else torch.from_numpy(index)


def _restoring_index(places: Sequence[tuple[Ints, NDArray[np.bool_]]], total: int) -> Tensor | None:
    """Returns the place of each token among the outputs of all buckets; None if they are in order already."""
    restore_C = np.empty(total, dtype=np.int64)
    done = 0
    for index_AL, real_AL in places:
        restore_C[index_AL[real_AL]] = done + np.flatnonzero(real_AL)
        done += real_AL.size
    in_order = done == total and np.array_equal(restore_C, np.arange(total))
    return None if in_order else torch.from_numpy(restore_C)


def packed_attention(
    query_CHE: Tensor, key_KHE: Tensor, value_KHE: Tensor, plan: BucketPlan, *, scale: float
) -> Tensor:
    """Computes softmax(q k^T * scale) v within each sequence; [C, H*E].

    Key and value may have fewer heads (grouped queries).
    """
    outputs = []
    for bucket in plan.buckets:
        query, key, value = (
            _pieces_AHLE(query_CHE, bucket.query_index, bucket.pieces),
            _pieces_AHLE(key_KHE, bucket.key_index, bucket.pieces, prefix=bucket.prefix),
            _pieces_AHLE(value_KHE, bucket.key_index, bucket.pieces, prefix=bucket.prefix),
        )
        output_AHQE = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bucket.mask,
            is_causal=bucket.causal,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(output_AHQE.transpose(1, 2).flatten(2).flatten(0, 1))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output if plan.restore_C is None else output[plan.restore_C]


def _pieces_AHLE(x: Tensor, index: Tensor | slice, pieces: int, *, prefix: slice | None = None) -> Tensor:
    """Picks the tokens of a bucket's pieces, each with the prefix in front."""
    own_ALHE = x[index].view(pieces, -1, *x.shape[1:])
    if prefix is not None:
        own_ALHE = torch.cat([x[prefix].expand(pieces, -1, -1, -1), own_ALHE], dim=1)
    return own_ALHE.transpose(1, 2)


class PackedAttention(PackedCoreAttention, nn.Module):
    """Megatron's core attention, by the plan for whole sequences."""

    def __init__(
        self,
        *,
        config: TransformerConfig,
        softmax_scale: float | None,
        pg_collection: ProcessGroupCollection,
        **unused: object,
    ) -> None:
        """
        Args:
            unused: further arguments of Megatron to a core attention, such as the number and type of the layer.
        """
        super().__init__()
        assert config.kv_channels is not None
        self.context_group = pg_collection.cp
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def attend(self, query_CHE: Tensor, key_CHE: Tensor, value_CHE: Tensor, plan: AttentionPlan | None) -> Tensor:
        assert isinstance(plan, BucketPlan)
        key, value = key_CHE, value_CHE
        if plan.gathers_keys:
            # Keys and values go as one tensor: one collective here, and one that sums its gradient over the ranks.
            both = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), group=self.context_group)
            key, value = both.unbind(1)
        return packed_attention(query_CHE, key, value, plan, scale=self.scale)


class WindowAttention(InWindows, PackedAttention):
    """The same for layers of Qwen2.5-VL's tower that attend within windows: by the plan for windows."""
