"""Packed attention by the GPU's fused kernels: against float64, and that TransformerEngine takes its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_vppo.models.layers.attention import BucketPlan, packed_attention, plan_attention, plan_context_attention
from megatron_vppo.models.layers.context_parallel import tokens_of_rank
from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.layers.te_probe import AttentionShape, fused_attention_refusal
from megatron_vppo.models.layers.te_support import has_transformer_engine
from megatron_vppo.parallel.staging import Stager

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
LENGTHS = (1024, 256, 768, 256)
PACKING = Packing(LENGTHS)
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 128
TOLERANCE = 0.01
"""bfloat16; values are of order one."""


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (HEADS, KV_HEADS, KV_HEADS)
    query, key, value = (torch.randn(sum(LENGTHS), heads, HEAD_DIM, generator=generator) for heads in sizes)
    return query, key, value


def dense(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """[T, H*D] in float64, sequence by sequence."""
    blocks = []
    for q, k, v in zip(*(x.double().split(LENGTHS) for x in (query, key, value)), strict=True):
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(HEAD_DIM)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        blocks.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))
    return torch.cat(blocks)


def on_device(plan: BucketPlan) -> BucketPlan:
    stager = Stager(DEVICE)
    return stager.send(stager.pack(plan))


@pytest.mark.parametrize("causal", [True, False])
def test_whole_sequences(causal: bool) -> None:
    inputs = make_inputs()
    rounded = [x.to(DEVICE, torch.bfloat16).requires_grad_() for x in inputs]
    plan = on_device(plan_attention(PACKING, causal=causal))
    output = packed_attention(*rounded, plan, scale=1 / math.sqrt(HEAD_DIM))
    right = dense(*(x.to(torch.bfloat16) for x in inputs), causal=causal)
    assert (output.cpu().double() - right).abs().max() < TOLERANCE
    output.square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in rounded)


@pytest.mark.parametrize("rank", range(4))
def test_share_of_a_context_parallel_rank(rank: int) -> None:
    """Keys and values of all ranks, one after the other, as the ranks' gather gives them."""
    inputs = [x.to(torch.bfloat16) for x in make_inputs()]
    shares = [tokens_of_rank(PACKING, rank=other, size=4) for other in range(4)]
    query = inputs[0][shares[rank]].to(DEVICE)
    key, value = (x[torch.cat(shares)].to(DEVICE) for x in inputs[1:])
    plan = on_device(plan_context_attention(PACKING, rank=rank, size=4))
    output = packed_attention(query, key, value, plan, scale=1 / math.sqrt(HEAD_DIM))
    right = dense(*inputs, causal=True)[shares[rank]]
    assert (output.cpu().double() - right).abs().max() < TOLERANCE


@pytest.mark.skipif(not has_transformer_engine(), reason="TransformerEngine is not installed")
@pytest.mark.parametrize(
    "shape",
    [
        AttentionShape("language model", 28, 4, 128, causal=True),
        AttentionShape("language model", 28, 4, 128, causal=True, continued=True),
        AttentionShape("language model", 32, 8, 128, causal=True),
        AttentionShape("vision tower", 16, 16, 80, causal=False),
        AttentionShape("vision tower", 16, 16, 72, causal=False),
    ],
    ids=str,
)
def test_transformer_engine_fuses_attention(shape: AttentionShape) -> None:
    assert fused_attention_refusal(shape) is None


@pytest.mark.skipif(not has_transformer_engine(), reason="TransformerEngine is not installed")
def test_attention_that_is_not_fused_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("FUSED", "FLASH"):
        monkeypatch.setenv(f"NVTE_{kind}_ATTN", "0")
    refusal = fused_attention_refusal(AttentionShape("language model", 20, 4, 128, causal=True))
    assert refusal is not None and "No dot product attention" in refusal
