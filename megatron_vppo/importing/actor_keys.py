"""The part of the table about actor, critic and reference model; easyr1_keys.py has the rest, and says what it is."""

from __future__ import annotations

from typing import Any

from megatron_vppo.importing import input_rules as inputs
from megatron_vppo.importing import objective_rules as objective
from megatron_vppo.importing import training_rules as training
from megatron_vppo.importing.rules import Computed, Dropped, Fixed, Rule, Same, keys_of
from megatron_vppo.importing.their_values import COUNT, FLAG, MAPPING, NUMBER, PAIR, TEXT

FSDP = Dropped("FSDP's own; Megatron shards otherwise")
NO_CRITIC = Dropped("no critic with grpo, the only estimator here")
REFERENCE_MODEL = Dropped("the reference model is the start model, on the ranks of the trainer")
OVERWRITTEN = Dropped("their program overwrites it by the same key under algorithm", matters=True)
OFFLOAD = Computed(("actor.offload",), training.offload, "parameters go with their gradients")

FSDP_FIELDS: dict[str, tuple[Any, ...]] = {
    "fsdp.enable_full_shard": (FLAG, True),
    "fsdp.enable_cpu_offload": (FLAG, False),
    "fsdp.enable_rank0_init": (FLAG, True),
    "fsdp.use_orig_params": (FLAG, False),
    "fsdp.torch_dtype": (TEXT.or_null, None),
    "fsdp.fsdp_size": (COUNT, -1),
    "fsdp.mp_param_dtype": (TEXT, "bf16"),
    "fsdp.mp_reduce_dtype": (TEXT, "fp32"),
    "fsdp.mp_buffer_dtype": (TEXT, "fp32"),
    "offload.offload_params": (FLAG, False),
    "offload.offload_optimizer": (FLAG, False),
}
"""Kind and default of the fields that actor, critic and reference model have alike."""
MODEL_FIELDS: dict[str, tuple[Any, ...]] = {
    "model.model_path": (TEXT.or_null, None),
    "model.tokenizer_path": (TEXT.or_null, None),
    "model.override_config": (MAPPING, {}),
    "model.enable_gradient_checkpointing": (FLAG, True),
    "model.trust_remote_code": (FLAG, True),
    "model.freeze_vision_tower": (FLAG, False),
    "optim.lr": (NUMBER, 1e-6),
    "optim.betas": (PAIR, (0.9, 0.999)),
    "optim.weight_decay": (NUMBER, 0.01),
    "optim.strategy": (TEXT, "adamw"),
    "optim.lr_warmup_ratio": (NUMBER, 0.0),
    "optim.lr_warmup_steps": (COUNT.or_null, None),
    "optim.min_lr_ratio": (NUMBER.or_null, None),
    "optim.warmup_style": (TEXT, "constant"),
    **FSDP_FIELDS,
}
"""Those of actor and critic."""
WARMUP = ("actor.optim.lr_warmup_steps",)
BF16 = Fixed(("bf16", "bfloat16"), "the model computes in bfloat16; set bf16, and model.dtype=float32 in our file")
ACTOR_FIELD_RULES: dict[str, Rule] = {
    "model.model_path": Computed(("model.path",), inputs.model_path, "must be set"),
    "model.tokenizer_path": Computed((), inputs.tokenizer_path, "another one than the model's is refused"),
    "model.override_config": Fixed(({},), "the model's config.json holds; edit it, and leave this out"),
    "model.enable_gradient_checkpointing": Computed(("parallel.recompute",), inputs.recompute, "true is full"),
    "model.trust_remote_code": Dropped("no code of a model's folder is run"),
    "model.freeze_vision_tower": Computed(("model.freeze",), inputs.freeze, "true is vision_tower and projector"),
    "optim.lr": Same("actor.optim.lr"),
    "optim.betas": Same("actor.optim.betas"),
    "optim.weight_decay": Same("actor.optim.weight_decay"),
    "optim.strategy": Computed((), training.optimizer, "adamw is as here; adamw_bf16 becomes it, another is refused"),
    "optim.lr_warmup_ratio": Computed(WARMUP, training.warmup_ratio, "times max_steps; refused above 0 without them"),
    "optim.lr_warmup_steps": Computed(WARMUP, training.warmup_steps, "step k of w has k/w of the rate, there (k-1)/w"),
    "optim.min_lr_ratio": Dropped("read nowhere in their code; the rate is constant", matters=True),
    "optim.warmup_style": Dropped("read nowhere in their code; the rate is constant", matters=True),
    **{name: FSDP for name in FSDP_FIELDS},
    "fsdp.enable_cpu_offload": Fixed((False,), "parameters are on the GPU while it trains; set it to false"),
    "fsdp.torch_dtype": Computed(("model.dtype",), inputs.dtype, "bfloat16, also for null and fp32; fp16 is refused"),
    "fsdp.mp_param_dtype": BF16,
    "fsdp.mp_reduce_dtype": Fixed(("fp32", "float32"), "gradients are summed in float32; set fp32"),
    "offload.offload_params": OFFLOAD,
    "offload.offload_optimizer": OFFLOAD,
}  # fmt: skip

