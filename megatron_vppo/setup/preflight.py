"""The checks of a run that need no rank: devices, layout, model, engines, files. No process is started before."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from megatron_vppo.config.checks import check_device, check_layout, ranks_per_copy
from megatron_vppo.config.data_files import settings_of_files
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data.sources import check_source
from megatron_vppo.models.families import family_of
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.models.megatron_config import check_tensor_parallel, stage_layers
from megatron_vppo.models.model_files import open_model_files
from megatron_vppo.models.options import ModelOptions
from megatron_vppo.models.precision import check_fp8_model
from megatron_vppo.setup.disk_space import check_disk
from megatron_vppo.setup.engine_limits import check_engines
from megatron_vppo.setup.engines import num_engines
from megatron_vppo.setup.hardware import Gpu, check_dtype, check_host_memory, model_options
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
    if all(Path(check_source(source).location).exists() for source in data_sources(config).values()):
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
    check_world(
        config,
        hf_config,
        world_size=world_size,
        gpu=_this_gpu() if on_gpu else None,
        options_of=partial(model_options, on_gpu=on_gpu),
    )
    _check_files(config)


def _this_gpu() -> Gpu:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Gpu(torch.cuda.get_device_capability(), properties.total_memory)


def check_world(
    config: RunConfig,
    hf_config: HfConfig,
    *,
    world_size: int,
    gpu: Gpu | None,
    options_of: Callable[[RunConfig], ModelOptions],
) -> None:
    """Checks ranks and engines of a machine that may be another than this one.

    Args:
        gpu: the GPUs of the machine; None: it has none.
        options_of: returns the options by which the machine builds the model, or refuses them.

    Raises:
        ValueError: as `check_run`, apart from files.
    """
    check_layout(config, world_size)
    check_device(config, on_cpu=gpu is None)
    if gpu is not None:
        check_dtype(config, capability=gpu.capability)
    _check_trainer(config, hf_config, options_of)
    num_engines(config, world_size=world_size, on_cpu=gpu is None)
    check_engines(config, hf_config, gpu_bytes=None if gpu is None else gpu.memory_bytes)


def _check_trainer(config: RunConfig, hf_config: HfConfig, options_of: Callable[[RunConfig], ModelOptions]) -> None:
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
    options = options_of(config)
    if options.fp8 is not None:
        check_fp8_model(
            hf_config,
            options.fp8,
            tensor=parallel.tensor_model_parallel_size,
            pipeline=parallel.pipeline_model_parallel_size,
            backend=options.backend,
        )


def data_sources(config: RunConfig) -> dict[str, str]:
    """Returns the sources of rows that are set, by the names of their settings."""
    return {setting: file.path for setting, file in settings_of_files(config.data).items()}


def own_files(config: RunConfig) -> dict[str, Path]:
    """Returns the files and folders of the user that are set besides model and rows, by the names of their settings."""
    paths = {
        "data.image_dir": config.data.image_dir,
        "data.format_prompt": config.data.format_prompt,
        "reward.reward_function": config.reward.reward_function.rpartition(":")[0] or None,
    }
    for setting, file in settings_of_files(config.data).items():
        if file.image_dir != config.data.image_dir:
            paths[f"{setting}.image_dir"] = file.image_dir
    return {setting: Path(path) for setting, path in paths.items() if path is not None}


def missing_file(setting: str, path: Path) -> str | None:
    """Returns the message about one of `own_files` that is not there; None: it is."""
    if setting.endswith("image_dir"):
        return None if path.is_dir() else f"{setting}: there is no folder {path.absolute()}"
    return None if path.is_file() else f"{setting}: there is no file {path.absolute()}"


def _check_files(config: RunConfig) -> None:
    """Checks the files of a run and the background. Ranks would miss them only after their engines have started."""
    background_color(config.data)
    for source in data_sources(config).values():
        check_source(source)
    for setting, path in own_files(config).items():
        if message := missing_file(setting, path):
            raise ValueError(message)
