"""The checks of a run that need no rank: devices, layout, model, engines, files. No process is started before."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_vppo.config.checks import check_device, check_layout, ranks_per_copy
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data.sources import check_source
from megatron_vppo.models.families import family_of
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.models.megatron_config import check_tensor_parallel, stage_layers
from megatron_vppo.models.model_files import open_model_files
from megatron_vppo.models.precision import check_fp8_model
from megatron_vppo.setup.disk_space import check_disk
from megatron_vppo.setup.engine_limits import check_engines
from megatron_vppo.setup.engines import num_engines
from megatron_vppo.setup.hardware import check_dtype, check_host_memory, model_options
from megatron_vppo.setup.inputs import background_color, open_datasets
from megatron_vppo.setup.model_folder import model_folder
from megatron_vppo.setup.resume import check_resume


def check_before_launch(config: RunConfig) -> int:
    """Checks a run and returns the number of local ranks to start.

    Raises:
        ValueError: sizes that do not fit the devices or the machine's memory, a damaged checkpoint, or as `check_run`.
            The message has the numbers.
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
    check_settings(config, world_size=world_size, local_ranks=world_size)
    return world_size


def check_settings(config: RunConfig, *, world_size: int, local_ranks: int) -> None:
    """Checks a run of `world_size` ranks, `local_ranks` of which are on this machine.

    One rank does so for all, where torchrun or srun has started them.

    Raises:
        ValueError: too little memory or disk, a damaged checkpoint, or as `check_run`.
    """
    on_cpu = torch.cuda.device_count() == 0
    hf_config = open_model_files(model_folder(config.model.path)).hf_config
    check_run(config, hf_config, world_size=world_size, on_gpu=not on_cpu)
    check_resume(config.trainer)
    check_disk(config, hf_config)
    if all(Path(check_source(source).location).exists() for source in _data_sources(config)):
        open_datasets(config)  # of the hub, it is left to the ranks
    if on_cpu:
        engines = num_engines(config, world_size=world_size, on_cpu=True)
        check_host_memory(
            config,
            ranks=local_ranks,
            engines=-(-engines * local_ranks // world_size),
            total_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        )


def check_run(config: RunConfig, hf_config: HfConfig, *, world_size: int, on_gpu: bool) -> None:
    """Checks that `world_size` ranks and their engines can run the model, and that the files are there.

    Ranks that torchrun or srun has started check it themselves, before their engines start.

    Raises:
        ValueError: a layout that the ranks, the model or the GPUs do not allow; settings that an engine would refuse;
            or a missing file. The message has the settings, the numbers and what to set.
    """
    check_layout(config, world_size)
    check_device(config, on_cpu=not on_gpu)
    if on_gpu:
        check_dtype(config, capability=torch.cuda.get_device_capability())
    _check_trainer(config, hf_config, on_gpu=on_gpu)
    num_engines(config, world_size=world_size, on_cpu=not on_gpu)
    gpu_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if on_gpu else None
    check_engines(config, hf_config, gpu_bytes=gpu_bytes)
    _check_files(config)


def _check_trainer(config: RunConfig, hf_config: HfConfig, *, on_gpu: bool) -> None:
    """Refuses a split of the model that Megatron does not allow, and FP8 that the model or the machine does not."""
    parallel = config.parallel
    check_tensor_parallel(hf_config, tensor=parallel.tensor_model_parallel_size, vision_split=parallel.vision_split)
    stage_layers(
        hf_config,
        family=family_of(hf_config),
        pipeline=parallel.pipeline_model_parallel_size,
        pipeline_layers=parallel.pipeline_layers,
        virtual_stages=parallel.virtual_pipeline_model_parallel_size,
    )
    options = model_options(config, on_gpu=on_gpu)
    if options.fp8 is not None:
        check_fp8_model(
            hf_config,
            options.fp8,
            tensor=parallel.tensor_model_parallel_size,
            pipeline=parallel.pipeline_model_parallel_size,
            backend=options.backend,
        )


def _data_sources(config: RunConfig) -> list[str]:
    return [source for source in (config.data.train_files, config.data.val_files) if source is not None]


def _check_files(config: RunConfig) -> None:
    """Checks the files of a run and the background. Ranks would miss them only after their engines have started."""
    data, reward = config.data, config.reward.reward_function
    background_color(config)
    for source in _data_sources(config):
        check_source(source)
    if data.image_dir is not None and not Path(data.image_dir).is_dir():
        raise ValueError(f"data.image_dir: there is no folder {Path(data.image_dir).absolute()}")
    files = {"data.format_prompt": data.format_prompt, "reward.reward_function": reward.rpartition(":")[0] or None}
    for setting, file in files.items():
        if file is not None and not Path(file).is_file():
            raise ValueError(f"{setting}: there is no file {Path(file).absolute()}")
