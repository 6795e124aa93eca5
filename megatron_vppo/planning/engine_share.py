"""What a rollout engine gets of the GPUs that it shares with the trainer, and over how many of them it can be split."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vppo.models.hf_config import HfConfig, vllm_split_refusal
from megatron_vppo.planning.activations import LanguageSizes
from megatron_vppo.planning.candidate import DTYPE_BYTES, GIB, Candidate, Cluster, EngineShare, Workload
from megatron_vppo.planning.state import engine_weight_bytes, kv_bytes_per_token

ENGINE_RESERVE = 3 * GIB
"""An engine's own CUDA context and what its longest prefill needs for a moment. Assumed too."""
SLEEPING_ENGINE = GIB
"""What an engine that sleeps still holds: its CUDA context. Assumed as well."""
TRANSFER_BUFFER = GIB // 4
"""Each of the two that weights reach an engine in, unless one tensor is larger."""
MOST_UTILIZATION = 0.9


@dataclass(frozen=True)
class EngineModel:
    """The numbers of a model that its engines depend on."""

    hf_config: HfConfig
    language: LanguageSizes
    parameters: int

    @property
    def largest_tensor_bytes(self) -> int:
        return self.language.vocabulary * self.language.layer.hidden * DTYPE_BYTES


def engine_sizes(model: EngineModel, cluster: Cluster) -> tuple[int, ...]:
    """GPUs that an engine may have: no GPU is left over, none lies on another node, and vLLM can split the model."""
    return tuple(size for size in cluster.group_sizes if vllm_split_refusal(model.hf_config, size) is None)


def check_engine_size(model: EngineModel, cluster: Cluster, size: int) -> None:
    """Raises ValueError unless it is one of `engine_sizes`, with these."""
    what = vllm_split_refusal(model.hf_config, size)
    if size not in cluster.group_sizes:
        nodes = f" in nodes of {cluster.node_gpus}" if cluster.gpus > cluster.node_gpus else ""
        reason = f"{cluster.gpus} GPUs{nodes} do not divide into engines of {size}"
    elif what is not None:
        reason = f"{what} cannot be split over the {size} GPUs of an engine"
    else:
        return
    raise ValueError(f"--rollout-tp {size}: {reason}; possible: {', '.join(map(str, engine_sizes(model, cluster)))}")


def engine_share(
    model: EngineModel,
    trainer: Candidate,
    *,
    cluster: Cluster,
    workload: Workload,
    sizes: tuple[int, ...],
    answers: int,
) -> EngineShare | None:
    """What an engine of the first of the `sizes` that will do gets of each GPU: all the bytes that are free while it
    samples, on the GPU where the trainer leaves least. None where that is not enough, where the trainer does not fit
    while engines sleep, or the two do not while weights are sent.
    """
    if trainer.trainer_bytes + SLEEPING_ENGINE > cluster.gpu_bytes:
        return None
    free = cluster.gpu_bytes - trainer.sampling_bytes
    buffers = 2 * max(TRANSFER_BUFFER, model.largest_tensor_bytes)
    utilization = min(MOST_UTILIZATION, math.floor(100 * free / cluster.gpu_bytes) / 100)
    layer = model.language.layer
    for size in sizes:
        weights = engine_weight_bytes(model.parameters, tensor=size, dtype_bytes=DTYPE_BYTES)
        per_token = kv_bytes_per_token(
            layers=model.language.layers,
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            tensor=size,
            dtype_bytes=DTYPE_BYTES,
        )
        room = utilization * cluster.gpu_bytes - weights - ENGINE_RESERVE
        held = int(room / (per_token * workload.sequence_tokens))
        syncs = trainer.sync_bytes + weights + ENGINE_RESERVE + buffers <= cluster.gpu_bytes
        if held >= answers and syncs:
            return EngineShare(tensor=size, utilization=utilization, weights=weights, answers=held)
    return None
