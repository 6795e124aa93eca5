"""The input of a plan, and one layout with the memory that it takes in each phase."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from megatron_vppo.config.choices import MEMORY_PARTS, MemoryPart, ModelPart, Recompute
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.planning.activations import MicroBatch, StageActivations
from megatron_vppo.planning.state import StateBytes

GIB = 2**30
DTYPE_BYTES = 2
"""The bytes of a weight: bfloat16."""
TRAINER_RESERVE = 3 * GIB
"""The CUDA context, NCCL's buffers and the gaps of the allocator. An assumption that nobody has measured."""


# --- The input --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """The longest rows of a run. A plan assumes that all rows of a micro-batch are as long."""

    prompt_tokens: int
    """The longest prompt, image tokens included."""
    response_tokens: int
    images_per_row: int
    image_tokens: int
    """The language model's tokens of one image, after the vision tower has merged patches."""
    rows_per_micro_batch: int
    """Responses of a micro-batch, in the update and in scoring."""
    responses_per_prompt: int
    """Rows of a group are neighbours and share their images. In the perturbed view, each row has images of its own."""
    head_chunk_tokens: int
    scores_both_views: bool = True
    updates_both_views: bool = False
    """True if the perturbed view is read in scoring, and in the update: algorithm.perception_loss_coef."""

    def __post_init__(self) -> None:
        tokens = self.images_per_row * self.image_tokens
        if tokens >= self.prompt_tokens:
            raise ValueError(
                f"{self.images_per_row} images of {self.image_tokens} tokens do not fit a prompt of "
                f"{self.prompt_tokens} tokens; raise --prompt-tokens or lower --image-tokens"
            )

    @property
    def sequence_tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens

    def micro_batch(self, *, merge: int, context: int, both_views: bool) -> MicroBatch:
        """Counts the tokens and patches of one micro-batch.

        Args:
            merge: `spatial_merge_size`: an image token stands for merge x merge patches.
            context: context-parallel ranks. They share out the images; the patches are those of the rank with the most.
            both_views: the rows stand twice in it, with original and with perturbed images.
        """
        rows = self.rows_per_micro_batch
        # The most groups that neighbouring rows can touch: the first row may be the last of its group.
        groups = 1 + (rows - 1 + self.responses_per_prompt - 1) // self.responses_per_prompt
        # Rows that bring images of their own: one per group, and in the perturbed view each.
        views, image_rows = (2 * rows, groups + rows) if both_views else (rows, groups)
        return MicroBatch(
            tokens=views * (self.sequence_tokens - 1),
            response_tokens=views * self.response_tokens,
            image_tokens=views * self.images_per_row * self.image_tokens,
            patches=-(-min(image_rows, views) * self.images_per_row // context) * self.image_tokens * merge**2,
        )


@dataclass(frozen=True)
class Cluster:
    gpus: int
    """All GPUs, of all nodes."""
    gpu_bytes: int
    gpus_per_node: int
    """GPUs of a full node. A cluster with fewer GPUs is one node."""

    @property
    def node_gpus(self) -> int:
        return min(self.gpus, self.gpus_per_node)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Sizes of GPU groups that fit a node and divide the cluster."""
        return divisors(math.gcd(self.gpus, self.node_gpus))


def divisors(number: int) -> tuple[int, ...]:
    """Lists the divisors, rising."""
    low = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return tuple(sorted({*low, *(number // size for size in low)}))


@dataclass(frozen=True)
class PlanRequest:
    hf_config: HfConfig
    cluster: Cluster
    workload: Workload
    engine_sequences: int
    """Sequences of full length, prompt and response, that an engine must hold at once."""
    rollout_tensor: int | None = None
    """GPUs per engine; None: the fewest that leave room for `engine_sequences`."""
    frozen: frozenset[ModelPart] = frozenset()
    """The parts of the model that are not trained."""
    offload: frozenset[MemoryPart] = frozenset()
    """The trainer state that waits in host memory while engines sample."""


# --- One layout -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineShare:
    """A rollout engine that shares its GPUs with the trainer."""

    tensor: int
    """GPUs of the engine."""
    utilization: float
    """Its share of each of them while it samples: rollout.gpu_memory_utilization."""
    weights: int
    """Bytes of its weights on each GPU."""
    sequences: int
    """Sequences of full length that its KV cache holds at once."""


@dataclass(frozen=True)
class StageMemory:
    """The memory of a rank of one pipeline stage."""

    state: StateBytes
    activations: StageActivations

    @property
    def computing(self) -> int:
        return self.state.total + self.activations.total


@dataclass(frozen=True)
class Candidate:
    """One layout and its memory in bytes.

    Each phase has its own fullest stage: while engines sample, activations are gone, and so is offloaded state.
    """

    tensor: int
    pipeline: int
    context: int
    data: int
    layers: tuple[int, ...]
    """The language layers of each pipeline stage."""
    recompute: Recompute
    stages: tuple[StageMemory, ...]
    """The stages that may be the fullest in any phase."""
    offload: frozenset[MemoryPart]
    """The trainer state that is not on the GPU while engines sample."""
    engine: EngineShare | None
    """None if the layout does not fit: the trainer alone needs too much, or it leaves too little for an engine."""

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1

    @property
    def replica_gpus(self) -> int:
        return self.tensor * self.pipeline * self.context

    @property
    def fullest(self) -> StageMemory:
        """The fullest stage while the trainer computes."""
        return max(self.stages, key=lambda stage: stage.computing)

    @property
    def trainer_bytes(self) -> int:
        """The trainer's memory on the fullest stage while it computes, with its reserve."""
        return self.fullest.computing + TRAINER_RESERVE

    @property
    def sampling_bytes(self) -> int:
        """The trainer's memory on the fullest stage while engines sample, with its reserve."""
        return max(self._held(stage.state, MEMORY_PARTS) for stage in self.stages) + TRAINER_RESERVE

    @property
    def sync_bytes(self) -> int:
        """The trainer's memory on the fullest stage while it sends weights to the engines, with its reserve.

        The weights are on the GPU even if they are offloaded while engines sample. Transfer buffers are not counted.
        """
        held = (stage.state.weights + self._held(stage.state, ("grads", "optimizer")) for stage in self.stages)
        return max(held) + TRAINER_RESERVE

    def _held(self, state: StateBytes, parts: Collection[MemoryPart]) -> int:
        """Counts the bytes of those `parts` that are not offloaded."""
        sizes = {"params": state.weights, "grads": state.gradients, "optimizer": state.optimizer}
        return sum(sizes[part] for part in parts if part not in self.offload)
