"""The rollout engines of a run: their settings, and the start of this rank's engine.

Engines are spread evenly over the hosts (`megatron_vppo/setup/places.py`). With 8 ranks on a host and 2 engines of 2
GPUs each:

    rank     0  1  2  3  4  5  6  7
    leads    0           1
    GPUs     0  0        1  1           of the engine with this number
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_vppo.config.checks import check_device
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.models.config_checks import engine_overrides
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.records import EngineSettings, WeightTransfer
from megatron_vppo.setup.by_machine import by_machine
from megatron_vppo.setup.inputs import RunInputs
from megatron_vppo.setup.places import engine_devices, engine_threads
from megatron_vppo.setup.world import World, engine_seats

VLLM_FP8 = {
    None: "fp8_per_block",
    "blockwise": "fp8_per_block",
    "tensorwise": "fp8_per_tensor",
    "delayed": "fp8_per_tensor",
    "mxfp8": "mxfp8",
}
"""vLLM's scheme that scales weights as the trainer's `fp8.recipe` does."""


@dataclass(frozen=True)
class EnginePlace:
    """The engine that this rank leads, if any, and the number of all."""

    client: RolloutEngine | None
    """None if this rank leads no engine."""
    index: int | None
    """The number of the engine; None if this rank leads none."""
    count: int
    sleeps: bool
    """True if engines give their memory back while the trainer computes; the same on every rank."""
    max_num_seqs: int
    """Responses in flight in an engine."""


def num_engines(config: RunConfig, *, world_size: int, on_cpu: bool) -> int:
    """Returns the number of engines that is set; by default one on CPU, and one per tensor_parallel_size GPUs.

    Raises:
        ValueError: there are fewer trainer ranks than engines to lead, or fewer GPUs than engines need.
    """
    size = config.rollout.tensor_parallel_size
    count = config.rollout.num_engines or (1 if on_cpu else world_size // size)
    if count > world_size or count < 1 or (not on_cpu and count * size > world_size):
        raise ValueError(
            f"rollout.num_engines={config.rollout.num_engines} with rollout.tensor_parallel_size={size} does not fit "
            f"{world_size} trainer ranks; each engine is led by a rank of its own"
        )
    return count


def engines_sleep(config: RunConfig, *, on_cpu: bool) -> bool:
    """Returns True if engines give their memory back while the trainer computes; by default they do on GPUs."""
    asked = config.rollout.free_cache_engine
    return not on_cpu if asked is None else asked


def weight_transfer(config: RunConfig, *, on_cpu: bool) -> WeightTransfer:
    """Returns the way of the weights that `rollout.weight_transfer` means on this machine."""
    asked = config.rollout.weight_transfer
    if asked == "auto":
        return "shm" if on_cpu else "ipc"
    return asked


def unquantized_layers(config: RunConfig, *, language_layers: int) -> tuple[str, ...]:
    """Returns vLLM's names of the layers that stay in 16 bits, as in the trainer.

    These are the vision tower and the language layers at the ends. Embeddings and the vocabulary head are never
    quantised.
    """
    ends = config.fp8.bf16_layers_at_ends
    numbers = {*range(ends), *range(language_layers - ends, language_layers)}
    return ("visual.*", *(f"language_model.model.layers.{number}.*" for number in sorted(numbers)))


def start_engine(
    config: RunConfig, layout: Layout, source: Path, *, world: World, inputs: RunInputs, logs: Path
) -> EnginePlace:
    """Starts this rank's engine, if it leads one, without waiting for it to load."""
    on_cpu = layout.device.type == "cpu"
    check_device(config, on_cpu=on_cpu)
    sleeps, at_once = engines_sleep(config, on_cpu=on_cpu), by_machine(config, on_gpu=not on_cpu).max_num_seqs
    leaders = [seat.leader for seat in engine_seats(config, world.places)]
    if layout.rank not in leaders:
        return EnginePlace(None, None, len(leaders), sleeps, at_once)
    index = leaders.index(layout.rank)
    settings = _engine_settings(config, source, world=world, inputs=inputs, index=index, on_cpu=on_cpu)
    client = RolloutEngine(
        settings, log_path=logs / f"engine_{index}.log", silence_seconds=config.rollout.engine_timeout_seconds
    )
    return EnginePlace(client, index, len(leaders), sleeps, at_once)


def _engine_settings(
    config: RunConfig, source: Path, *, world: World, inputs: RunInputs, index: int, on_cpu: bool
) -> EngineSettings:
    """Collects the settings of engine `index`, for the model of the folder `source`."""
    rollout, values = config.rollout, by_machine(config, on_gpu=not on_cpu)
    seats = engine_seats(config, world.places)
    fair_threads = engine_threads(world.places, seats, index, size=rollout.tensor_parallel_size)
    return EngineSettings(
        model=str(source),
        max_model_len=config.data.max_prompt_length + config.data.max_response_length,
        device="cpu" if on_cpu else "cuda",
        cuda_visible_devices=None if on_cpu else engine_devices(world.places, seats[index]),
        dtype=config.model.dtype,
        tensor_parallel_size=rollout.tensor_parallel_size,
        max_num_seqs=values.max_num_seqs,
        images_per_prompt=rollout.max_images_per_prompt,
        seed=(config.trainer.seed + index) % 2**32,
        cpu_kv_cache_gib=rollout.cpu_kv_cache_gib,
        cpu_threads=rollout.threads_per_engine or fair_threads,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        enforce_eager=values.enforce_eager,
        load_format="empty",
        mm_processor_kwargs=inputs.images.mm_processor_kwargs,
        hf_overrides=engine_overrides(inputs.hf_config),
        can_sleep=engines_sleep(config, on_cpu=on_cpu),
        weight_transfer=weight_transfer(config, on_cpu=on_cpu),
        quantization=None if rollout.quantization is None else VLLM_FP8[config.fp8.recipe],
        unquantized_layers=unquantized_layers(config, language_layers=inputs.hf_config.text_config.num_hidden_layers),
        banned_token_ids=inputs.banned_ids,
    )


def engines_on_gpus(config: RunConfig, *, count: int) -> str:
    """Returns a line for the user: the engines of a run on GPUs, their memory and how much they sample at once."""
    values, size = by_machine(config, on_gpu=True), config.rollout.tensor_parallel_size
    responses = -(-config.data.rollout_batch_size * config.rollout.n // count)
    share, graphs = config.rollout.gpu_memory_utilization, "without" if values.enforce_eager else "with"
    return (
        f"engines: {count} on {size} GPU{'s' * (size > 1)} each, {share:g} of the memory "
        f"(rollout.gpu_memory_utilization), {graphs} CUDA graphs, up to {values.max_num_seqs} responses at once; "
        f"a step trains on {responses} of each"
    )


def await_engines(engine: EnginePlace, *, timeout_seconds: float) -> None:
    """Waits on every rank until every engine has loaded; engines that can sleep are asleep then."""
    if engine.client is not None:
        engine.client.wait_ready(timeout_seconds=timeout_seconds)
        if engine.sleeps:
            engine.client.sleep()
    dist.barrier()
