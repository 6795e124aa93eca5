"""Which parallel layouts of a model fit the GPUs, and what takes their memory.

Trainer and engine share each GPU by turns (placement.py): every phase has to fit, not their sum.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_vppo.models.families import family_of, weight_map
from megatron_vppo.models.options import Part, Recompute
from megatron_vppo.models.transformer_config import HfConfig, check_tensor_parallel, stage_layers
from megatron_vppo.parallel.activations import (
    Kernels,
    MicroBatch,
    Split,
    StageActivations,
    score_activations,
    update_activations,
)
from megatron_vppo.parallel.memory import StateBytes, engine_weight_bytes, kv_bytes_per_token, state_bytes
from megatron_vppo.parallel.offload import PARTS
from megatron_vppo.parallel.offload import Part as OffloadPart
from megatron_vppo.parallel.sizes import language_sizes, parameter_count, stage_values, vision_sizes

GIB = 2**30
DTYPE_BYTES = 2
"""bfloat16."""
TRAINER_RESERVE = 3 * GIB
"""CUDA context, NCCL's buffers, gaps of the allocator. Assumed; nobody has measured it."""
ENGINE_RESERVE = 3 * GIB
"""An engine's own CUDA context and what its longest prefill needs for a moment. Assumed too."""
SLEEPING_ENGINE = GIB
"""What an engine that sleeps still holds: its CUDA context. Assumed as well."""
TRANSFER_BUFFER = GIB // 4
"""Each of the two that weights reach an engine in, unless one tensor is larger."""
MOST_UTILIZATION = 0.9
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
"""In the order of their cost."""


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


@dataclass(frozen=True)
class Plan:
    parameters: int
    fitting: tuple[Candidate, ...]
    """Best first."""
    closest: Candidate | None
    """Of those that do not fit, the one with the smallest trainer."""
    refused: tuple[str, ...]
    """Why layouts that the GPUs would allow are not possible for the model."""


def make_plan(
    hf_config: HfConfig,
    *,
    cluster: Cluster,
    workload: Workload,
    rollout_tensor: int | None,
    answers: int,
    frozen: frozenset[Part] = frozenset(),
    offload: frozenset[OffloadPart] = frozenset(),
) -> Plan:
    """Every layout of the cluster's GPUs; of those that differ in recomputation only, the cheapest that fits.

    Best first: a replica (tensor x pipeline x context) within one node, then without recomputation, then with the
    smallest replica, then with the shortest pipeline.

    Args:
        rollout_tensor: GPUs per engine; None: the fewest that leave room for `answers`.
        answers: sequences of full length that an engine has to hold at once.
        frozen: parts that are not trained.
        offload: trainer state that waits in host memory while engines sample.
    """
    model = _Model(hf_config, frozen=frozen)
    sizes, refused = _layouts(model, cluster=cluster)
    fitting, others = [], []
    for tensor, pipeline, context in sizes:
        for recompute in RECOMPUTES:
            candidate = model.candidate(
                tensor=tensor,
                pipeline=pipeline,
                context=context,
                data=cluster.gpus // (tensor * pipeline * context),
                recompute=recompute,
                workload=workload,
                offload=offload,
            )
            share = _engine_share(
                model, candidate, cluster=cluster, workload=workload, tensor=rollout_tensor, answers=answers
            )
            if share is not None:
                fitting.append(replace(candidate, engine=share))
                break
            others.append(candidate)
    fitting.sort(
        key=lambda c: (
            c.replica_gpus > cluster.gpus_per_node,
            RECOMPUTES.index(c.recompute),
            c.replica_gpus,
            c.pipeline,
        )
    )
    return Plan(
        parameters=model.parameters,
        fitting=tuple(fitting),
        closest=min(others, key=lambda c: c.trainer_bytes, default=None),
        refused=refused,
    )


