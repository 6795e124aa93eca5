"""The keys of VPPO-RL with the defaults of its dataclasses, as facts about its release of 2025-11-11."""

from __future__ import annotations

from typing import Any

MODEL: dict[str, Any] = {
    "model_path": None, "tokenizer_path": None, "override_config": {}, "enable_gradient_checkpointing": True,
    "trust_remote_code": True, "freeze_vision_tower": False,
}  # fmt: skip
OPTIM: dict[str, Any] = {
    "lr": 1e-6, "betas": (0.9, 0.999), "weight_decay": 0.01, "strategy": "adamw", "lr_warmup_ratio": 0.0,
    "lr_warmup_steps": None, "min_lr_ratio": None, "warmup_style": "constant",
}  # fmt: skip
FSDP: dict[str, Any] = {
    "enable_full_shard": True, "enable_cpu_offload": False, "enable_rank0_init": True, "use_orig_params": False,
    "torch_dtype": None, "fsdp_size": -1, "mp_param_dtype": "bf16", "mp_reduce_dtype": "fp32",
    "mp_buffer_dtype": "fp32",
}  # fmt: skip
OFFLOAD: dict[str, Any] = {"offload_params": False, "offload_optimizer": False}
VPPO: dict[str, Any] = {
    "use_vppo_on_entropy": False, "top_p_entropy_tokens": 0.2, "use_vppo_on_perception": False,
    "top_p_perception_tokens": 0.2, "use_entropy_penalty": False, "entropy_penalty_coef": 0.06,
    "use_advantage_shaping": False, "advantage_scaling_min": 0.8,
}  # fmt: skip

NESTED: dict[str, Any] = {
    "data": {
        "train_files": "", "val_files": "", "prompt_key": "prompt", "answer_key": "answer", "image_key": "images",
        "video_key": "videos", "image_dir": None, "video_fps": 2.0, "max_prompt_length": 512,
        "max_response_length": 512, "rollout_batch_size": 512, "mini_rollout_batch_size": None, "val_batch_size": -1,
        "format_prompt": None, "override_chat_template": None, "shuffle": True, "seed": 1, "min_pixels": 262144,
        "max_pixels": 4194304, "filter_overlong_prompts": True, "filter_overlong_prompts_workers": 16,
    },
    "worker": {
        "hybrid_engine": True,
        "actor": {
            "strategy": "fsdp", "global_batch_size": 256, "micro_batch_size_per_device_for_update": 4,
            "micro_batch_size_per_device_for_experience": 16, "max_grad_norm": 1.0, "clip_ratio_low": 0.2,
            "clip_ratio_high": 0.3, "clip_ratio_dual": 3.0, "loss_avg_mode": "token", "loss_type": "default",
            "ppo_epochs": 1, "padding_free": True, "dynamic_batching": True, "ulysses_size": 1,
            "use_torch_compile": True, **VPPO,
            "model": MODEL, "optim": OPTIM, "fsdp": FSDP, "offload": OFFLOAD,
        },
        "critic": {
            "strategy": "fsdp", "global_batch_size": 256, "micro_batch_size_per_device_for_update": 4,
            "micro_batch_size_per_device_for_experience": 16, "max_grad_norm": 1.0, "cliprange_value": 0.5,
            "loss_avg_mode": "token", "ppo_epochs": 1, "padding_free": False, "dynamic_batching": True,
            "ulysses_size": 1,
            "model": MODEL, "optim": OPTIM, "fsdp": FSDP, "offload": OFFLOAD,
        },
        "ref": {"strategy": "fsdp", "fsdp": FSDP, "offload": OFFLOAD},
        "reward": {
            "reward_type": "batch", "reward_function": None, "reward_function_kwargs": {},
            "skip_special_tokens": True, "num_cpus": 1,
        },
        "rollout": {
            "name": "vllm", "n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "seed": 1, "limit_images": 0,
            "dtype": "bf16", "gpu_memory_utilization": 0.6, "ignore_eos": False, "enforce_eager": False,
            "enable_chunked_prefill": False, "tensor_parallel_size": 2, "max_model_len": None,
            "max_num_batched_tokens": 8192, "disable_log_stats": True, "disable_tqdm": False,
            "val_override_config": {},
        },
    },
    "algorithm": {
        "gamma": 1.0, "lam": 1.0, "adv_estimator": "grpo", "disable_kl": False, "use_kl_loss": False,
        "kl_penalty": "kl", "kl_coef": 1e-3, "kl_type": "fixed", "kl_horizon": 10000.0, "kl_target": 0.1,
        "online_filtering": False, "filter_key": "overall", "filter_low": 0.01, "filter_high": 0.99, **VPPO,
    },
    "trainer": {
        "total_epochs": 15, "max_steps": None, "project_name": "easy_r1", "experiment_name": "demo",
        "logger": ("console", "wandb"), "nnodes": 1, "n_gpus_per_node": 8, "max_try_make_batch": 20,
        "critic_warmup": 0, "val_freq": -1, "val_before_train": True, "val_only": False,
        "val_generations_to_log": 0, "save_freq": -1, "save_limit": -1, "save_model_only": False,
        "save_checkpoint_path": None, "load_checkpoint_path": None, "ray_timeline": None,
        "find_last_checkpoint": True,
    },
}  # fmt: skip

SET_BY_PROGRAM: dict[str, Any] = {
    "worker.actor.global_batch_size_per_device": -1, "worker.actor.disable_kl": False,
    "worker.actor.use_kl_loss": False, "worker.actor.kl_penalty": "kl", "worker.actor.kl_coef": 0.0,
    "worker.actor.optim.training_steps": -1, "worker.critic.global_batch_size_per_device": -1,
    "worker.critic.optim.training_steps": -1, "worker.ref.micro_batch_size_per_device_for_experience": -1,
    "worker.ref.padding_free": False, "worker.ref.dynamic_batching": False, "worker.ref.ulysses_size": 1,
    "worker.ref.use_torch_compile": True, "worker.reward.reward_function_name": None,
    "worker.rollout.prompt_length": -1, "worker.rollout.response_length": -1,
    "worker.rollout.trust_remote_code": False,
}  # fmt: skip


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves by their dotted names. An empty mapping is a leaf."""
    leaves: dict[str, Any] = {}
    for key, value in nested.items():
        inside = flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
        leaves |= inside
    return leaves


SETTABLE = flat(NESTED)
