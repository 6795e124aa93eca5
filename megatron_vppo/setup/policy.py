"""The model of a run, built and loaded by its settings: one that trains, or one that only scores."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.models.build import build_model
from megatron_vppo.models.flops import model_cost
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.models.layers.te_probe import check_fused_attention
from megatron_vppo.models.options import ModelOptions
from megatron_vppo.models.precision import TOKEN_ALIGNMENT
from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.lr_schedule import LrSchedule
from megatron_vppo.parallel.policy import MegatronPolicy
from megatron_vppo.parallel.reference import ReferenceWeights
from megatron_vppo.parallel.schedule import PolicySettings, ScheduleRunner
from megatron_vppo.parallel.scorer import Scorer
from megatron_vppo.parallel.training import OptimSettings, make_trainable
from megatron_vppo.setup.by_machine import by_machine
from megatron_vppo.setup.hardware import model_options, shares_prompts
from megatron_vppo.setup.inputs import RunInputs
from megatron_vppo.weights.load import load_weights

SCORING_CHUNKS = 4
"""The number of boundaries in trainer.stop_within_seconds of scoring."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_policy(
    config: RunConfig, layout: Layout, source: Path, inputs: RunInputs, *, total_steps: int
) -> MegatronPolicy:
    """Loads the model of the folder `source`, with an optimizer. It is the reference model too, if there is one."""
    options = model_options(config, on_gpu=layout.device.type == "cuda")
    trainable = make_trainable(
        _load_stages(config, layout, source, inputs, options),
        layout=layout,
        settings=optim_settings(config, total_steps=total_steps, on_gpu=layout.device.type == "cuda"),
        dtype=DTYPES[config.model.dtype],
        frozen=options.frozen,
    )
    return MegatronPolicy(
        trainable,
        hf_config=inputs.hf_config,
        layout=layout,
        settings=policy_settings(
            config, inputs.hf_config, options, banned_ids=inputs.banned_ids, on_gpu=layout.device.type == "cuda"
        ),
        pixels=inputs.images,
        reference=ReferenceWeights(trainable.stages) if config.algorithm.kl_coef else None,
    )


def make_scorer(config: RunConfig, layout: Layout, source: Path, inputs: RunInputs) -> Scorer:
    """Loads the model of the folder `source` for scoring alone: no gradients, no optimizer."""
    options = model_options(config, on_gpu=layout.device.type == "cuda")
    runner = ScheduleRunner(
        _load_stages(config, layout, source, inputs, options),
        hf_config=inputs.hf_config,
        layout=layout,
        settings=policy_settings(
            config, inputs.hf_config, options, banned_ids=inputs.banned_ids, on_gpu=layout.device.type == "cuda"
        ),
        pixels=inputs.images,
    )
    return Scorer(runner)


def policy_settings(
    config: RunConfig, hf_config: HfConfig, options: ModelOptions, *, banned_ids: tuple[int, ...], on_gpu: bool
) -> PolicySettings:
    """Collects the settings of scoring and updating. `banned_ids`: the tokens that are never sampled."""
    cost = model_cost(hf_config)
    return PolicySettings(
        temperature=config.rollout.temperature,
        banned_ids=() if config.algorithm.score_banned_tokens else banned_ids,
        rows_per_update=config.actor.micro_batch_size_per_device_for_update,
        rows_per_experience=config.actor.micro_batch_size_per_device_for_experience,
        head_chunk_tokens=by_machine(config, on_gpu=on_gpu).head_chunk_tokens,
        perturb_per=config.algorithm.perturb.per,
        shared_prefix=shares_prompts(config),
        max_tokens_per_micro_batch=config.actor.max_tokens_per_micro_batch,
        patch_work=cost.per_patch / cost.per_token,
        fp8_scope=frozenset(config.fp8.scope) if options.fp8 else frozenset(),
        token_alignment=TOKEN_ALIGNMENT[options.fp8.recipe] if options.fp8 else 1,
        scoring_chunk_seconds=config.trainer.stop_within_seconds / SCORING_CHUNKS,
    )


def _load_stages(
    config: RunConfig, layout: Layout, source: Path, inputs: RunInputs, options: ModelOptions
) -> list[QwenVLModel]:
    """Builds this rank's pipeline stages and loads their weights.

    Raises:
        ValueError: attention would not be fused on this GPU.
    """
    if options.backend == "te":
        check_fused_attention(
            inputs.hf_config,
            tensor=layout.tensor,
            vision_tensor=layout.vision_groups.tower.tp.size(),
            shared_prefix=shares_prompts(config),
        )
    stages = build_stages(config, layout, inputs.hf_config, options, device=layout.device)
    for stage in stages:
        load_weights(stage, source, replicas=layout.groups.dp_cp)
    return stages


def build_stages(
    config: RunConfig, layout: Layout, hf_config: HfConfig, options: ModelOptions, *, device: torch.device
) -> list[QwenVLModel]:
    """Builds this rank's pipeline stages, without weights."""
    return [
        build_model(
            hf_config,
            groups=layout.groups,
            vision_groups=layout.vision_groups,
            dtype=DTYPES[config.model.dtype],
            device=device,
            options=options,
            virtual_stage=number,
        )
        for number in range(options.virtual_stages)
    ]


def optim_settings(config: RunConfig, *, total_steps: int, on_gpu: bool) -> OptimSettings:
    """Collects the settings of the optimizer."""
    optim = config.actor.optim
    return OptimSettings(
        lr=LrSchedule(
            peak=optim.lr,
            kind=optim.lr_scheduler_type,
            warmup_steps=optim.lr_warmup_steps,
            total_steps=total_steps,
            min_ratio=optim.min_lr_ratio,
        ),
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        max_grad_norm=config.actor.max_grad_norm,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_grad_reduce=by_machine(config, on_gpu=on_gpu).overlap_grad_reduce,
    )