VPPO_FIELDS: dict[str, tuple[Any, ...]] = {
    "use_vppo_on_entropy": (FLAG, False),
    "top_p_entropy_tokens": (NUMBER, 0.2),
    "use_vppo_on_perception": (FLAG, False),
    "top_p_perception_tokens": (NUMBER, 0.2),
    "use_entropy_penalty": (FLAG, False),
    "entropy_penalty_coef": (NUMBER, 0.06),
    "use_advantage_shaping": (FLAG, False),
    "advantage_scaling_min": (NUMBER, 0.8),
}
"""Those that stand under algorithm, which holds, and once more under worker.actor."""
UPDATE_ROWS = Computed(
    ("actor.micro_batch_size_per_device_for_update",), training.update_rows, "a device is a data-parallel replica here"
)
ACTOR = keys_of(
    "worker.actor",
    ("strategy", TEXT, "fsdp", FSDP),
    ("global_batch_size", COUNT, 256, Same("actor.global_batch_size", "prompts in both")),
    ("micro_batch_size_per_device_for_update", COUNT, 4, UPDATE_ROWS),
    (
        "micro_batch_size_per_device_for_experience", COUNT, 16,
        Computed(("actor.micro_batch_size_per_device_for_experience",), training.experience_rows,
                  "half of it, where both views are scored: they share a micro-batch here"),
    ),
    ("max_grad_norm", NUMBER, 1.0, Same("actor.max_grad_norm")),
    ("clip_ratio_low", NUMBER, 0.2, Same("algorithm.clip_ratio_low")),
    ("clip_ratio_high", NUMBER, 0.3, Same("algorithm.clip_ratio_high")),
    ("clip_ratio_dual", NUMBER, 3.0, Same("algorithm.clip_ratio_dual")),
    ("loss_avg_mode", TEXT, "token", Same("algorithm.loss_avg_mode")),
    ("loss_type", TEXT, "default", Computed(("algorithm.policy_loss",), objective.policy_loss, "default is clip")),
    ("ppo_epochs", COUNT, 1, Same("actor.ppo_epochs")),
    ("padding_free", FLAG, True, Dropped("rows are always packed without padding")),
    (
        "dynamic_batching", FLAG, True,
        Computed(("actor.max_tokens_per_micro_batch",), training.dynamic_batching,
                  "true: rows of the update times their longest length; false: null"),
    ),
    ("ulysses_size", COUNT, 1, Same("parallel.context_parallel_size")),
    ("use_torch_compile", FLAG, True, Dropped("kernels are chosen otherwise")),
    *((name, *field, ACTOR_FIELD_RULES[name]) for name, field in MODEL_FIELDS.items()),
    *((name, *field, OVERWRITTEN) for name, field in VPPO_FIELDS.items()),
)  # fmt: skip

CRITIC = keys_of(
    "worker.critic",
    ("strategy", TEXT, "fsdp", NO_CRITIC),
    ("global_batch_size", COUNT, 256, NO_CRITIC),
    ("micro_batch_size_per_device_for_update", COUNT, 4, NO_CRITIC),
    ("micro_batch_size_per_device_for_experience", COUNT, 16, NO_CRITIC),
    ("max_grad_norm", NUMBER, 1.0, NO_CRITIC),
    ("cliprange_value", NUMBER, 0.5, NO_CRITIC),
    ("loss_avg_mode", TEXT, "token", NO_CRITIC),
    ("ppo_epochs", COUNT, 1, NO_CRITIC),
    ("padding_free", FLAG, False, NO_CRITIC),
    ("dynamic_batching", FLAG, True, NO_CRITIC),
    ("ulysses_size", COUNT, 1, NO_CRITIC),
    *((name, *field, NO_CRITIC) for name, field in MODEL_FIELDS.items()),
)
REFERENCE = keys_of(
    "worker.ref",
    ("strategy", TEXT, "fsdp", REFERENCE_MODEL),
    *((name, *field, REFERENCE_MODEL) for name, field in FSDP_FIELDS.items()),
)
