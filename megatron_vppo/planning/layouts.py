"""Which parallel layouts of a model fit the GPUs, and what takes their memory.

Trainer and engine share each GPU by turns (placement.py): every phase has to fit, not their sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

from megatron_vppo.config.choices import MemoryPart, ModelPart, Recompute
from megatron_vppo.models.families import family_of, weight_map
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.models.megatron_config import check_tensor_parallel, stage_layers
from megatron_vppo.planning.activations import Kernels, Split, StageActivations, score_activations, update_activations
from megatron_vppo.planning.candidate import DTYPE_BYTES, Candidate, Cluster, Stage, Workload, divisors
from megatron_vppo.planning.engine_share import EngineModel, check_engine_size, engine_share, engine_sizes
from megatron_vppo.planning.sizes import language_sizes, parameter_count, stage_values, vision_sizes
from megatron_vppo.planning.state import StageValues, state_bytes

RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)
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
    frozen: frozenset[ModelPart] = frozenset(),
    offload: frozenset[MemoryPart] = frozenset(),
) -> Plan:
    """Every layout of the cluster's GPUs; of those that differ in recomputation only, the cheapest that fits.

    Best first: a replica (tensor x pipeline x context) within one node, then without recomputation, then with the
    smallest replica, then with the shortest pipeline.

    Args:
        rollout_tensor: GPUs per engine; None: the fewest that leave room for `answers`.
        answers: sequences of full length that an engine has to hold at once.
        frozen: parts that are not trained.
        offload: trainer state that waits in host memory while engines sample.

    Raises:
        ValueError: engines of `rollout_tensor` GPUs are impossible on this cluster or for this model.
    """
    model = _Model(hf_config, frozen=frozen)
    if rollout_tensor is not None:
        check_engine_size(model.engine, cluster, rollout_tensor)
    rollout_sizes = engine_sizes(model.engine, cluster) if rollout_tensor is None else (rollout_tensor,)
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
            share = engine_share(
                model.engine, candidate, cluster=cluster, workload=workload, sizes=rollout_sizes, answers=answers
            )
            if share is not None:
                fitting.append(replace(candidate, engine=share))
                break
            others.append(candidate)
    fitting.sort(
        key=lambda c: (
            c.replica_gpus > cluster.node_gpus,
            RECOMPUTES.index(c.recompute),
            c.replica_gpus,
            c.pipeline,
        )
    )
    return Plan(
        parameters=model.engine.parameters,
        fitting=tuple(fitting),
        closest=min(others, key=lambda c: c.trainer_bytes, default=None),
        refused=refused,
    )


class _Model:
    """A configuration's numbers, worked out once for all layouts."""

    def __init__(self, hf_config: HfConfig, *, frozen: frozenset[ModelPart]) -> None:
        self.hf_config, self.frozen = hf_config, frozen
        self.family = family_of(hf_config)
        self.entries = weight_map(hf_config, family=self.family)
        self.language, self.vision = language_sizes(hf_config), vision_sizes(hf_config)
        self.engine = EngineModel(hf_config, self.language, parameters=parameter_count(self.entries))
        self.merge = hf_config.vision_config.spatial_merge_size
        self._values: dict[tuple[int, int, int], StageValues] = {}

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
        offload: frozenset[MemoryPart],
    ) -> Candidate:
        """The layout with the memory of its first, second and last stage. Those between cannot be fuller than the
        second: none has more layers (`near_even`), and each holds fewer micro-batches.
        """
        split = Split(tensor=tensor, context=context, sequence_parallel=tensor > 1)
        layers = self.stage_layers(pipeline)
        stages = []
        for stage in sorted({0, min(1, pipeline - 1), pipeline - 1}):
            values = self._stage_values(stage, layers, tensor=tensor)
            state = state_bytes(values, dtype_bytes=DTYPE_BYTES, replicas=data * context, distributed=True)
            stages.append(Stage(state, self._activations(stage, layers, split, recompute, workload)))
        return Candidate(
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            data=data,
            layers=layers,
            recompute=recompute,
            stages=tuple(stages),
            offload=offload,
            engine=None,
        )

    def _stage_values(self, stage: int, layers: tuple[int, ...], *, tensor: int) -> StageValues:
        """Once for all contexts and recomputations: a large model has a thousand parameters."""
        key = (stage, len(layers), tensor)
        if key not in self._values:
            self._values[key] = stage_values(
                self.entries, stage_layers=layers, stage=stage, tensor=tensor, frozen=self.frozen
            )
        return self._values[key]

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
    for tensor in cluster.group_sizes:
        try:
            check_tensor_parallel(model.hf_config, tensor=tensor, vision_split="tensor")
        except ValueError as error:
            refused.append(f"TP {tensor}: {error}")
            continue
        for pipeline in divisors(cluster.gpus // tensor):
            try:
                model.stage_layers(pipeline)
            except ValueError as error:
                refused.append(f"PP {pipeline}: {error}")
                continue
            contexts = divisors(cluster.gpus // (tensor * pipeline))
            found += [(tensor, pipeline, context) for context in contexts]
    return found, tuple(dict.fromkeys(refused))


def near_even(layers: int, stages: int) -> tuple[int, ...]:
    """What is left over goes to stages in the middle first: the first holds the vision tower, the last the head. Of
    those in the middle none has more than the second stage.
    """
    order = [*range(1, stages - 1), stages - 1, 0]
    more = set(order[: layers % stages])
    return tuple(layers // stages + (stage in more) for stage in range(stages))
