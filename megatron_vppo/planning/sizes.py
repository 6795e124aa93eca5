"""The numbers that memory depends on, read from a model's configuration and its weight map."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_vppo.config.choices import ModelPart
from megatron_vppo.models.families import family_of
from megatron_vppo.models.hf_config import HfConfig, head_dim
from megatron_vppo.planning.activations import LanguageSizes, LayerSizes, VisionSizes
from megatron_vppo.planning.state import StageValues
from megatron_vppo.weights.entries import Entry, stage_entries


def language_sizes(hf_config: HfConfig) -> LanguageSizes:
    text = hf_config.text_config
    layer = LayerSizes(
        hidden=text.hidden_size,
        ffn=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=head_dim(text),
        gated=True,
        rms_norm=True,
        qk_norm=family_of(hf_config).qk_norm,
    )
    return LanguageSizes(layer=layer, layers=text.num_hidden_layers, vocabulary=text.vocab_size)


def vision_sizes(hf_config: HfConfig) -> VisionSizes:
    family, vision = family_of(hf_config), hf_config.vision_config
    layer = LayerSizes(
        hidden=vision.hidden_size,
        ffn=vision.intermediate_size,
        heads=vision.num_heads,
        kv_heads=vision.num_heads,
        head_dim=vision.hidden_size // vision.num_heads,
        gated=family.vision_options["gated_linear_unit"],
        rms_norm=family.vision_options["normalization"] == "RMSNorm",
        qk_norm=False,
    )
    patch_values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return VisionSizes(
        layer=layer, layers=vision.depth, patch_values=patch_values, taps=family.deepstack_layers(hf_config)
    )


def stage_values(
    entries: Sequence[Entry],
    *,
    stage_layers: tuple[int, ...],
    stage: int,
    tensor: int,
    frozen: frozenset[ModelPart] = frozenset(),
) -> StageValues:
    """Counts the values that one rank of a pipeline stage holds, parameter by parameter.

    Args:
        entries: the model's weight map.
        stage_layers: language layers of each pipeline stage.
        tensor: tensor-parallel ranks.
        frozen: parts of the model that are not trained.
    """
    mine = stage_entries(entries, stage_layers=stage_layers, stage=stage)
    tied = {name for entry in entries if entry.is_copy for name in entry.hf_names} if len(stage_layers) > 1 else set()
    buckets: list[list[int]] = [[]]
    untrained = 0
    for entry in mine:
        values = math.prod(entry.kind.local_shape(tensor))
        if entry.part in frozen:
            untrained += values
        elif tied.intersection(entry.hf_names):
            buckets += [[values], []]
        else:
            buckets[-1].append(values)
    return StageValues(buckets=tuple(tuple(bucket) for bucket in buckets if bucket), frozen=untrained)
