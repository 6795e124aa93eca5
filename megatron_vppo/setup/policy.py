"""Settings of a run to the policy: the model with its weights and optimizer."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.models.build import build_model
from megatron_vppo.models.hf_config import vision_token_ids
from megatron_vppo.models.language.mrope import mrope_positions
from megatron_vppo.models.precision import TOKEN_ALIGNMENT
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.lr_schedule import LrSchedule
from megatron_vppo.parallel.policy import MegatronPolicy, PolicySettings
from megatron_vppo.parallel.training import OptimSettings, make_trainable
from megatron_vppo.setup.hardware import model_options, slower_without
from megatron_vppo.setup.inputs import RunInputs
from megatron_vppo.weights.load import load_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_policy(
    config: RunConfig, layout: Layout, source: Path, inputs: RunInputs, *, total_steps: int
) -> MegatronPolicy:
    """The model of the folder `source`, with its weights."""
    hf_config = inputs.hf_config
    dtype, options = DTYPES[config.model.dtype], model_options(config, on_gpu=layout.device.type == "cuda")
    if layout.rank == 0 and layout.device.type == "cuda" and (missing := slower_without(options.backend)):
        print("model.backend=torch is slower than TransformerEngine's layers:", *missing, sep="\n- ", flush=True)
    stages = [
        build_model(
            hf_config,
            groups=layout.groups,
            vision_groups=layout.vision_groups,
            dtype=dtype,
            device=layout.device,
            options=options,
            virtual_stage=number,
        )
        for number in range(options.virtual_stages)
    ]
    for stage in stages:
        load_weights(stage, source)
    optim = config.actor.optim
    trainable = make_trainable(
        stages,
        layout=layout,
        settings=OptimSettings(
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
        ),
        dtype=dtype,
        frozen=options.frozen,
    )
    merge_size = hf_config.vision_config.spatial_merge_size
    settings = PolicySettings(
        temperature=config.rollout.temperature,
        vocab_size=hf_config.text_config.vocab_size,
        banned_ids=() if config.algorithm.score_banned_tokens else vision_token_ids(hf_config),
        image_token_id=hf_config.image_token_id,
        merge_size=merge_size,
        rows_per_update=config.actor.micro_batch_size_per_device_for_update,
        rows_per_experience=config.actor.micro_batch_size_per_device_for_experience,
        head_chunk_tokens=config.actor.head_chunk_tokens,
        perturb_per=config.algorithm.perturb.per or "row",
        fp8_scope=frozenset(config.fp8.scope) if options.fp8 else frozenset(),
        token_alignment=TOKEN_ALIGNMENT[options.fp8.recipe] if options.fp8 else 1,
    )
    positions = partial(mrope_positions, image_token_id=hf_config.image_token_id, merge_size=merge_size)
    return MegatronPolicy(
        trainable, layout=layout, settings=settings, patches=inputs.images.patches, positions=positions
    )
