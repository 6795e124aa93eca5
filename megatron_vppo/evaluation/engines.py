"""The engines of an evaluation: they read the model's folder themselves, and nothing else is on their devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from megatron_vppo.config.choices import Dtype
from megatron_vppo.evaluation.inputs import EvalInputs
from megatron_vppo.evaluation.settings import EvalConfig
from megatron_vppo.models.config_checks import engine_overrides
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.models.model_files import ModelFiles
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.records import EngineSettings, SamplingSettings
from megatron_vppo.setup.by_machine import ON_CPU, ON_GPU
from megatron_vppo.setup.engine_limits import check_memory, check_sampling
from megatron_vppo.setup.places import Place


def weights_dtype(config: EvalConfig, hf_config: HfConfig) -> Dtype:
    """Returns the number format that engines compute in."""
    return config.model.dtype or ("float32" if hf_config.dtype == torch.float32 else "bfloat16")


def engine_places(config: EvalConfig, place: Place) -> list[str | None]:
    """Returns CUDA_VISIBLE_DEVICES of each engine; None for those of a machine without GPUs.

    Args:
        place: this process's.

    Raises:
        ValueError: there are fewer GPUs than the engines need.
    """
    size, asked = config.rollout.tensor_parallel_size, config.rollout.num_engines
    if not place.gpu_ids:
        return [None] * (asked or 1)
    count = len(place.gpu_ids) // size if asked is None else asked
    if count * size > len(place.gpu_ids) or count < 1:
        raise ValueError(
            f"rollout.num_engines={asked} with rollout.tensor_parallel_size={size} needs {max(1, count) * size} GPUs, "
            f"and {len(place.gpu_ids)} are seen; lower one of the two"
        )
    return [",".join(place.gpu_ids[number * size : (number + 1) * size]) for number in range(count)]


def check_engines(config: EvalConfig, hf_config: HfConfig, *, on_gpu: bool) -> None:
    """Raises ValueError, with the numbers and what to set, for settings with which no engine can start or sample."""
    check_sampling(config.rollout, config.data, hf_config, top_k=config.rollout.top_k, mode="smart")
    check_memory(
        config.rollout,
        config.data,
        hf_config,
        dtype=weights_dtype(config, hf_config),
        quantized=False,
        gpu_bytes=torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
    )


def engine_settings(
    config: EvalConfig, folder: Path, files: ModelFiles, inputs: EvalInputs, place: Place
) -> list[EngineSettings]:
    """Collects the settings of all engines. Raises as `engine_places` does."""
    rollout, data, devices = config.rollout, config.data, engine_places(config, place)
    machine = ON_GPU if place.gpu_ids else ON_CPU
    fair_threads = max(1, len(place.cores) // (len(devices) * rollout.tensor_parallel_size))
    return [
        EngineSettings(
            model=str(folder),
            max_model_len=data.max_prompt_length + data.max_response_length,
            device="cuda" if place.gpu_ids else "cpu",
            cuda_visible_devices=visible,
            dtype=weights_dtype(config, files.hf_config),
            tensor_parallel_size=rollout.tensor_parallel_size,
            max_num_seqs=rollout.max_num_seqs or machine.max_num_seqs,
            images_per_prompt=rollout.max_images_per_prompt,
            seed=(config.seed + number) % 2**32,
            cpu_kv_cache_gib=rollout.cpu_kv_cache_gib,
            cpu_threads=rollout.threads_per_engine or fair_threads,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            enforce_eager=machine.enforce_eager if rollout.enforce_eager is None else rollout.enforce_eager,
            mm_processor_kwargs=inputs.images.mm_processor_kwargs,
            hf_overrides=engine_overrides(files.hf_config),
            banned_token_ids=inputs.banned_ids,
        )
        for number, visible in enumerate(devices)
    ]


def eval_sampling(config: EvalConfig, eos_ids: tuple[int, ...]) -> SamplingSettings:
    """Returns the distribution that responses are sampled from."""
    rollout = config.rollout
    return SamplingSettings(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=config.data.max_response_length,
        stop_token_ids=eos_ids,
    )


@contextmanager
def running(
    settings: Sequence[EngineSettings], *, logs: Path, start_seconds: float, silence_seconds: float
) -> Iterator[list[RolloutEngine]]:
    """Starts the engines at once, waits until all have loaded, and ends them with the block.

    Args:
        start_seconds: the time that each has for it.
        silence_seconds: the time without a sign of progress after which an engine counts as lost.

    Raises RuntimeError, with the end of its log, if one does not load.
    """
    with ExitStack() as stack:
        engines = [
            stack.enter_context(
                RolloutEngine(one, log_path=logs / f"engine_{number}.log", silence_seconds=silence_seconds)
            )
            for number, one in enumerate(settings)
        ]
        for engine in engines:
            engine.wait_ready(timeout_seconds=start_seconds)
        yield engines
