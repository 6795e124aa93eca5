"""Packed attention, also over context-parallel ranks, against dense attention in the words of the formula."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_vppo.models.layers.attention import packed_attention, plan_attention, plan_context_attention
from megatron_vppo.models.layers.context_parallel import tokens_of_rank
from megatron_vppo.models.layers.continued import continued_bounds
from megatron_vppo.models.layers.packing import Packing

LENGTHS = [(1,), (7, 7, 7), (3, 40, 5, 5, 41, 1, 18, 38, 39), (16, 16, 8, 16, 4, 16), (5, 90)]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float) -> torch.Tensor:
    """One sequence, in the formula's words."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_attention_is_dense_attention(lengths: tuple[int, ...], kv_heads: int, causal: bool) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    inputs = [torch.randn(total, heads, 32, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    upstream = torch.randn(total, 128)

    packed = packed_attention(*inputs, plan_attention(Packing(lengths), causal=causal), scale=0.2)
    gradients = torch.autograd.grad((packed * upstream).sum(), inputs)
    parts = zip(*(x.split(lengths) for x in inputs), strict=True)
    expected = torch.cat([dense(*part, causal=causal, scale=0.2) for part in parts])
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), inputs)

    assert (packed - expected).abs().max() < 2e-6
    for mine, right in zip(gradients, expected_gradients, strict=True):
        assert (mine - right).abs().max() < 5e-6


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("lengths", [(12,), (24, 24), (12, 120, 36, 132, 12, 108)], ids=str)
def test_context_parallel_attention_is_dense_attention(lengths: tuple[int, ...], kv_heads: int, ranks: int) -> None:
    """All ranks' shares together; each gets the gathered keys, one rank after the other, as a collective gives them."""
    torch.manual_seed(0)
    inputs = [torch.randn(sum(lengths), heads, 32, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    upstream = torch.randn(sum(lengths), 128)

    shares = [tokens_of_rank(Packing(lengths), rank=rank, size=ranks) for rank in range(ranks)]
    query, key, value = inputs
    gathered_key, gathered_value = (torch.cat([x[share] for share in shares]) for x in (key, value))
    loss = torch.zeros(())
    outputs = torch.empty(sum(lengths), 128)
    for rank, share in enumerate(shares):
        plan = plan_context_attention(Packing(lengths), rank=rank, size=ranks)
        output = packed_attention(query[share], gathered_key, gathered_value, plan, scale=0.2)
        outputs[share] = output.detach()
        loss = loss + (output * upstream[share]).sum()
    gradients = torch.autograd.grad(loss, inputs)
    parts = zip(*(x.split(lengths) for x in inputs), strict=True)
    expected = torch.cat([dense(*part, causal=True, scale=0.2) for part in parts])
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), inputs)

    assert (outputs - expected).abs().max() < 2e-6
    for mine, right in zip(gradients, expected_gradients, strict=True):
        assert (mine - right).abs().max() < 5e-6


def test_buckets_bound_padding() -> None:
    generator = random.Random(3)
    lengths = tuple(generator.randint(1, 300) for _ in range(500))
    plan = plan_attention(Packing(lengths), causal=True)
    index = torch.arange(sum(lengths))
    padded = sum(len(index[bucket.query_index]) for bucket in plan.buckets)
    assert sum(lengths) <= padded <= sum(lengths) / 0.8
    assert len(plan.buckets) < 30


SHARED = Packing((5, 7, 9, 4, 1, 3, 2, 6, 10), prefixes=(0, 2, 0, 2, 0, 0))
"""Prefixes of 5 and 9 tokens with continuations that take turns, and a sequence of 7 tokens by itself."""


def dense_shared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Every sequence with its prefix in front, in the formula's words; of a continuation, its own tokens."""
    outputs = []
    prefix_of = dict(zip(range(SHARED.num_whole, len(SHARED.lengths)), SHARED.prefixes, strict=True))
    spans = [torch.arange(s, s + n) for s, n in zip(SHARED.starts, SHARED.lengths, strict=True)]
    for number, span in enumerate(spans):
        before = spans[prefix_of[number]] if number in prefix_of else span[:0]
        seen = torch.cat([before, span])
        outputs.append(dense(q[seen], k[seen], v[seen], causal=True, scale=0.2)[len(before) :])
    return torch.cat(outputs)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("way", ["buckets", "bounds"])
def test_continuations_see_their_prefix(way: str, kv_heads: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(SHARED.num_tokens, heads, 32, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    upstream = torch.randn(SHARED.num_tokens, 128)

    if way == "buckets":
        output = packed_attention(*inputs, plan_attention(SHARED, causal=True), scale=0.2)
    else:
        output = by_bounds(*inputs)
    gradients = torch.autograd.grad((output * upstream).sum(), inputs)
    expected = dense_shared(*inputs)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), inputs)

    assert (output - expected).abs().max() < 2e-6
    for mine, right in zip(gradients, expected_gradients, strict=True):
        assert (mine - right).abs().max() < 5e-6


def by_bounds(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The calls that TransformerEngine gets, with torch in its place."""
    whole, continued = SHARED.whole, continued_bounds(SHARED)
    assert continued.first == whole.num_tokens and continued.longest == 10 and continued.longest_keys == 15
    first = packed_attention(*(x[: continued.first] for x in (q, k, v)), plan_attention(whole, causal=True),
                             scale=0.2)  # fmt: skip
    outputs = [first]
    keys, values = continued.keys(k), continued.keys(v)
    for number in range(len(SHARED.prefixes)):
        own = slice(*(continued.first + continued.bounds[number : number + 2]).tolist())
        seen = slice(*continued.key_bounds[number : number + 2].tolist())
        before = (seen.stop - seen.start) - (own.stop - own.start)
        padded = torch.cat([torch.zeros(before, *q.shape[1:]), q[own]])  # queries are the last of the keys
        outputs.append(dense(padded, keys[seen], values[seen], causal=True, scale=0.2)[before:])
    return torch.cat(outputs)
