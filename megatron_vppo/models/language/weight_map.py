"""Weight map of the language model. Families differ in the names, the biases of QKV and the norms of queries and
keys."""

from __future__ import annotations

from typing import Any

from megatron_vppo.models.hf_config import HfConfig, head_dim
from megatron_vppo.weights.entries import Entry
from megatron_vppo.weights.kinds import Gated, Kind, Split, Vocabulary, whole
from megatron_vppo.weights.qkv import GroupedQKV

HEAD = "lm_head.weight"
"""The checkpoint's name of the output weight, which a tied model leaves out."""


def language_entries(hf_config: HfConfig, *, prefix: str, qkv_bias: bool, qk_norm: bool) -> list[Entry]:
    """Lists every parameter of the language model: embedding, layers, final norm and output layer.

    Args:
        prefix: the beginning of the checkpoint's names, as in `{prefix}embed_tokens.weight`.
    """
    text, tied = hf_config.text_config, hf_config.tie_word_embeddings
    vocabulary = Vocabulary(text.vocab_size, text.hidden_size)
    embedding = f"{prefix}embed_tokens.weight"
    layers = [
        entry
        for layer in range(text.num_hidden_layers)
        for entry in _layer(text, layer, prefix=prefix, qkv_bias=qkv_bias, qk_norm=qk_norm)
    ]
    return [
        Entry("language.embedding.word_embeddings.weight", (embedding,), vocabulary, "first"),
        *layers,
        Entry("language.decoder.final_layernorm.weight", (f"{prefix}norm.weight",), whole(text.hidden_size), "last"),
        Entry("language.output_layer.weight", (embedding if tied else HEAD,), vocabulary, "last", is_copy=tied),
    ]


def _layer(text: Any, layer: int, *, prefix: str, qkv_bias: bool, qk_norm: bool) -> list[Entry]:
    hidden, ffn, values = text.hidden_size, text.intermediate_size, head_dim(text)
    hf, ours = f"{prefix}layers.{layer}.", "language.decoder.layers.{}."

    def entry(name: str, hf_names: tuple[str, ...], kind: Kind) -> Entry:
        return Entry(ours + name, tuple(hf + n for n in hf_names), kind, "layer", layer)

    def qkv(tail: tuple[int, ...]) -> GroupedQKV:
        return GroupedQKV(text.num_attention_heads, text.num_key_value_heads, values, tail)

    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    biases = [entry("self_attention.linear_qkv.bias", tuple(f"{p}.bias" for p in projections), qkv(()))]
    norms = [
        entry("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), whole(values)),
        entry("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), whole(values)),
    ]
    from_heads = Split((hidden, text.num_attention_heads * values), 1)
    return [
        entry("input_layernorm.weight", ("input_layernorm.weight",), whole(hidden)),
        entry("self_attention.linear_qkv.weight", tuple(f"{p}.weight" for p in projections), qkv((hidden,))),
        *(biases if qkv_bias else []),
        *(norms if qk_norm else []),
        entry("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), from_heads),
        entry("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), whole(hidden)),
        entry("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), Gated(ffn, (hidden,))),
        entry("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), Split((hidden, ffn), 1)),
    ]
