"""The checks of a run that need no rank: devices, layout, model, files. They come before any process is started."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_vppo.config.checks import check_device, check_layout, ranks_per_copy
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data.sources import check_source
from megatron_vppo.models.families import family_of
from megatron_vppo.models.hf_config import HfConfig, vllm_split_refusal
from megatron_vppo.models.megatron_config import check_tensor_parallel, stage_layers
from megatron_vppo.models.model_files import open_model_files
from megatron_vppo.models.precision import check_fp8_model
from megatron_vppo.setup.engines import num_engines
from megatron_vppo.setup.hardware import model_options
from megatron_vppo.setup.inputs import background_color
from megatron_vppo.setup.model_folder import model_folder


def check_before_launch(config: RunConfig) -> int:
    """Checks a run and returns the number of local ranks to start.

    Raises:
        ValueError: sizes that do not fit the devices, a layout that the model does not allow, or a missing file. The
            message has the numbers.
    """
    parallel = config.parallel
    per_replica = ranks_per_copy(config)
    devices = torch.cuda.device_count()
    world_size = per_replica * (parallel.data_parallel_size or max(1, devices // per_replica))
    if devices and world_size > devices:
        raise ValueError(
            f"tensor {parallel.tensor_model_parallel_size} x context {parallel.context_parallel_size} x pipeline "
            f"{parallel.pipeline_model_parallel_size} x data {parallel.data_parallel_size or 1} needs {world_size} "
            f"GPUs, but this machine has {devices}; lower one of parallel.*_size, or start several nodes with torchrun "
            "or srun"
        )
    check_layout(config, world_size)
    check_device(config, on_cpu=devices == 0)
    hf_config = open_model_files(model_folder(config.model.path)).hf_config
    family = family_of(hf_config)
    check_tensor_parallel(hf_config, tensor=parallel.tensor_model_parallel_size, vision_split=parallel.vision_split)
    stage_layers(
        hf_config,
        family=family,
        pipeline=parallel.pipeline_model_parallel_size,
        pipeline_layers=parallel.pipeline_layers,
        virtual_stages=parallel.virtual_pipeline_model_parallel_size,
    )
    check_positions(config, hf_config)
    options = model_options(config, on_gpu=devices > 0)
    if options.fp8 is not None:
        check_fp8_model(
            hf_config,
            options.fp8,
            tensor=parallel.tensor_model_parallel_size,
            pipeline=parallel.pipeline_model_parallel_size,
            backend=options.backend,
        )
    num_engines(config, world_size=world_size, on_cpu=devices == 0)
    size = config.rollout.tensor_parallel_size
    if refusal := vllm_split_refusal(hf_config, size):
        raise ValueError(
            f"rollout.tensor_parallel_size={size}: vLLM cannot split {refusal} over {size} ranks; lower it"
        )
    _check_files(config)
    return world_size


def check_positions(config: RunConfig, hf_config: HfConfig) -> None:
    """Refuses prompts and responses that are longer together than the model has positions; vLLM would do so later."""
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    positions = hf_config.text_config.max_position_embeddings
    if prompt + response > positions:
        raise ValueError(
            f"data.max_prompt_length {prompt} + data.max_response_length {response} = {prompt + response} tokens, but "
            f"the model has {positions} positions (max_position_embeddings); lower one of the two"
        )


def _check_files(config: RunConfig) -> None:
    """Checks the files of a run and the background. Ranks would miss them only after their engines have started."""
    data, reward = config.data, config.reward.reward_function
    background_color(config)
    for source in (data.train_files, data.val_files):
        if source is not None:
            check_source(source)
    files = {"data.format_prompt": data.format_prompt, "reward.reward_function": reward.rpartition(":")[0] or None}
    for setting, file in files.items():
        if file is not None and not Path(file).is_file():
            raise ValueError(f"{setting}: there is no file {Path(file).absolute()}")
