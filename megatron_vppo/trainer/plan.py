"""Which parallel layouts of a model fit the GPUs, and what takes their memory.

Trainer and engine share each GPU by turns (placement.py): every phase has to fit, not their sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_vppo.models.families import family_of, weight_map
from megatron_vppo.models.options import Part, Recompute
from megatron_vppo.models.transformer_config import HfConfig, check_tensor_parallel, stage_layers
from megatron_vppo.parallel.activations import (
    Kernels,
    Split,
    StageActivations,
    score_activations,
    update_activations,
)
from megatron_vppo.parallel.memory import engine_weight_bytes, kv_bytes_per_token, state_bytes
from megatron_vppo.parallel.offload import Part as OffloadPart
from megatron_vppo.parallel.sizes import language_sizes, parameter_count, stage_values, vision_sizes
from megatron_vppo.trainer.candidate import Candidate, Cluster, EngineShare, Workload

GIB = 2**30
DTYPE_BYTES = 2
"""bfloat16."""
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
