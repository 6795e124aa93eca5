"""FP8 linear layers of the language model: the sizes that recipes need, and the switch between FP8 and the usual dtype.

Vision tower, projector, embedding, norms, attention and output weights never run in FP8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Protocol

from megatron.core.transformer import TransformerConfig

from megatron_vppo.config.choices import Fp8Recipe
from megatron_vppo.models.hf_config import HfConfig, head_dim
from megatron_vppo.models.options import Backend, Fp8Options

TOKEN_ALIGNMENT: Mapping[Fp8Recipe, int] = MappingProxyType(
    {"tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
)
"""The number of tokens that a rank holds must be a multiple of this. Matrix products need 16 (Megatron's
`get_fp8_align_size`). Sequence parallelism can gather whole blocks in 8 bits, and nothing else (`is_quantizable` of
TransformerEngine's quantizers)."""

WIDTH_ALIGNMENT: Mapping[Fp8Recipe, int] = MappingProxyType(
    {"tensorwise": 16, "delayed": 16, "blockwise": 16, "mxfp8": 32}
)
"""The widths of each rank's matrices must be multiples of this (TransformerEngine's `assert_dim_for_fp8_exec`, and the
blocks of mxfp8)."""

AMAX_HISTORY = 1024
"""The number of forward passes whose largest amax gives 'delayed' its scale: TransformerEngine's default."""


class LanguageStage(Protocol):
    """A pipeline stage, whose configuration all of its language layers read."""

    config: TransformerConfig


def check_fp8_model(hf_config: HfConfig, options: Fp8Options, *, tensor: int, pipeline: int, backend: Backend) -> None:
    """Checks everything about a model in FP8 that needs no GPU to know.

    Raises:
        ValueError: layers of another backend; a width of the language model that a rank cannot multiply in FP8; or the
            refusal of `check_ends`.
    """
    if backend != "te":
        raise ValueError(
            f"fp8.recipe={options.recipe} needs layers of TransformerEngine; set model.backend=te, or fp8.recipe=null"
        )
    text, recipe = hf_config.text_config, options.recipe
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    widths = {
        "hidden size": text.hidden_size,
        "width of queries, keys and values of a rank": (heads + 2 * kv_heads) * head_dim(text) // tensor,
        "width of the heads of a rank": heads * head_dim(text) // tensor,
        "MLP width of a rank": text.intermediate_size // tensor,
    }
    for what, width in widths.items():
        if width % WIDTH_ALIGNMENT[recipe]:
            raise ValueError(
                f"fp8.recipe={recipe} needs widths that are multiples of {WIDTH_ALIGNMENT[recipe]}, but the "
                f"{what} is {width}; lower parallel.tensor_model_parallel_size, or set fp8.recipe=null"
            )
    check_ends(options, layers=text.num_hidden_layers, pipeline=pipeline)


def check_ends(options: Fp8Options, *, layers: int, pipeline: int = 1) -> None:
    """Checks the layers at both ends that stay out of FP8.

    Raises:
        ValueError: the recipe has no such ends; they leave no language layer in FP8; or they are longer than an even
            pipeline stage, which Megatron does not allow.
    """
    ends = options.bf16_layers_at_ends
    if options.recipe == "delayed" and ends:
        raise ValueError("fp8.recipe=delayed has one scope for all layers; set fp8.bf16_layers_at_ends=0")
    if 2 * ends >= layers:
        raise ValueError(
            f"fp8.bf16_layers_at_ends={ends} leaves none of the {layers} layers in FP8; lower it, or set "
            "fp8.recipe=null"
        )
    if ends > layers // pipeline:
        raise ValueError(
            f"fp8.bf16_layers_at_ends={ends} is more than the {layers // pipeline} layers of one of {pipeline} "
            "pipeline stages; lower it"
        )


@contextmanager
def language_precision(stages: Sequence[LanguageStage], *, fp8: bool) -> Iterator[None]:
    """Makes the language model's linear layers run in FP8, or in the dtype of their weights, while it is open.

    Megatron reads the configuration's `fp8` at every forward pass, so it is set there.

    Raises:
        ValueError: FP8 is asked for, but the stages were built without `ModelOptions.fp8`.
    """
    built = [stage.config.fp8 for stage in stages]
    if fp8 and None in built:
        raise ValueError("the model was built without FP8; set fp8.recipe")
    try:
        for stage, format_ in zip(stages, built, strict=True):
            stage.config.fp8 = format_ if fp8 else None
        yield
    finally:
        for stage, format_ in zip(stages, built, strict=True):
            stage.config.fp8 = format_
