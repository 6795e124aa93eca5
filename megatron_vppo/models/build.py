"""One pipeline stage of a Qwen-VL, from its Hugging Face configuration."""

from __future__ import annotations

import contextlib

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from megatron_vppo.models.families import family_of
from megatron_vppo.models.model import QwenVLModel
from megatron_vppo.models.transformer_config import (
    HfConfig,
    check_tensor_parallel,
    language_config,
    stage_layers,
    vision_config,
)
from megatron_vppo.models.weight_map import stage_entries


def build_model(
    hf_config: HfConfig,
    *,
    groups: ProcessGroupCollection,
    dtype: torch.dtype,
    device: torch.device,
    pipeline_layers: tuple[int, ...] | None = None,
    recompute: bool = False,
) -> QwenVLModel:
    """The part of the model that this rank holds. Its weights are uninitialised: load them with `load_hf_weights`.

    Args:
        groups: process groups; their tensor and pipeline sizes are the layout.
        dtype: of parameters and activations, float32 or bfloat16.
        device: of the parameters; on `meta` the model only says what it would hold.
        pipeline_layers: language model layers of each pipeline stage; None: an even split.
        recompute: language and vision layers keep only their inputs and run again in the backward pass.

    Raises:
        ValueError: a layout that the model's sizes do not allow, with the numbers.
    """
    family = family_of(hf_config)
    check_tensor_parallel(hf_config, tensor=groups.tp.size())
    layers = stage_layers(hf_config, family=family, pipeline=groups.pp.size(), pipeline_layers=pipeline_layers)
    options = {
        "family": family, "tensor": groups.tp.size(), "dtype": dtype, "device": device, "recompute": recompute,
    }  # fmt: skip
    with device if device.type == "meta" else contextlib.nullcontext():  # no memory, not even for a moment
        model = QwenVLModel(
            hf_config,
            family=family,
            language_config=language_config(hf_config, pipeline_layers=layers, **options),
            vision_config=vision_config(hf_config, **options),
            stage_layers=layers,
            groups=groups,
        ).to(device)
    _mark_tensor_parallel(model)
    return model


def _mark_tensor_parallel(model: QwenVLModel) -> None:
    """Says of every parameter whether it is split over tensor-parallel ranks.

    Megatron says it while it draws initial weights, which we do not let it do. Gradient norms are wrong without: what
    is not marked counts once for all ranks.
    """
    parameters = dict(model.named_parameters())
    for entry in stage_entries(model.weight_map, stage_layers=model.stage_layers, stage=model.groups.pp.rank()):
        parameter, kind = parameters[entry.local_name(model.stage_layers)], entry.kind
        if kind.partition_dim is not None and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, True, kind.partition_dim, kind.partition_stride)
