"""Megatron's data-parallel wrapper and optimizer around a model, set up so that gradients are plain sums.

The loss of a mini-batch arrives already divided by its global denominators (see TrainBatch), so neither the schedule
nor the wrapper may divide again. `calculate_per_token_loss` makes both of them sum, and they are told of no tokens to
divide by.

Shape suffix legend: V = this rank's vocabulary rows; h = hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig

from megatron_vppo.config.choices import ModelPart
from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.parallel.gradient_reduction import GradientReduction
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.lr_schedule import LrSchedule


@dataclass(frozen=True)
class OptimSettings:
    lr: LrSchedule
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_grad_norm: float
    use_distributed_optimizer: bool
    overlap_grad_reduce: bool
    """Gradients are reduced while the backward pass of the last micro-batch runs. One replica has nothing to reduce."""


@dataclass(frozen=True)
class Trainable:
    """A model that Megatron's schedules can train."""

    stages: tuple[QwenVLModel, ...]
    """The bare modules: the pipeline stages that this rank holds, in the order of the model."""
    ddps: tuple[DistributedDataParallel, ...]
    """The stages in Megatron's data-parallel wrappers, which hold the gradients."""
    reduction: GradientReduction
    optimizer: MegatronOptimizer
    settings: OptimSettings
    frozen: frozenset[ModelPart]

    @property
    def config(self) -> TransformerConfig:
        """The configuration of the language model; the same for all stages."""
        return self.stages[0].config

    @property
    def trains_here(self) -> bool:
        """True if this rank has any parameter that is trained. A stage of a frozen language model has none."""
        return any(parameter.requires_grad for stage in self.stages for parameter in stage.parameters())

    def zero_gradients(self) -> None:
        for ddp in self.ddps:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def set_step(self, step: int) -> float:
        """Sets the learning rate of training step `step` (from 1) and returns it.

        The optimizer's other numbers are set again too, because a checkpoint brings those of the run that wrote it.
        """
        settings = self.settings
        lr = settings.lr.at(step)
        for group in self.optimizer.param_groups:
            group.update(lr=lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
        return lr

    def step(self) -> float:
        """Takes one optimizer step on the present gradients; returns their global norm before clipping.

        Nothing changes if the norm is not finite. Megatron checks that in float16 alone.
        """
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if math.isfinite(norm):
            self.optimizer.step()
        return norm


def make_trainable(
    stages: Sequence[QwenVLModel],
    *,
    layout: Layout,
    settings: OptimSettings,
    dtype: torch.dtype,
    frozen: frozenset[ModelPart] = frozenset(),
) -> Trainable:
    """Wraps stages and makes their optimizer, which copies the weights to fp32: they must be loaded before."""
    config = stages[0].config
    overlap = settings.overlap_grad_reduce and layout.groups.dp_cp.size() > 1
    ddps = []
    for stage in stages:
        stage.config.calculate_per_token_loss = True
        ddps.append(
            DistributedDataParallel(
                config=stage.config,
                ddp_config=DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=settings.use_distributed_optimizer,
                    overlap_grad_reduce=overlap,
                ),
                module=stage,
                pg_collection=layout.groups,
            )
        )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr.peak,  # set_step sets that of each step
            min_lr=settings.lr.peak,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            clip_grad=settings.max_grad_norm,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=settings.use_distributed_optimizer,
        ),
        ddps,
    )
    tower = stages[0].vision
    reduction = GradientReduction(
        ddps if overlap else (),
        head_weight=_weight_of_head_alone(stages[-1]),
        tower=() if tower is None else tuple(tower.parameters()),
    )
    config.finalize_model_grads_func = partial(_sum_gradients, reduction)
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = reduction.not_last
    return Trainable(
        stages=tuple(stages),
        ddps=tuple(ddps),
        reduction=reduction,
        optimizer=optimizer,
        settings=settings,
        frozen=frozen,
    )


def _weight_of_head_alone(stage: QwenVLModel) -> torch.nn.Parameter | None:
    """Returns the output weight, unless this stage has none or reads it as embedding too."""
    tied = stage.share_embeddings_and_output_weights and stage.pre_process
    return stage.head_weight_Vh() if stage.post_process and not tied else None


def _sum_gradients(
    reduction: GradientReduction,
    model: Sequence[DistributedDataParallel],
    num_tokens: torch.Tensor | None = None,
    **kwargs: object,
) -> None:
    reduction.start_rest()
    finalize_model_grads(list(model), None, **kwargs)  # type: ignore[arg-type]
    for ddp in model:
        _sum_whole_tower(ddp.module)


def _sum_whole_tower(stage: QwenVLModel) -> None:
    """Adds up the tower's gradients if each tensor-parallel rank holds a whole tower and has seen its own images."""
    groups = stage.groups
    if stage.vision is None or stage.vision_groups.tower.tp.size() == groups.tp.size():
        return
    for parameter in stage.vision.parameters():
        if parameter.requires_grad:
            dist.all_reduce(parameter.main_grad, group=groups.tp)  # type: ignore[attr-defined]
