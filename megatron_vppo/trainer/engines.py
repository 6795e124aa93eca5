"""Which trainer ranks lead a rollout engine, and the engine of this rank, started in the background."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data.images import VisionInputs
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.records import EngineSettings

VISION_TOKENS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
)
"""Configuration fields of the tokens that must not be sampled: the next forward pass would look for their pixels."""


@dataclass(frozen=True)
class EnginePlace:
    client: RolloutEngine | None
    """None on ranks that lead no engine."""
    index: int | None
    count: int


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


def vision_token_ids(hf_config: Any) -> tuple[int, ...]:
    """Of a model's transformers configuration."""
    return tuple(token for name in VISION_TOKENS if (token := getattr(hf_config, name, None)) is not None)


def start_engine(
    config: RunConfig, layout: Layout, source: Path, *, images: VisionInputs, hf_config: Any, logs: Path
) -> EnginePlace:
    """Starts this rank's engine, if it leads one, without waiting: it loads while the trainer builds its model."""
    on_cpu = layout.device.type == "cpu"
    count = num_engines(config, world_size=layout.world_size, on_cpu=on_cpu)
    stride = layout.world_size // count
    index, offset = divmod(layout.rank, stride)
    if offset or index >= count:
        return EnginePlace(None, None, count)
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
        banned_token_ids=vision_token_ids(hf_config),
    )
    client = RolloutEngine(settings, log_path=logs / f"engine_{index}.log")
    return EnginePlace(client, index, count)
