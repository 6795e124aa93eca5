"""The shapes of attention that are tried on a GPU; tests/gpu/test_attention.py tries them."""

from __future__ import annotations

import pytest

from megatron_vppo.models.layers.te_probe import AttentionShape, attention_shapes, check_fused_attention
from megatron_vppo.planning.published import published_config


def test_shapes_of_a_rank() -> None:
    language, continued, vision = attention_shapes(
        published_config("qwen2.5-vl-7b"), tensor=2, vision_tensor=1, shared_prefix=True
    )
    assert continued == AttentionShape("language model", 14, 2, 128, causal=True, continued=True)
    assert language == AttentionShape("language model", 14, 2, 128, causal=True)
    assert vision == AttentionShape("vision tower", 16, 16, 80, causal=False)


def test_heads_that_are_wider_than_the_model_by_their_number() -> None:
    config = published_config("qwen3-vl-32b")
    language, vision = attention_shapes(config, tensor=8, vision_tensor=4, shared_prefix=False)
    assert (language.heads, language.kv_heads, language.head_dim) == (8, 1, 128)
    assert (vision.heads, vision.kv_heads, vision.head_dim) == (4, 4, 72)


def test_nothing_is_tried_where_the_user_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine without TransformerEngine a try would fail."""
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "1")
    config = published_config("qwen2.5-vl-7b")
    check_fused_attention(config, tensor=1, vision_tensor=1, shared_prefix=False)
    with pytest.raises(ValueError, match=r"^NVTE_UNFUSED_ATTN=1: .*set parallel\.shared_prefix=false"):
        check_fused_attention(config, tensor=1, vision_tensor=1, shared_prefix=True)
