"""One pipeline stage of a Qwen-VL, from its Hugging Face configuration."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from megatron_vppo.config.choices import ModelPart
from megatron_vppo.models.families import family_of
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.models.layers.parts import LayerParts
from megatron_vppo.models.layers.torch_parts import TORCH_PARTS
from megatron_vppo.models.megatron_config import check_tensor_parallel, language_config, stage_layers, vision_config
from megatron_vppo.models.options import PLAIN, Backend, ModelOptions
from megatron_vppo.models.precision import check_fp8_model
from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.models.vision.image_parallel import VisionGroups
from megatron_vppo.weights.entries import stage_entries


def build_model(
    hf_config: HfConfig,
    *,
    groups: ProcessGroupCollection,
    vision_groups: VisionGroups,
    dtype: torch.dtype,
    device: torch.device,
    options: ModelOptions = PLAIN,
    virtual_stage: int = 0,
) -> QwenVLModel:
    """Builds one of this rank's pipeline stages. Its weights are uninitialised: load them.

    Args:
        groups: the process groups; their tensor, context and pipeline sizes are the layout.
        dtype: the dtype of parameters and activations, float32 or bfloat16.
        device: 'meta' gives names, shapes and marks without memory.
        virtual_stage: the number of the stage among this rank's `options.virtual_stages`.

    Raises:
        ValueError: the model's sizes do not allow the layout or the FP8 recipe; with the numbers.
    """
    family = family_of(hf_config)
    tensor, pipeline = groups.tp.size(), groups.pp.size()
    if options.fp8 is not None:
        check_fp8_model(hf_config, options.fp8, tensor=tensor, pipeline=pipeline, backend=options.backend)
    check_tensor_parallel(hf_config, tensor=tensor, vision_split=options.vision_split)
    stages = stage_layers(
        hf_config,
        family=family,
        pipeline=pipeline,
        pipeline_layers=options.pipeline_layers,
        virtual_stages=options.virtual_stages,
    )
    shared: dict[str, Any] = {"family": family, "options": options, "dtype": dtype, "device": device}
    with device if device.type == "meta" else nullcontext():
        model = QwenVLModel(
            hf_config,
            family=family,
            parts=layer_parts(options.backend),
            language_config=language_config(
                hf_config, tensor=tensor, context=groups.cp.size(), stages=stages, **shared
            ),
            vision_config=vision_config(hf_config, tensor=vision_groups.tower.tp.size(), **shared),
            stage_layers=stages,
            virtual_stage=virtual_stage,
            groups=groups,
            vision_groups=vision_groups,
        ).to(device)
    _mark(model, options.frozen)
    return model


def _mark(model: QwenVLModel, frozen: frozenset[ModelPart]) -> None:
    """Marks every parameter that is split over tensor-parallel ranks, and freezes those that are not trained.

    Megatron sets the marks while it draws initial weights, which we do not let it do. Gradient norms need them: a
    parameter without a mark counts once for all tensor-parallel ranks.
    """
    parameters = dict(model.named_parameters())
    for entry in stage_entries(model.weight_map, stage_layers=model.stage_layers, stage=model.stage):
        parameter, kind = parameters[entry.local_name(model.stage_layers)], entry.kind
        is_split = kind.partition_dim is not None and model.tensor_group(entry) is model.groups.tp
        if is_split and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, True, kind.partition_dim, kind.partition_stride)
        elif not is_split:  # Megatron also marks biases of layers that each rank holds whole
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        parameter.requires_grad_(entry.part not in frozen)


def layer_parts(backend: Backend) -> LayerParts:
    """Returns the modules of a backend. TransformerEngine is imported only if it is asked for."""
    if backend == "torch":
        return TORCH_PARTS
    from megatron_vppo.models.layers.te_parts import TE_PARTS

    return TE_PARTS
