"""What a plan is made for, and one layout of it with the memory of its fullest rank."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megatron_vppo.models.options import Recompute
from megatron_vppo.parallel.activations import MicroBatch, StageActivations
from megatron_vppo.parallel.memory import StateBytes
from megatron_vppo.parallel.offload import PARTS
from megatron_vppo.parallel.offload import Part as OffloadPart

TRAINER_RESERVE = 3 * 2**30
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


@dataclass(frozen=True)
class EngineShare:
    tensor: int
    utilization: float
    weights: int
    answers: int
    """Sequences of full length whose keys and values it holds at once."""


@dataclass(frozen=True)
class Candidate:
    """One layout, and the memory of its fullest rank in bytes."""

    tensor: int
    pipeline: int
    context: int
    data: int
    layers: tuple[int, ...]
    """Of each pipeline stage."""
    recompute: Recompute
    state: StateBytes
    offload: frozenset[OffloadPart]
    """What is not on the GPU while engines sample."""
    activations: StageActivations
    engine: EngineShare | None
    """None: what the trainer leaves is not enough for an engine, or the trainer alone is too much."""

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1

    @property
    def replica_gpus(self) -> int:
        return self.tensor * self.pipeline * self.context

    @property
    def trainer_bytes(self) -> int:
        """While it computes."""
        return self.state.total + self.activations.total + TRAINER_RESERVE

    @property
    def sampling_bytes(self) -> int:
        """Of the trainer, while engines sample."""
        return self._held(PARTS) + TRAINER_RESERVE

    @property
    def sync_bytes(self) -> int:
        """Of the trainer, while its weights go to the engines; without the buffers they go in."""
        return self.state.weights + self._held(("grads", "optimizer")) + TRAINER_RESERVE

    def _held(self, parts: Collection[OffloadPart]) -> int:
        sizes = {"params": self.state.weights, "grads": self.state.gradients, "optimizer": self.state.optimizer}
        return sum(sizes[part] for part in parts if part not in self.offload)
