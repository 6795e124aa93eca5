"""The share of a GPU that the trainer leaves to a rollout engine, and the numbers of GPUs that an engine can have.

The number of GPUs of an engine is its tensor-parallel size (`--rollout-tp`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vppo.models.hf_config import HfConfig, kv_bytes_per_token, vllm_split_refusal
from megatron_vppo.planning.activations import LanguageSizes
from megatron_vppo.planning.candidate import DTYPE_BYTES, GIB, Candidate, Cluster, EngineShare, PlanRequest
from megatron_vppo.planning.state import engine_weight_bytes

ENGINE_RESERVE = 3 * GIB
"""An engine's own CUDA context, and the working memory of its longest prefill. An assumption, not a measurement."""
SLEEPING_ENGINE = GIB
"""The CUDA context, which a sleeping engine still holds. An assumption as well."""
TRANSFER_BUFFER = GIB // 4
"""The least bytes of each of the two buffers through which weights are sent to an engine; more if one tensor is larger.
Where more memory is free the buffers are larger (`buffer_capacity` in rollout/transfer/bundle.py)."""
MOST_UTILIZATION = 0.9
"""The largest `rollout.gpu_memory_utilization` that is planned."""


@dataclass(frozen=True)
class EngineModel:
    """The properties of a model that decide the memory of its engines."""

    hf_config: HfConfig
    language: LanguageSizes
    parameters: int

    @property
    def largest_tensor_bytes(self) -> int:
        """Bytes of the embedding, which is the largest tensor of these models."""
        return self.language.vocabulary * self.language.layer.hidden * DTYPE_BYTES


def engine_sizes(model: EngineModel, cluster: Cluster) -> tuple[int, ...]:
    """Lists the numbers of GPUs that an engine may have.

    They fit on one node, leave no GPU of the cluster over, and vLLM can split the model over them.
    """
    return tuple(size for size in cluster.group_sizes if vllm_split_refusal(model.hf_config, size) is None)


def check_engine_size(model: EngineModel, cluster: Cluster, size: int) -> None:
    """Raises ValueError, with the possible sizes, unless `size` is one of `engine_sizes`."""
    unsplittable = vllm_split_refusal(model.hf_config, size)
    if size not in cluster.group_sizes:
        nodes = f" in nodes of {cluster.node_gpus}" if cluster.gpus > cluster.node_gpus else ""
        reason = f"{cluster.gpus} GPUs{nodes} do not divide into engines of {size}"
    elif unsplittable is not None:
        reason = f"{unsplittable} cannot be split over the {size} GPUs of an engine"
    else:
        return
    raise ValueError(f"--rollout-tp {size}: {reason}; possible: {', '.join(map(str, engine_sizes(model, cluster)))}")


def engine_share(
    model: EngineModel, trainer: Candidate, *, request: PlanRequest, sizes: tuple[int, ...]
) -> EngineShare | None:
    """Finds the smallest engine that fits, and its share of each GPU.

    While engines sample, an engine gets everything that the fullest trainer rank leaves free, up to MOST_UTILIZATION.
    Returns None if no engine's KV cache holds `request.engine_sequences` sequences of full length. Returns None as well
    if trainer and engine do not fit together while the trainer computes, when engines sleep, or while it sends weights.

    Args:
        sizes: GPUs that an engine may have, smallest first.
    """
    gpu_bytes = request.cluster.gpu_bytes
    if trainer.trainer_bytes + SLEEPING_ENGINE > gpu_bytes:
        return None
    free = gpu_bytes - trainer.sampling_bytes
    buffers = 2 * max(TRANSFER_BUFFER, model.largest_tensor_bytes)
    utilization = min(MOST_UTILIZATION, math.floor(100 * free / gpu_bytes) / 100)
    for size in sizes:
        weights = engine_weight_bytes(model.parameters, tensor=size, dtype_bytes=DTYPE_BYTES)
        per_token = kv_bytes_per_token(model.hf_config, ranks=size, dtype_bytes=DTYPE_BYTES)
        kv_cache = utilization * gpu_bytes - weights - ENGINE_RESERVE
        sequences = int(kv_cache / (per_token * request.workload.sequence_tokens))
        sync_fits = trainer.sync_bytes + weights + ENGINE_RESERVE + buffers <= gpu_bytes
        if sequences >= request.engine_sequences and sync_fits:
            return EngineShare(tensor=size, utilization=utilization, weights=weights, sequences=sequences)
    return None