class _Model:
    """A configuration's numbers, worked out once for all layouts."""

    def __init__(self, hf_config: HfConfig, *, frozen: frozenset[Part]) -> None:
        self.hf_config, self.frozen = hf_config, frozen
        self.family = family_of(hf_config)
        self.entries = weight_map(hf_config, family=self.family)
        self.parameters = parameter_count(self.entries)
        self.language, self.vision = language_sizes(hf_config), vision_sizes(hf_config)
        self.merge = hf_config.vision_config.spatial_merge_size
        text = hf_config.text_config
        self.largest_tensor_bytes = text.vocab_size * text.hidden_size * DTYPE_BYTES

    def stage_layers(self, pipeline: int) -> tuple[int, ...]:
        """Evenly, or nearly; ValueError where the model does not allow it."""
        layers = self.hf_config.text_config.num_hidden_layers
        split = near_even(layers, pipeline) if layers % pipeline and layers > pipeline else None
        return stage_layers(self.hf_config, family=self.family, pipeline=pipeline, pipeline_layers=split)

    def candidate(
        self,
        *,
        tensor: int,
        pipeline: int,
        context: int,
        data: int,
        recompute: Recompute,
        workload: Workload,
        offload: frozenset[OffloadPart],
    ) -> Candidate:
        """The layout with the memory of its fullest stage: the first, the second or the last, as those between differ
        only in holding fewer micro-batches.
        """
        split = Split(tensor=tensor, context=context, sequence_parallel=tensor > 1)
        layers = self.stage_layers(pipeline)
        stages = []
        for stage in sorted({0, min(1, pipeline - 1), pipeline - 1}):
            values = stage_values(self.entries, stage_layers=layers, stage=stage, tensor=tensor, frozen=self.frozen)
            state = state_bytes(values, dtype_bytes=DTYPE_BYTES, replicas=data * context, distributed=True)
            stages.append((state, self._activations(stage, layers, split, recompute, workload)))
        state, activations = max(stages, key=lambda pair: pair[0].total + pair[1].total)
        return Candidate(
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            data=data,
            layers=layers,
            recompute=recompute,
            state=state,
            offload=offload,
            activations=activations,
            engine=None,
        )

    def _activations(
        self, stage: int, layers: tuple[int, ...], split: Split, recompute: Recompute, workload: Workload
    ) -> StageActivations:
        """Of the update or of the scoring pass, whichever needs more."""
        shared: dict[str, Any] = {
            "stage": stage,
            "split": split,
            "kernels": Kernels(dtype_bytes=DTYPE_BYTES, fused_rms_norm=True),
            "chunk": workload.head_chunk_tokens,
        }
        update = update_activations(
            self.language,
            self.vision,
            workload.micro_batch(merge=self.merge, context=split.context, both_views=False),
            stage_layers=layers,
            recompute=recompute,
            frozen=self.frozen,
            **shared,
        )
        score = score_activations(
            self.language,
            self.vision,
            workload.micro_batch(merge=self.merge, context=split.context, both_views=True),
            stages=len(layers),
            **shared,
        )
        return max(update, score, key=lambda a: a.total)


def _layouts(model: _Model, *, cluster: Cluster) -> tuple[list[tuple[int, int, int]], tuple[str, ...]]:
    """(tensor, pipeline, context) sizes that the GPUs and the model allow, and what the model refuses.

    A tensor-parallel group stays within a node: its ranks exchange every layer's hidden states.
    """
    found, refused = [], []
    for tensor in _divisors(math.gcd(cluster.gpus, cluster.gpus_per_node)):
        try:
            check_tensor_parallel(model.hf_config, tensor=tensor, vision_split="tensor")
        except ValueError as error:
            refused.append(f"TP {tensor}: {error}")
            continue
        for pipeline in _divisors(cluster.gpus // tensor):
            try:
                model.stage_layers(pipeline)
            except ValueError as error:
                refused.append(f"PP {pipeline}: {error}")
                continue
            contexts = _divisors(cluster.gpus // (tensor * pipeline))
            found += [(tensor, pipeline, context) for context in contexts]
    return found, tuple(dict.fromkeys(refused))


def near_even(layers: int, stages: int) -> tuple[int, ...]:
    """What is left over goes to stages in the middle first: the first holds the vision tower, the last the head."""
    order = [*range(1, stages - 1), stages - 1, 0]
    more = set(order[: layers % stages])
    return tuple(layers // stages + (stage in more) for stage in range(stages))


def _divisors(number: int) -> Iterator[int]:
    return (size for size in range(1, number + 1) if number % size == 0)


def _engine_share(
    model: _Model,
    trainer: Candidate,
    *,
    cluster: Cluster,
    workload: Workload,
    tensor: int | None,
    answers: int,
) -> EngineShare | None:
    """What a vLLM engine gets of each GPU: all the bytes that are free while it samples, if they are enough; None also
    where the trainer does not fit while it sleeps, or the two do not while weights are sent.
    """
    if trainer.trainer_bytes + SLEEPING_ENGINE > cluster.gpu_bytes:
        return None
    free = cluster.gpu_bytes - trainer.sampling_bytes
    buffers = 2 * max(TRANSFER_BUFFER, model.largest_tensor_bytes)
    utilization = min(MOST_UTILIZATION, math.floor(100 * free / cluster.gpu_bytes) / 100)
    layer = model.language.layer
    for size in [tensor] if tensor else _divisors(math.gcd(cluster.gpus, cluster.gpus_per_node)):
        if layer.heads % size or model.vision.layer.heads % size:
            continue
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
