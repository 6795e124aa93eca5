"""Which trainer ranks lead a rollout engine, and the engine of this rank, started in the background."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vppo.config.checks import check_device
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data.images import VisionInputs
from megatron_vppo.models.hf_config import vision_token_ids
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.records import EngineSettings, WeightTransfer

VLLM_FP8 = {
    None: "fp8_per_block",
    "blockwise": "fp8_per_block",
    "tensorwise": "fp8_per_tensor",
    "delayed": "fp8_per_tensor",
    "mxfp8": "mxfp8",
}
"""The trainer's `fp8.recipe` -> vLLM's scheme that scales weights alike."""


@dataclass(frozen=True)
class EnginePlace:
    client: RolloutEngine | None
    """None on ranks that lead no engine."""
    index: int | None
    count: int
    sleeps: bool
    """Engines give their memory back while the trainer computes; the same on every rank."""


def num_engines(config: RunConfig, *, world_size: int, on_cpu: bool) -> int:
    """As configured; by default one on a CPU machine, and on GPUs one per tensor_parallel_size devices.

    Raises:
        ValueError: more engines than trainer ranks to lead them, or devices that do not divide.
    """
    size = config.rollout.tensor_parallel_size
    count = config.rollout.num_engines or (1 if on_cpu else world_size // size)
    if count > world_size or count < 1 or (not on_cpu and count * size > world_size):
        raise ValueError(
            f"rollout.num_engines={config.rollout.num_engines} with rollout.tensor_parallel_size={size} does not fit "
            f"{world_size} trainer ranks; each engine is led by a rank of its own"
        )
    return count


def engine_devices(visible: str | None, *, device_count: int, local_rank: int, size: int) -> str:
    """CUDA_VISIBLE_DEVICES of an engine: the GPU of the rank that leads it, and those of the ranks after it.

    Args:
        visible: the trainer's own CUDA_VISIBLE_DEVICES; None: not set.
        device_count: GPUs that the trainer sees.
        local_rank: the leader's number on its machine, which is that of its GPU among the visible ones.
        size: GPUs of an engine.

    Raises:
        ValueError: the engine would reach over the end of the machine.
    """
    devices = visible.split(",") if visible else [str(number) for number in range(device_count)]
    mine = devices[local_rank : local_rank + size]
    if len(mine) < size:
        raise ValueError(
            f"rollout.tensor_parallel_size={size}: an engine led by local rank {local_rank} would need GPUs "
            f"{local_rank} to {local_rank + size - 1} of a machine that has {len(devices)}; take a divisor of these"
        )
    return ",".join(mine)


def engines_sleep(config: RunConfig, *, on_cpu: bool) -> bool:
    asked = config.rollout.free_cache_engine
    return not on_cpu if asked is None else asked


def weight_transfer(config: RunConfig, *, on_cpu: bool) -> WeightTransfer:
    asked = config.rollout.weight_transfer
    if asked == "auto":
        return "shm" if on_cpu else "ipc"
    return asked


def unquantized_layers(config: RunConfig, *, language_layers: int) -> tuple[str, ...]:
    """vLLM's names of what stays in 16 bits, as in the trainer: the vision tower and layers at the ends. Embeddings and
    vocabulary head are never quantised.
    """
    ends = config.fp8.bf16_layers_at_ends
    numbers = {*range(ends), *range(language_layers - ends, language_layers)}
    return ("visual.*", *(f"language_model.model.layers.{number}.*" for number in sorted(numbers)))


def start_engine(
    config: RunConfig, layout: Layout, source: Path, *, images: VisionInputs, hf_config: Any, logs: Path
) -> EnginePlace:
    """Starts this rank's engine, if it leads one, without waiting for it to load."""
    on_cpu = layout.device.type == "cpu"
    check_device(config, on_cpu=on_cpu)
    sleeps = engines_sleep(config, on_cpu=on_cpu)
    count = num_engines(config, world_size=layout.world_size, on_cpu=on_cpu)
    stride = layout.world_size // count
    index, offset = divmod(layout.rank, stride)
    if offset or index >= count:
        return EnginePlace(None, None, count, sleeps)
    cores = len(os.sched_getaffinity(0))
    settings = EngineSettings(
        model=str(source),
        max_model_len=config.data.max_prompt_length + config.data.max_response_length,
        device="cpu" if on_cpu else "cuda",
        cuda_visible_devices=None
        if on_cpu
        else engine_devices(
            os.environ.get("CUDA_VISIBLE_DEVICES"),
            device_count=torch.cuda.device_count(),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            size=config.rollout.tensor_parallel_size,
        ),
        dtype=config.model.dtype,
        tensor_parallel_size=config.rollout.tensor_parallel_size,
        max_num_seqs=config.rollout.max_num_seqs,
        images_per_prompt=config.rollout.max_images_per_prompt,
        seed=config.trainer.seed + index,
        cpu_kv_cache_gib=config.rollout.cpu_kv_cache_gib,
        cpu_threads=config.rollout.threads_per_engine or max(1, cores // (count * config.rollout.tensor_parallel_size)),
        gpu_memory_utilization=config.rollout.gpu_memory_utilization,
        enforce_eager=config.rollout.enforce_eager,
        load_format="empty",
        mm_processor_kwargs=images.mm_processor_kwargs,
        can_sleep=sleeps,
        weight_transfer=weight_transfer(config, on_cpu=on_cpu),
        quantization=None if config.rollout.quantization is None else VLLM_FP8[config.fp8.recipe],
        unquantized_layers=unquantized_layers(config, language_layers=hf_config.text_config.num_hidden_layers),
        banned_token_ids=vision_token_ids(hf_config),
    )
    client = RolloutEngine(settings, log_path=logs / f"engine_{index}.log")
    return EnginePlace(client, index, count, sleeps)


def await_engines(engine: EnginePlace, *, timeout_seconds: float) -> None:
    """Returns on every rank when every engine has loaded, and sleeps if it can."""
    if engine.client is not None:
        engine.client.wait_ready(timeout_seconds=timeout_seconds)
        if engine.sleeps:
            engine.client.sleep()
    dist.barrier()
