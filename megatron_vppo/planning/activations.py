"""Bytes that a micro-batch leaves on a trainer rank from its forward to its backward pass.

Formulas of numbers, term by term what autograd keeps of the plain layers (`models/layers/torch_parts.py`): Megatron's
linear layers with F.scaled_dot_product_attention as a flash kernel. Statistics of one number per token and norm are
left out. docs/plan.md says what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vppo.config.choices import ModelPart, Recompute
from megatron_vppo.planning.state import FLOAT32


@dataclass(frozen=True)
class LayerSizes:
    """One transformer layer of either tower, before any split."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    gated: bool
    """An MLP with gate and up projections; otherwise with one."""
    rms_norm: bool
    """RMSNorm; otherwise LayerNorm."""
    qk_norm: bool


@dataclass(frozen=True)
class VisionSizes:
    layer: LayerSizes
    layers: int
    patch_values: int
    taps: int
    """Deepstack features, each with a merger of its own."""


@dataclass(frozen=True)
class LanguageSizes:
    layer: LayerSizes
    layers: int
    vocabulary: int


@dataclass(frozen=True)
class MicroBatch:
    """What one data-parallel rank reads at once."""

    tokens: int
    response_tokens: int
    """Those of `tokens` that go through the vocabulary head."""
    image_tokens: int
    """Those of `tokens` that a picture fills."""
    patches: int
    """Of all distinct pictures."""


@dataclass(frozen=True)
class Split:
    tensor: int
    context: int
    sequence_parallel: bool
    """Between the linear layers each tensor-parallel rank holds its part of the tokens, not all of them."""


@dataclass(frozen=True)
class Kernels:
    dtype_bytes: int
    fused_rms_norm: bool
    """CUDA: RMSNorm keeps its input. Otherwise (CPU) it keeps its input and its result before the weight, in fp32."""


def norm_saved(values: int, *, rms_norm: bool, kernels: Kernels, held: bool = False) -> int:
    """Of a norm whose input has so many values.

    Args:
        held: something else keeps the input as it is, so that it costs nothing more.
    """
    if kernels.fused_rms_norm or not rms_norm:
        return 0 if held else values * kernels.dtype_bytes
    as_it_is = kernels.dtype_bytes == FLOAT32
    return values * FLOAT32 * (1 if held and as_it_is else 2)


