"""What can be known to be wrong before a single rank starts."""

from __future__ import annotations

import torch
from transformers import AutoConfig

from megatron_vppo.config.checks import check_layout
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.models.qwen25_vl.config import check_supported, check_tensor_parallel, stage_layers
from megatron_vppo.trainer.engines import num_engines
from megatron_vppo.trainer.model_folder import model_folder


def check_before_launch(config: RunConfig) -> int:
    """Number of local ranks to start.

    Raises:
        ValueError: sizes that do not fit the devices, or a layout that the model does not allow, with the numbers.
    """
    parallel = config.parallel
    per_replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    devices = torch.cuda.device_count()
    world_size = per_replica * (parallel.data_parallel_size or max(1, devices // per_replica))
    if devices and world_size > devices:
        raise ValueError(
            f"tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} x data "
            f"{parallel.data_parallel_size or 1} needs {world_size} GPUs, this machine has {devices}; lower one of "
            "parallel.*_size, or start several nodes with torchrun or srun"
        )
    check_layout(config, world_size)
    hf_config = AutoConfig.from_pretrained(model_folder(config.model.path))
    check_supported(hf_config)
    check_tensor_parallel(hf_config, tensor=parallel.tensor_model_parallel_size)
    stage_layers(hf_config, pipeline=parallel.pipeline_model_parallel_size, pipeline_layers=parallel.pipeline_layers)
    num_engines(config, world_size=world_size, on_cpu=devices == 0)
    return world_size
