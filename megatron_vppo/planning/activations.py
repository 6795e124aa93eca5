"""The bytes that a micro-batch keeps on a trainer rank from its forward to its backward pass.

Plain arithmetic. Each term is a tensor that autograd saves in the plain layers (`models/layers/torch_parts.py`):
Megatron's linear layers, with F.scaled_dot_product_attention as a flash kernel. Statistics of one number per token and
norm are left out. docs/plan.md says what was measured.
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
    """True for an MLP with gate and up projections, False for one with a single projection."""
    rms_norm: bool
    """True for RMSNorm, False for LayerNorm."""
    qk_norm: bool


@dataclass(frozen=True)
class VisionSizes:
    layer: LayerSizes
    layers: int
    patch_values: int
    """The values of one patch."""
    taps: int
    """The number of deepstack features, which are taken from inside the tower, each by a merger of its own."""


@dataclass(frozen=True)
class LanguageSizes:
    layer: LayerSizes
    layers: int
    vocabulary: int


@dataclass(frozen=True)
class MicroBatch:
    """The tokens and patches that one data-parallel rank processes at once."""

    tokens: int
    response_tokens: int
    """The tokens that go through the vocabulary head, a part of `tokens`."""
    image_tokens: int
    """The tokens that image features fill, a part of `tokens`."""
    patches: int
    """The patches of all distinct images."""


@dataclass(frozen=True)
class LayerSplit:
    """The ranks that share each layer."""

    tensor: int
    context: int
    sequence_parallel: bool
    """True if a tensor-parallel rank holds only its share of the tokens between the linear layers."""


@dataclass(frozen=True)
class Kernels:
    dtype_bytes: int
    fused_rms_norm: bool
    """True on CUDA, where RMSNorm saves its input. On CPU it saves two fp32 tensors: its input, and the normalised
    input before the multiplication by the weight.
    """


def norm_saved(values: int, *, rms_norm: bool, kernels: Kernels, held: bool = False) -> int:
    """Counts the bytes that a norm saves.

    Args:
        values: the size of its input.
        held: another operation saves the same input, so that it costs nothing here.
    """
    if kernels.fused_rms_norm or not rms_norm:
        return 0 if held else values * kernels.dtype_bytes
    is_fp32_already = kernels.dtype_bytes == FLOAT32
    return values * FLOAT32 * (1 if held and is_fp32_already else 2)


def layer_saved(layer: LayerSizes, tokens: int, *, split: LayerSplit, kernels: Kernels, recompute: Recompute) -> int:
    """Counts the bytes that one layer saves for the `tokens` of one context-parallel rank."""
    size, tensor = kernels.dtype_bytes, split.tensor
    between = tokens * layer.hidden // (tensor if split.sequence_parallel else 1)
    if recompute == "full":
        return between * size
    heads, kv_heads = (tokens * count * layer.head_dim // tensor for count in (layer.heads, layer.kv_heads))
    norms = 2 * norm_saved(between, rms_norm=layer.rms_norm, kernels=kernels)
    if layer.qk_norm:
        # Attention's V is a view of the output of the QKV projection, and keeps all of it alive. K is a view of it as
        # well, so saving the input of its norm costs nothing more. Q is a copy, unless this rank has one key-value
        # head.
        norms += norm_saved(heads, rms_norm=True, kernels=kernels, held=layer.kv_heads == tensor)
        norms += norm_saved(kv_heads, rms_norm=True, kernels=kernels, held=True)
    linear_inputs = 2 * between * size
    projections = (heads + 2 * kv_heads) * size
    rotated = (heads + kv_heads) * size + 4 * tokens * layer.head_dim * size  # the last: cos and sin, for Q and for K
    attention = heads * size  # the output
    if split.context > 1:
        # Each sequence is cut into 2 * context chunks of equal length, of which a rank has two, one from each end. For
        # each of the two, autograd saves all keys and values up to its end: 2 * context + 1 chunks for both together,
        # whichever two they are.
        attention += 2 * kv_heads * (2 * split.context + 1) // 2 * size
    if recompute == "none":
        attention += FLOAT32 * tokens * layer.heads // tensor  # the log-sum-exp of each query
    # Gated: gate, up, silu(gate), up + offset (Megatron's glu_linear_offset, saved even if it is 0), their product.
    # Otherwise: input and output of the activation.
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
    split: LayerSplit,
    kernels: Kernels,
    recompute: Recompute,
) -> int:
    """Counts the bytes that the `layers` language layers of one stage save; on the first stage also the features that
    fill image tokens, on the last one the final norm.
    """
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
    """Counts the bytes that the whole vision tower saves.

    Autograd saves nothing before the first trained part: nothing in a frozen tower, and nothing in its mergers if they
    are frozen, too.

    Args:
        tensor: ranks that the tower is split over.
    """
    if {"vision_tower", "projector"} <= frozen:
        return 0
    layer, size = vision.layer, kernels.dtype_bytes
    split = LayerSplit(tensor=tensor, context=1, sequence_parallel=False)
    per_layer = layer_saved(layer, patches, split=split, kernels=kernels, recompute=recompute)
    width = patches * layer.hidden
    merger = width * size + 2 * width // tensor * size  # inputs of both linear layers and of the GELU between
    main_norm = norm_saved(width, rms_norm=layer.rms_norm, kernels=kernels)
    angles = FLOAT32 * patches * layer.head_dim if recompute == "full" else 0
    pixels = patches * vision.patch_values * size
    mergers = main_norm + (1 + vision.taps) * merger
    return mergers if "vision_tower" in frozen else pixels + vision.layers * per_layer + angles + mergers


def head_bytes(language: LanguageSizes, batch: MicroBatch, *, chunk: int, tensor: int, dtype_bytes: int) -> int:
    """Counts the bytes of the vocabulary head at its fullest, in the backward pass of `parallel/vocab_head.py`.

    It holds five fp32 tensors of the size of a chunk's logits, the gradient of this rank's vocabulary rows in fp32 and
    in the model's dtype, and the hidden states of the response positions with their gradient. On a GPU, where the
    passes over a chunk are fused, this is an upper bound.
    """
    rows, hidden = -(-language.vocabulary // tensor), language.layer.hidden
    logits = 5 * FLOAT32 * min(chunk, batch.response_tokens) * rows
    return logits + rows * hidden * (FLOAT32 + dtype_bytes) + 2 * batch.response_tokens * hidden * dtype_bytes


@dataclass(frozen=True)
class StageActivations:
    layers: int
    """The bytes of the language model and the vision tower, for all micro-batches in flight."""
    head: int
    """The bytes of the vocabulary head."""

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
    split: LayerSplit,
    kernels: Kernels,
    recompute: Recompute,
    chunk: int,
    frozen: frozenset[ModelPart] = frozenset(),
) -> StageActivations:
    """Counts the activations of one pipeline stage in the update, under the one-forward-one-backward schedule.

    Stage s of p stages holds up to p - s micro-batches. On top of the saved activations come the stage's output (or the
    head's input) and the working set of one layer, of the larger tower: it is live while the layer runs or is
    recomputed.
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
    running = running_layer(language, vision, batch, with_vision=is_first, split=split, kernels=kernels)
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
    split: LayerSplit,
    kernels: Kernels,
    chunk: int,
) -> StageActivations:
    """Counts the activations of scoring, which saves nothing for a backward pass: a running layer, its input and
    output, and on the last stage three fp32 tensors of the size of a chunk's logits.
    """
    tokens = -(-batch.tokens // split.context)
    running = running_layer(language, vision, batch, with_vision=stage == 0, split=split, kernels=kernels)
    hidden = 2 * tokens * language.layer.hidden * kernels.dtype_bytes
    logits = 3 * FLOAT32 * min(chunk, batch.response_tokens) * -(-language.vocabulary // split.tensor)
    return StageActivations(layers=running + hidden, head=logits if stage == stages - 1 else 0)


def running_layer(
    language: LanguageSizes,
    vision: VisionSizes,
    batch: MicroBatch,
    *,
    with_vision: bool,
    split: LayerSplit,
    kernels: Kernels,
) -> int:
    """Counts the working set of one layer: of the language model, or of the vision tower if that needs more."""
    tokens = -(-batch.tokens // split.context)
    language_layer = layer_saved(language.layer, tokens, split=split, kernels=kernels, recompute="none")
    patches = batch.patches if with_vision else 0
    tower_split = LayerSplit(tensor=split.tensor, context=1, sequence_parallel=False)
    return max(language_layer, layer_saved(vision.layer, patches, split=tower_split, kernels=kernels, recompute="none"))
