"""One pipeline stage of a Qwen2.5-VL, from its Hugging Face configuration."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import Qwen2_5_VLConfig

from megatron_vppo.models.qwen25_vl.config import language_config, stage_layers, vision_config
from megatron_vppo.models.qwen25_vl.model import Qwen25VLModel


def build_model(
    hf_config: Qwen2_5_VLConfig,
    *,
    groups: ProcessGroupCollection,
    dtype: torch.dtype,
    device: torch.device,
    pipeline_layers: tuple[int, ...] | None = None,
    recompute: bool = False,
) -> Qwen25VLModel:
    """The part of the model that this rank holds. Its weights are uninitialised: load them with `load_hf_weights`.

    Args:
        groups: process groups; their tensor and pipeline sizes are the layout.
        dtype: of parameters and activations, float32 or bfloat16.
        pipeline_layers: language model layers of each pipeline stage; None: an even split.
        recompute: language and vision layers keep only their inputs and run again in the backward pass.

    Raises:
        ValueError: a layout that the model's sizes do not allow, with the numbers.
    """
    language = language_config(
        hf_config,
        tensor=groups.tp.size(),
        pipeline=groups.pp.size(),
        pipeline_layers=stage_layers(hf_config, pipeline=groups.pp.size(), pipeline_layers=pipeline_layers),
        dtype=dtype,
        device=device,
        recompute=recompute,
    )
    vision = vision_config(hf_config, tensor=groups.tp.size(), dtype=dtype, device=device, recompute=recompute)
    model = Qwen25VLModel(language, vision, hf_config, groups=groups)
    return model.to(device)
