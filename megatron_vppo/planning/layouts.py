"""The parallel layouts of a model that fit the GPUs.

Trainer and engines take turns on each GPU (docs/placement.md): each phase has to fit, not their sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args

from megatron_vppo.config.choices import ModelPart, Recompute
from megatron_vppo.models.families import family_of, weight_map
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.models.megatron_config import check_tensor_parallel, stage_layers
from megatron_vppo.planning.activations import (
    Kernels,
    LayerSplit,
    StageActivations,
    score_activations,
    update_activations,
)
from megatron_vppo.planning.candidate import (
    DTYPE_BYTES,
    Candidate,
    Cluster,
    PlanRequest,
    StageMemory,
    Workload,
    divisors,
)
from megatron_vppo.planning.engine_share import EngineModel, check_engine_size, engine_share, engine_sizes
from megatron_vppo.planning.sizes import language_sizes, stage_values, vision_sizes
from megatron_vppo.planning.state import StageValues, state_bytes
from megatron_vppo.weights.entries import parameter_count

RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)
"""All choices, in the order of their cost."""


@dataclass(frozen=True)
class LayoutPlan:
    parameters: int
    """The parameters of the whole model."""
    fitting: tuple[Candidate, ...]
    """The layouts that fit, best first."""
    closest: Candidate | None
    """The layout with the smallest trainer among those that do not fit."""
    refused: tuple[str, ...]
    """The reasons why the model rules out some layouts that the GPUs would allow."""


class _Layout(NamedTuple):
    tensor: int
    pipeline: int
    context: int


def make_plan(request: PlanRequest) -> LayoutPlan:
    """Looks at every layout of all GPUs; of those that differ only in recomputation, it keeps the cheapest that fits.

    Best first: a replica (tensor x pipeline x context) within one node, then without recomputation, then the smallest
    replica, then the shortest pipeline.

    Raises:
        ValueError: engines of `rollout_tensor` GPUs are impossible on this cluster or for this model.
    """
    model = _Model(request.hf_config, frozen=request.frozen)
    sizes = _engine_sizes(model.engine, request)
    layouts, refused = _layouts(model, cluster=request.cluster)
    tried = [candidate for layout in layouts for candidate in _cheapest(model, layout, request, sizes)]
    return LayoutPlan(
        parameters=model.engine.parameters,
        fitting=tuple(sorted((c for c in tried if c.engine), key=lambda c: _preference(c, request.cluster))),
        closest=min((c for c in tried if c.engine is None), key=lambda c: c.trainer_bytes, default=None),
        refused=refused,
    )


def _engine_sizes(model: EngineModel, request: PlanRequest) -> tuple[int, ...]:
    """Lists the numbers of GPUs that an engine may have: `rollout_tensor` alone, or all that are possible."""
    if request.rollout_tensor is None:
        return engine_sizes(model, request.cluster)
    check_engine_size(model, request.cluster, request.rollout_tensor)
    return (request.rollout_tensor,)


def _cheapest(model: _Model, layout: _Layout, request: PlanRequest, sizes: tuple[int, ...]) -> Iterator[Candidate]:
    """Tries a layout with more and more recomputation. The last candidate fits (it has an engine), or none does."""
    for recompute in RECOMPUTES:
        candidate = model.candidate(layout, recompute=recompute, request=request)
        share = engine_share(model.engine, candidate, request=request, sizes=sizes)
        yield replace(candidate, engine=share)
        if share is not None:
            return


def _preference(candidate: Candidate, cluster: Cluster) -> tuple[bool, int, int, int]:
    """Returns the sorting key: the best candidate has the smallest."""
    return (
        candidate.replica_gpus > cluster.node_gpus,
        RECOMPUTES.index(candidate.recompute),
        candidate.replica_gpus,
        candidate.pipeline,
    )


class _Model:
    """The sizes and counts of a model, computed once for all layouts."""

    def __init__(self, hf_config: HfConfig, *, frozen: frozenset[ModelPart]) -> None:
        self.hf_config, self.frozen = hf_config, frozen
        self.family = family_of(hf_config)
        self.entries = weight_map(hf_config, family=self.family)
        self.language, self.vision = language_sizes(hf_config), vision_sizes(hf_config)
        self.engine = EngineModel(hf_config, self.language, parameters=parameter_count(self.entries))
        self.merge = hf_config.vision_config.spatial_merge_size
        self._values: dict[tuple[int, int, int], StageValues] = {}

    def stage_layers(self, pipeline: int) -> tuple[int, ...]:
        """Shares the language layers out to stages as evenly as possible.

        Raises:
            ValueError: the model does not allow it.
        """
        split = near_even(self.hf_config.text_config.num_hidden_layers, pipeline)
        return stage_layers(self.hf_config, family=self.family, pipeline=pipeline, pipeline_layers=split)

    def candidate(self, layout: _Layout, *, recompute: Recompute, request: PlanRequest) -> Candidate:
        """Returns the layout with the memory of its first, second and last stage, still without an engine.

        Stages between the second and the last cannot be fuller than the second: none has more layers (`near_even`),
        and each holds fewer micro-batches.
        """
        tensor, pipeline, context = layout
        data = request.cluster.gpus // (tensor * pipeline * context)
        split = LayerSplit(tensor=tensor, context=context, sequence_parallel=tensor > 1)
        layers = self.stage_layers(pipeline)
        stages = []
        for stage in sorted({0, min(1, pipeline - 1), pipeline - 1}):
            values = self._stage_values(stage, layers, tensor=tensor)
            state = state_bytes(values, dtype_bytes=DTYPE_BYTES, replicas=data * context, distributed=True)
            stages.append(StageMemory(state, self._activations(stage, layers, split, recompute, request.workload)))
        return Candidate(
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            data=data,
            layers=layers,
            recompute=recompute,
            stages=tuple(stages),
            offload=request.offload,
            engine=None,
        )

    def _stage_values(self, stage: int, layers: tuple[int, ...], *, tensor: int) -> StageValues:
        """Counts the values of a stage, once for all context sizes and recomputations: there may be 1000 tensors."""
        key = (stage, len(layers), tensor)
        if key not in self._values:
            self._values[key] = stage_values(
                self.entries, stage_layers=layers, stage=stage, tensor=tensor, frozen=self.frozen
            )
        return self._values[key]

    def _activations(
        self, stage: int, layers: tuple[int, ...], split: LayerSplit, recompute: Recompute, workload: Workload
    ) -> StageActivations:
        """Counts the activations of the update or of scoring, whichever needs more."""
        shared: dict[str, Any] = {
            "stage": stage,
            "split": split,
            "kernels": Kernels(dtype_bytes=DTYPE_BYTES, fused_rms_norm=True),
            "chunk": workload.head_chunk_tokens,
        }
        update = update_activations(
            self.language,
            self.vision,
            workload.micro_batch(merge=self.merge, context=split.context, both_views=workload.updates_both_views),
            stage_layers=layers,
            recompute=recompute,
            frozen=self.frozen,
            **shared,
        )
        score = score_activations(
            self.language,
            self.vision,
            workload.micro_batch(merge=self.merge, context=split.context, both_views=workload.scores_both_views),
            stages=len(layers),
            **shared,
        )
        return max(update, score, key=lambda a: a.total)


def _layouts(model: _Model, *, cluster: Cluster) -> tuple[list[_Layout], tuple[str, ...]]:
    """Returns the layouts that the GPUs and the model allow, and the reasons why the model refuses others.

    A tensor-parallel group stays within a node, because its ranks exchange the hidden states of every layer.
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
            found += [_Layout(tensor, pipeline, context) for context in contexts]
    return found, tuple(dict.fromkeys(refused))


def near_even(layers: int, stages: int) -> tuple[int, ...]:
    """Shares layers out to stages. Those left over go one each to the stages from the second on. The last stage, which
    holds the head, gets one only if all middle stages do, and the first, which holds the vision tower, never.
    """
    left = layers % stages
    return tuple(layers // stages + (1 <= stage <= left) for stage in range(stages))
