"""A try of TransformerEngine's attention on this GPU, before a model is built that would run a slower one.

TransformerEngine falls back to attention that is not fused without a word. On an H200 scoring then took 4.5 times as
long (docs/LOG.md, 2026-11-29).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from megatron_vppo.models.hf_config import HfConfig, head_dim
from megatron_vppo.models.layers.continued import CONTINUED_MASK
from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.layers.te_support import packed_arguments

UNFUSED = "NVTE_UNFUSED_ATTN"
"""TransformerEngine's environment variable; 0: raise an error rather than run attention that is not fused."""
PACKING = Packing((64, 32, 48, 16), prefixes=(0, 0))
"""The sequences that are tried: two, and two continuations of the first."""
HOPPER = (9, 0)
"""The first compute capability on which cuDNN has a backward pass for packed sequences, by the messages in the library
of TransformerEngine 2.20; no earlier chip was tried."""


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of an attention on one tensor-parallel rank."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    continued: bool = False
    """True for the attention of continuations (see Packing), whose keys are more than their queries."""

    def __str__(self) -> str:
        mask = "responses that share a prompt" if self.continued else "causal" if self.causal else "without a mask"
        return f"of the {self.name} ({self.heads} heads of {self.head_dim}, {self.kv_heads} key-value heads, {mask})"


def attention_shapes(
    hf_config: HfConfig, *, tensor: int, vision_tensor: int, shared_prefix: bool
) -> tuple[AttentionShape, ...]:
    """Returns the attention of the language model and that of the vision tower, on one rank.

    Args:
        tensor: the tensor-parallel ranks of the language model.
        vision_tensor: those of the tower.
        shared_prefix: True if responses share their prompt, which takes another attention.
    """
    text, vision = hf_config.text_config, hf_config.vision_config
    kv_heads = text.num_key_value_heads // tensor
    vision_heads = vision.num_heads // vision_tensor
    language = AttentionShape("language model", text.num_attention_heads // tensor, kv_heads, head_dim(text), True)
    return (
        language,
        *([replace(language, continued=True)] if shared_prefix else []),
        AttentionShape("vision tower", vision_heads, vision_heads, vision.hidden_size // vision.num_heads, False),
    )


def fused_attention_refusal(shape: AttentionShape) -> str | None:
    """Runs packed attention of this shape, forward and backward, in bfloat16. Returns why it is not fused, or None."""
    import transformer_engine.pytorch as te

    from megatron_vppo.models.layers.te_parts import sequence_bounds

    device = torch.device("cuda", torch.cuda.current_device())
    plan = sequence_bounds(PACKING, causal=shape.causal)
    bounds, queries, keys = packed_arguments(plan.bounds.to(device), plan.longest), *[PACKING.whole.num_tokens] * 2
    mask = "padding_causal" if shape.causal else "padding"
    if shape.continued and (continued := plan.continued):
        own, of_keys = continued.bounds.to(device), continued.key_bounds.to(device)
        bounds = packed_arguments(own, continued.longest, of_keys, continued.longest_keys)
        queries, keys, mask = PACKING.num_tokens - continued.first, len(continued.order), CONTINUED_MASK
    attention = te.DotProductAttention(
        shape.heads, shape.head_dim, num_gqa_groups=shape.kv_heads, qkv_format="thd", attn_mask_type=mask
    )
    query, key, value = (
        torch.zeros(tokens, heads, shape.head_dim, dtype=torch.bfloat16, device=device, requires_grad=True)
        for tokens, heads in ((queries, shape.heads), (keys, shape.kv_heads), (keys, shape.kv_heads))
    )
    with _environment(UNFUSED, "0"):
        try:
            attention(query, key, value, **bounds).sum().backward()
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (RuntimeError, ValueError) as error:
            return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return None


def check_fused_attention(hf_config: HfConfig, *, tensor: int, vision_tensor: int, shared_prefix: bool) -> None:
    """Raises ValueError if the attention of this model would not be fused on this GPU. The message names the fix.

    Nothing is tried if the environment sets UNFUSED to 1: the user has decided. TransformerEngine's unfused attention
    then takes the keys of a continuation for its queries, so prompts must not be shared.
    """
    if os.environ.get(UNFUSED, "0") != "0":
        if shared_prefix:
            raise ValueError(
                f"{UNFUSED}={os.environ[UNFUSED]}: TransformerEngine's attention that is not fused cannot run "
                f"responses that share a prompt; set parallel.shared_prefix=false, or unset {UNFUSED}"
            )
        return
    shapes = attention_shapes(hf_config, tensor=tensor, vision_tensor=vision_tensor, shared_prefix=shared_prefix)
    for shape in shapes:
        if (refusal := fused_attention_refusal(shape)) is not None:
            anyway = (
                "parallel.shared_prefix=false does without it" if shape.continued else f"{UNFUSED}=1 runs it anyway"
            )
            raise ValueError(
                f"TransformerEngine cannot run fused attention {shape}: {refusal}. What it would run instead takes "
                f"several times as long. {_advice()} NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 shows its reasons. "
                f"{anyway}, and model.backend=torch does without TransformerEngine"
            )


def _advice() -> str:
    if torch.cuda.get_device_capability() < HOPPER:
        return "GPUs before Hopper need the package flash-attn for it."
    return (
        "Usually there are two versions of cuDNN: unset CUDNN_HOME and CUDNN_PATH, or set them to the folder of "
        "torch's."
    )


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
