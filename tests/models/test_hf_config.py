"""Numbers that follow from a model's configuration alone."""

from __future__ import annotations

from megatron_vppo.models.hf_config import kv_bytes_per_token, pixels_per_token, position_refusal
from tests.models.tiny import tiny_config, tiny_qwen3_config


def test_bytes_of_keys_and_values() -> None:
    """Two key-value heads of 128 values in 28 layers; on eight ranks each head has copies."""
    config = tiny_config(
        tied=True, vocab=300, num_hidden_layers=28, num_key_value_heads=4, hidden_size=512, num_attention_heads=4
    )
    assert kv_bytes_per_token(config, ranks=2, dtype_bytes=2) == 2 * 28 * 2 * 128 * 2
    assert kv_bytes_per_token(config, ranks=8, dtype_bytes=2) == 2 * 28 * 1 * 128 * 2
    wide = tiny_qwen3_config(tied=True, vocab=300, taps=(0,))
    assert kv_bytes_per_token(wide, ranks=1, dtype_bytes=4) == 2 * 3 * 2 * 24 * 4


def test_pixels_of_a_token() -> None:
    assert pixels_per_token(tiny_config(tied=True, vocab=300)) == 28 * 28


def test_positions() -> None:
    config = tiny_config(tied=True, vocab=300, max_position_embeddings=4096)
    assert position_refusal(config, prompt=3000, response=1096) is None
    refusal = position_refusal(config, prompt=3000, response=1097)
    assert refusal == "4097 tokens, but the model has 4096 positions (max_position_embeddings)"
