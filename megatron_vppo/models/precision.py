"""FP8 linear layers of the language model: what the recipes ask for, and where they are in force.

The rest stays as it is: vision tower, projector, embedding, norms, attention and the output weights.
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
"""The tokens that a rank holds must be a multiple of this. Matrix products want 16 (Megatron's `get_fp8_align_size`);
whole blocks are what sequence parallelism can gather in 8 bits (`is_quantizable` of TransformerEngine's quantizers)."""

WIDTH_ALIGNMENT: Mapping[Fp8Recipe, int] = MappingProxyType(
    {"tensorwise": 16, "delayed": 16, "blockwise": 16, "mxfp8": 32}
)
"""So must each rank's widths (TransformerEngine's `assert_dim_for_fp8_exec`, and the blocks of mxfp8)."""


class LanguageStage(Protocol):
    """One pipeline stage; its configuration is the one that all its language layers read."""

    config: TransformerConfig


def check_fp8_model(hf_config: HfConfig, options: Fp8Options, *, tensor: int, pipeline: int, backend: Backend) -> None:
    """What can be known without a GPU.

    Raises:
        ValueError: layers of another backend, a width of the language model that a rank cannot multiply in FP8, or ends
            that leave no layer between them or are longer than a pipeline stage.
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
                f"fp8.recipe={recipe} multiplies widths that are multiples of {WIDTH_ALIGNMENT[recipe]}, but the "
                f"{what} is {width}; lower parallel.tensor_model_parallel_size, or set fp8.recipe=null"
            )
    check_ends(options, layers=text.num_hidden_layers, pipeline=pipeline)


def check_ends(options: Fp8Options, *, layers: int, pipeline: int = 1) -> None:
    """Raises ValueError for ends that the recipe does not take, that leave none of the language layers in FP8, or that
    Megatron does not take, since they are longer than an even pipeline stage.
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
    """Within it the language model's linear layers run in FP8, or in the dtype of their weights.

    Megatron reads `fp8` of the configuration at every forward pass.

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