def layer_saved(layer: LayerSizes, tokens: int, *, split: Split, kernels: Kernels, recompute: Recompute) -> int:
    """Of one layer for `tokens` of one context-parallel rank."""
    size, tensor = kernels.dtype_bytes, split.tensor
    between = tokens * layer.hidden // (tensor if split.sequence_parallel else 1)
    if recompute == "full":
        return between * size
    heads, kv_heads = (tokens * count * layer.head_dim // tensor for count in (layer.heads, layer.kv_heads))
    norms = 2 * norm_saved(between, rms_norm=layer.rms_norm, kernels=kernels)
    if layer.qk_norm:
        # The value keeps the projections' output alive. The key is a view of it, the query a copy, unless this rank
        # has one key-value head.
        norms += norm_saved(heads, rms_norm=True, kernels=kernels, held=layer.kv_heads == tensor)
        norms += norm_saved(kv_heads, rms_norm=True, kernels=kernels, held=True)
    linear_inputs = 2 * between * size
    projections = (heads + 2 * kv_heads) * size
    rotated = (heads + kv_heads) * size + 4 * tokens * layer.head_dim * size  # and cos, sin of queries and of keys
    attention = heads * size  # its result
    if split.context > 1:  # keys and values before this rank's two chunks of each sequence, gathered from all ranks
        attention += 2 * kv_heads * (2 * split.context + 1) // 2 * size
    if recompute == "none":
        attention += FLOAT32 * tokens * layer.heads // tensor  # log of its softmax's denominator
    # Gated: gate and up, silu(gate), up + offset, their product. Otherwise: input and result of the activation.
    mlp = (5 if layer.gated else 2) * tokens * layer.ffn // tensor * size
    return norms + linear_inputs + projections + rotated + attention + mlp


def language_saved(
    language: LanguageSizes,
    batch: MicroBatch,
    *,
    layers: int,
    taps: int,
    is_first: bool,
    is_last: bool,
    split: Split,
    kernels: Kernels,
    recompute: Recompute,
) -> int:
    """Of the `layers` language layers of one stage; on the first one with the features that fill image tokens."""
    tokens = -(-batch.tokens // split.context)
    per_layer = layer_saved(language.layer, tokens, split=split, kernels=kernels, recompute=recompute)
    hidden = language.layer.hidden
    features = (1 + taps) * batch.image_tokens // split.context * hidden * kernels.dtype_bytes if is_first else 0
    between = tokens * hidden // (split.tensor if split.sequence_parallel else 1)
    final_norm = norm_saved(between, rms_norm=True, kernels=kernels) if is_last else 0
    angles = FLOAT32 * tokens * language.layer.head_dim if recompute == "full" else 0
    return layers * per_layer + features + final_norm + angles


def vision_saved(
    vision: VisionSizes,
    patches: int,
    *,
    tensor: int,
    kernels: Kernels,
    recompute: Recompute,
    frozen: frozenset[ModelPart] = frozenset(),
) -> int:
    """Of the whole tower; `tensor` is the number of ranks that it is split over. Nothing is kept of what lies before
    the first trained part: of a frozen tower, and of its mergers too where they are frozen as well.
    """
    if {"vision_tower", "projector"} <= frozen:
        return 0
    layer, size = vision.layer, kernels.dtype_bytes
    split = Split(tensor=tensor, context=1, sequence_parallel=False)
    per_layer = layer_saved(layer, patches, split=split, kernels=kernels, recompute=recompute)
    width = patches * layer.hidden
    merger = width * size + 2 * width // tensor * size  # inputs of the two linear layers, and of the gelu between them
    main_norm = norm_saved(width, rms_norm=layer.rms_norm, kernels=kernels)
    angles = FLOAT32 * patches * layer.head_dim if recompute == "full" else 0
    pixels = patches * vision.patch_values * size
    mergers = main_norm + (1 + vision.taps) * merger
    return mergers if "vision_tower" in frozen else pixels + vision.layers * per_layer + angles + mergers


def head_bytes(language: LanguageSizes, batch: MicroBatch, *, chunk: int, tensor: int, dtype_bytes: int) -> int:
    """The vocabulary head at its fullest, in the backward pass of `parallel/vocab_head.py`: five fp32 tensors of a
    chunk's logits, the gradient of this rank's rows in fp32 and in the model's dtype, and the response positions'
    hidden states and their gradient. On a GPU, whose passes over a chunk are fused, this is an upper bound.
    """
    rows, hidden = -(-language.vocabulary // tensor), language.layer.hidden
    logits = 5 * FLOAT32 * min(chunk, batch.response_tokens) * rows
    return logits + rows * hidden * (FLOAT32 + dtype_bytes) + 2 * batch.response_tokens * hidden * dtype_bytes


@dataclass(frozen=True)
class StageActivations:
    layers: int
    """Bytes of both towers, of all micro-batches in flight."""
    head: int

    @property
    def total(self) -> int:
        return self.layers + self.head


def update_activations(
    language: LanguageSizes,
    vision: VisionSizes,
    batch: MicroBatch,
    *,
    stage: int,
    stage_layers: tuple[int, ...],
    split: Split,
    kernels: Kernels,
    recompute: Recompute,
    chunk: int,
    frozen: frozenset[ModelPart] = frozenset(),
) -> StageActivations:
    """Of one pipeline stage under one-forward-one-backward: stage s of p holds up to p - s micro-batches.

    To what is saved comes what a stage hands on (or the head takes), and one more layer of the larger tower: what a
    running layer holds for a moment, and what it makes again where it is recomputed.
    """
    is_first, is_last = stage == 0, stage == len(stage_layers) - 1
    saved = language_saved(
        language,
        batch,
        layers=stage_layers[stage],
        taps=vision.taps,
        is_first=is_first,
        is_last=is_last,
        split=split,
        kernels=kernels,
        recompute=recompute,
    )
    tokens = -(-batch.tokens // split.context)
    output = tokens * language.layer.hidden * kernels.dtype_bytes
    if is_first:
        saved += vision_saved(
            vision,
            batch.patches,
            tensor=split.tensor,
            kernels=kernels,
            recompute=recompute,
            frozen=frozen,
        )
    running = _running_layer(language, vision, batch, with_vision=is_first, split=split, kernels=kernels)
    head = head_bytes(language, batch, chunk=chunk, tensor=split.tensor, dtype_bytes=kernels.dtype_bytes)
    return StageActivations(
        layers=(len(stage_layers) - stage) * (saved + output) + running, head=head if is_last else 0
    )


def score_activations(
    language: LanguageSizes,
    vision: VisionSizes,
    batch: MicroBatch,
    *,
    stage: int,
    stages: int,
    split: Split,
    kernels: Kernels,
    chunk: int,
) -> StageActivations:
    """Of the scoring pass, which keeps nothing for a backward pass: one running layer, its input and its output."""
    tokens = -(-batch.tokens // split.context)
    running = _running_layer(language, vision, batch, with_vision=stage == 0, split=split, kernels=kernels)
    hidden = 2 * tokens * language.layer.hidden * kernels.dtype_bytes
    logits = 3 * FLOAT32 * min(chunk, batch.response_tokens) * -(-language.vocabulary // split.tensor)
    return StageActivations(layers=running + hidden, head=logits if stage == stages - 1 else 0)


def _running_layer(
    language: LanguageSizes,
    vision: VisionSizes,
    batch: MicroBatch,
    *,
    with_vision: bool,
    split: Split,
    kernels: Kernels,
) -> int:
    tokens = -(-batch.tokens // split.context)
    ours = layer_saved(language.layer, tokens, split=split, kernels=kernels, recompute="none")
    patches = batch.patches if with_vision else 0
    whole = Split(tensor=split.tensor, context=1, sequence_parallel=False)
    return max(ours, layer_saved(vision.layer, patches, split=whole, kernels=kernels, recompute="none"))
