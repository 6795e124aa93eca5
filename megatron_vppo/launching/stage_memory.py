"""The memory of the fullest rank of a pipeline stage: state in Megatron's own buffers, and one micro-batch.

Which ranks are alike: those of one pipeline stage. Megatron pads every shard, so tensor-parallel ranks hold tensors of
the same shapes, and data- and context-parallel ranks hold the same tensors. The optimizer's shares are equal pieces of
one padded buffer; the padding itself has no state, so some ranks hold a little less. Of the images of a micro-batch the
first rank of those that share them has most. So the first rank of each stage is built, and stands for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_vppo.algorithm.types import Response
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.launching.batches import Batches, in_flight, scores_to_end, scoring_per, update_per
from megatron_vppo.launching.fake_world import META, fake_rank, meta_device
from megatron_vppo.launching.longest_rows import ZeroPixels
from megatron_vppo.launching.meta_step import StepBytes, run_step, score_views, sizes_of, update_views
from megatron_vppo.models.hf_config import HfConfig, vision_token_ids
from megatron_vppo.models.options import ModelOptions
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.schedule import ScheduleRunner
from megatron_vppo.parallel.training import Trainable, make_trainable
from megatron_vppo.planning.activations import (
    Kernels,
    LayerSplit,
    MicroBatch,
    StageActivations,
    head_bytes,
    running_layer,
    score_activations,
)
from megatron_vppo.planning.sizes import language_sizes, vision_sizes
from megatron_vppo.planning.state import StateBytes
from megatron_vppo.setup.by_machine import by_machine
from megatron_vppo.setup.policy import DTYPES, build_stages, optim_settings, policy_settings


@dataclass(frozen=True)
class StageReport:
    """The fullest rank of one pipeline stage (of several virtual ones, where there are)."""

    pipeline_rank: int
    layers: tuple[int, ...]
    """The language layers of each of its virtual stages."""
    state: StateBytes
    step: StepBytes
    """One micro-batch of the update, forward and backward."""
    in_flight: tuple[int, ...]
    """The most micro-batches that each virtual stage keeps at once."""
    update: StageActivations
    score: StageActivations


def larger(one: StageReport, other: StageReport) -> StageReport:
    """Returns the larger activations of two micro-batches of a stage, those of update and scoring by themselves."""
    fuller = max(one, other, key=lambda report: report.update.total)
    return replace(fuller, score=max(one.score, other.score, key=lambda score: score.total))


def report_stage(
    config: RunConfig,
    hf_config: HfConfig,
    options: ModelOptions,
    responses: Sequence[Response],
    *,
    batches: Batches,
    rank: int,
    world_size: int,
) -> StageReport:
    """Builds rank `rank` of the run without memory, and runs its largest micro-batch."""
    with fake_rank(config.parallel, rank=rank, world_size=world_size) as layout, meta_device():
        trainable = make_trainable(
            build_stages(config, layout, hf_config, options, device=META),
            layout=layout,
            settings=optim_settings(config, total_steps=1, on_gpu=True),
            dtype=DTYPES[config.model.dtype],
            frozen=options.frozen,
        )
        state = state_of(trainable)
        grid = math.prod(responses[0].prompt.grids_thw[0])
        runner = ScheduleRunner(
            trainable.stages,
            hf_config=hf_config,
            layout=layout,
            settings=policy_settings(config, hf_config, options, banned_ids=vision_token_ids(hf_config), on_gpu=True),
            pixels=ZeroPixels(hf_config, patches=grid),
        )
        updated = update_views(runner, responses, per=update_per(config))
        step = run_step(trainable, layout, runner, responses, updated)
        per = scoring_per(config)
        limit = runner.scoring_limit(both_views=per is not None)
        views = score_views(runner, responses, per=per, to_end=scores_to_end(config))
        in_scoring = runner.packer.pack(responses, views, limit=limit)
        flight = in_flight(
            layout.pipeline,
            rank=layout.pipeline_rank,
            micro_batches=batches.update.micro_batches,
            virtual_stages=len(trainable.stages),
        )
        return StageReport(
            pipeline_rank=layout.pipeline_rank,
            layers=tuple(stage.stage_layers[stage.stage] for stage in trainable.stages),
            state=state,
            step=step,
            in_flight=flight,
            update=_update_activations(config, hf_config, layout, step, flight),
            score=_score_activations(config, hf_config, layout, sizes_of(in_scoring, layout)),
        )


def state_of(trainable: Trainable) -> StateBytes:
    """Counts the bytes that a rank's training holds between micro-batches, storage by storage.

    The two moments of Adam are counted before the first step has made them: each is as large as the parameter that the
    optimizer works on, which is this rank's shard in fp32.
    """
    weights = storages(parameter for stage in trainable.stages for parameter in stage.parameters())
    gradients = storages(buffer.grad_data for ddp in trainable.ddps for buffer in ddp.buffers)
    parts = getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])
    groups = [group for part in parts if part.optimizer is not None for group in part.optimizer.param_groups]
    own: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
    copies = {key: size for key, size in storages(own).items() if key not in weights}
    moments = 2 * sum(parameter.numel() * parameter.element_size() for parameter in own)
    return StateBytes(sum(weights.values()), sum(gradients.values()), sum(copies.values()) + moments)


def storages(tensors: Iterable[Tensor]) -> dict[Any, int]:
    """Returns the bytes of the storages of tensors, each once. The keys are the storages, which keeps them alive."""
    return {_Storage(tensor.untyped_storage()): tensor.untyped_storage().nbytes() for tensor in tensors}


@dataclass(frozen=True)
class _Storage:
    """A storage by identity: on meta all have the same address."""

    storage: torch.UntypedStorage

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Storage) and self.storage is other.storage

    def __hash__(self) -> int:
        return id(self.storage)


def _update_activations(
    config: RunConfig, hf_config: HfConfig, layout: Layout, step: StepBytes, flight: tuple[int, ...]
) -> StageActivations:
    """Adds up what micro-batches in flight keep, measured, and what no saved tensor shows: the working set of a layer
    and of the vocabulary head, by the formulas of `vppo plan`.
    """
    shared = _shared(config, hf_config, layout)
    kept = sum(count * (kept + out) for count, kept, out in zip(flight, step.kept, step.output, strict=True))
    running = running_layer(with_vision=layout.is_first_stage, batch=step.batch, **shared)
    head = head_bytes(
        shared["language"],
        step.batch,
        chunk=by_machine(config, on_gpu=True).head_chunk_tokens,
        tensor=layout.tensor,
        dtype_bytes=DTYPES[config.model.dtype].itemsize,
    )
    return StageActivations(layers=kept + running, head=head if layout.is_last_stage else 0)


def _score_activations(config: RunConfig, hf_config: HfConfig, layout: Layout, batch: MicroBatch) -> StageActivations:
    return score_activations(
        batch=batch,
        stage=layout.pipeline_rank,
        stages=layout.pipeline,
        chunk=by_machine(config, on_gpu=True).head_chunk_tokens,
        **_shared(config, hf_config, layout),
    )


def _shared(config: RunConfig, hf_config: HfConfig, layout: Layout) -> dict[str, Any]:
    vision = vision_sizes(hf_config)
    if layout.vision_groups.tower.tp.size() != layout.tensor:
        # Each rank runs the whole tower: the formulas will divide this by the tensor-parallel size.
        layer, times = vision.layer, layout.tensor
        whole = replace(layer, heads=layer.heads * times, kv_heads=layer.kv_heads * times, ffn=layer.ffn * times)
        vision = replace(vision, layer=whole)
    return {
        "language": language_sizes(hf_config),
        "vision": vision,
        "split": LayerSplit(layout.tensor, layout.context, by_machine(config, on_gpu=True).sequence_parallel),
        "kernels": Kernels(dtype_bytes=DTYPES[config.model.dtype].itemsize, fused_rms_norm=True),
    }
