"""What a plan is made for, and one layout of it with the memory that it takes in each phase."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from megatron_vppo.config.choices import MEMORY_PARTS, MemoryPart, Recompute
from megatron_vppo.planning.activations import MicroBatch, StageActivations
from megatron_vppo.planning.state import StateBytes

GIB = 2**30
DTYPE_BYTES = 2
"""bfloat16."""
TRAINER_RESERVE = 3 * GIB
"""CUDA context, NCCL's buffers, gaps of the allocator. Assumed; nobody has measured it."""


@dataclass(frozen=True)
class Workload:
    """The longest rows of a run. All of a micro-batch are taken as that long."""

    prompt_tokens: int
    """Image tokens included."""
    response_tokens: int
    images_per_row: int
    image_tokens: int
    """Of one picture, merged."""
    rows_per_micro_batch: int
    """Of the update and of the scoring pass alike."""
    responses_per_prompt: int
    """Rows of a group are neighbours and share their pictures, until the scoring pass perturbs each row's own."""
    head_chunk_tokens: int

    def __post_init__(self) -> None:
        pictures = self.images_per_row * self.image_tokens
        if pictures >= self.prompt_tokens:
            raise ValueError(
                f"{self.images_per_row} pictures of {self.image_tokens} tokens do not fit a prompt of "
                f"{self.prompt_tokens}; raise --prompt-tokens or lower --image-tokens"
            )

    @property
    def sequence_tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens

    def micro_batch(self, *, merge: int, context: int, both_views: bool) -> MicroBatch:
        """Pictures are dealt to the context-parallel ranks; the patches are those of the rank with the most."""
        rows = self.rows_per_micro_batch
        groups = 1 + (rows - 1 + self.responses_per_prompt - 1) // self.responses_per_prompt
        views, pictures = (2 * rows, groups + rows) if both_views else (rows, groups)
        return MicroBatch(
            tokens=views * (self.sequence_tokens - 1),
            response_tokens=views * self.response_tokens,
            image_tokens=views * self.images_per_row * self.image_tokens,
            patches=-(-min(pictures, views) * self.images_per_row // context) * self.image_tokens * merge**2,
        )


@dataclass(frozen=True)
class Cluster:
    gpus: int
    gpu_bytes: int
    gpus_per_node: int
    """Of a full node; where there are fewer GPUs in all, they are on one."""

    @property
    def node_gpus(self) -> int:
        return min(self.gpus, self.gpus_per_node)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Of groups that stay within a node and leave no GPU over."""
        return divisors(math.gcd(self.gpus, self.node_gpus))


def divisors(number: int) -> tuple[int, ...]:
    return tuple(size for size in range(1, number + 1) if number % size == 0)


@dataclass(frozen=True)
class EngineShare:
    tensor: int
    utilization: float
    weights: int
    answers: int
    """Sequences of full length whose keys and values it holds at once."""


@dataclass(frozen=True)
class Stage:
    """The memory of a rank of one pipeline stage."""

    state: StateBytes
    activations: StageActivations

    @property
    def computing(self) -> int:
        return self.state.total + self.activations.total


@dataclass(frozen=True)
class Candidate:
    """One layout, and its memory in bytes. Which stage is fullest differs from phase to phase: while engines sample,
    activations are gone, and so is what is offloaded.
    """

    tensor: int
    pipeline: int
    context: int
    data: int
    layers: tuple[int, ...]
    """Of each pipeline stage."""
    recompute: Recompute
    stages: tuple[Stage, ...]
    """Those that may be the fullest in any phase."""
    offload: frozenset[MemoryPart]
    """What is not on the GPU while engines sample."""
    engine: EngineShare | None
    """None: what the trainer leaves is not enough for an engine, or the trainer alone is too much."""

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1

    @property
    def replica_gpus(self) -> int:
        return self.tensor * self.pipeline * self.context

    @property
    def fullest(self) -> Stage:
        """While the trainer computes."""
        return max(self.stages, key=lambda stage: stage.computing)

    @property
    def trainer_bytes(self) -> int:
        """While it computes."""
        return self.fullest.computing + TRAINER_RESERVE

    @property
    def sampling_bytes(self) -> int:
        """Of the trainer, while engines sample."""
        return max(self._held(stage.state, MEMORY_PARTS) for stage in self.stages) + TRAINER_RESERVE

    @property
    def sync_bytes(self) -> int:
        """Of the trainer, while its weights go to the engines; without the buffers they go in."""
        held = (stage.state.weights + self._held(stage.state, ("grads", "optimizer")) for stage in self.stages)
        return max(held) + TRAINER_RESERVE

    def _held(self, state: StateBytes, parts: Collection[MemoryPart]) -> int:
        sizes = {"params": state.weights, "grads": state.gradients, "optimizer": state.optimizer}
        return sum(sizes[part] for part in parts if part not in self.offload)
