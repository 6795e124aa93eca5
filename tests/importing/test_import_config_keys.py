"""Every key of theirs with other values than its default: what it becomes, or why it is refused or dropped."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.config.schema import RunConfig
from tests.importing.least import VPPO, import_keys
from tests.importing.their_keys import SET_BY_PROGRAM, SETTABLE

BY_ROWS = {"worker.actor.dynamic_batching": "false"}


def value_of(config: RunConfig, setting: str) -> Any:
    value: Any = functools.reduce(getattr, setting.split("."), config)
    return list(value) if isinstance(value, tuple) else value


def name_of(case: tuple[dict[str, str], object]) -> str:
    """The first key and value of a case, for its name."""
    return "=".join(next(iter(case[0].items())))


WITH_KL = {"algorithm.disable_kl": "false"}
# key, value of theirs, what our settings are; further keys that it needs are with it
TRANSLATED: list[tuple[dict[str, str], dict[str, Any]]] = [
    ({"algorithm.adv_estimator": "rloo"}, {"algorithm.advantage": "rloo"}),
    ({"worker.actor.loss_type": "gspo_token"}, {"algorithm.policy_loss": "gspo"}),
    ({"worker.actor.loss_type": "cispo"}, {"algorithm.policy_loss": "cispo"}),
    ({"algorithm.kl_coef": "1e-2"}, {"algorithm.kl_coef": 0.0}),
    (WITH_KL, {"algorithm.kl_coef": 1e-3, "algorithm.kl_kind": "k1", "algorithm.kl_in": "reward"}),
    ({"algorithm.kl_coef": "0.04"} | WITH_KL, {"algorithm.kl_coef": 0.04}),
    ({"algorithm.kl_coef": "0.0", "algorithm.kl_penalty": "abs"} | WITH_KL, {"algorithm.kl_coef": 0.0}),
    ({"algorithm.use_kl_loss": "true", "algorithm.kl_penalty": "low_var_kl"} | WITH_KL,
     {"algorithm.kl_in": "loss", "algorithm.kl_kind": "k3"}),
    ({"algorithm.kl_penalty": "mse"} | WITH_KL, {"algorithm.kl_kind": "k2"}),
    ({"data.train_files": "owner/rows@train[:100]"}, {"data.train_files": "owner/rows@train[:100]"}),
    ({"data.val_files": "owner/rows@test"}, {"data.val_files": "owner/rows@test"}),
    ({"data.val_files": "null"}, {"data.val_files": None}),
    ({"data.prompt_key": "question"}, {"data.prompt_key": "question"}),
    ({"data.answer_key": "truth"}, {"data.answer_key": "truth"}),
    ({"data.image_key": "photo"}, {"data.image_key": "photo"}),
    ({"data.max_prompt_length": "1024"}, {"data.max_prompt_length": 1024, "actor.max_tokens_per_micro_batch": 6144}),
    ({"data.max_response_length": "100"}, {"data.max_response_length": 100, "actor.max_tokens_per_micro_batch": 2448}),
    ({"data.rollout_batch_size": "256"}, {"data.rollout_batch_size": 256}),
    ({"data.shuffle": "False"}, {"data.shuffle": False}),
    ({"data.seed": "7"}, {"trainer.seed": 7}),
    ({"data.min_pixels": "1000"}, {"data.min_pixels": 1000}),
    ({"data.max_pixels": "500000"}, {"data.max_pixels": 500000}),
    ({"data.filter_overlong_prompts_workers": "3"}, {"data.num_workers": 3}),
    ({"worker.actor.global_batch_size": "128"}, {"actor.global_batch_size": 128}),
    (
        {"worker.actor.micro_batch_size_per_device_for_update": "6"},
        {"actor.micro_batch_size_per_device_for_update": 6, "actor.max_tokens_per_micro_batch": 6144},
    ),
    (
        BY_ROWS | {"worker.actor.micro_batch_size_per_device_for_experience": "10"},
        {"actor.micro_batch_size_per_device_for_experience": 10, "actor.max_tokens_per_micro_batch": None},
    ),
    (
        BY_ROWS | {"worker.actor.micro_batch_size_per_device_for_experience": "10"} | VPPO,
        {"actor.micro_batch_size_per_device_for_experience": 5},
    ),
    (
        BY_ROWS | {"worker.actor.micro_batch_size_per_device_for_experience": "1"} | VPPO,
        {"actor.micro_batch_size_per_device_for_experience": 1},
    ),
    ({"worker.actor.max_grad_norm": "0.5"}, {"actor.max_grad_norm": 0.5}),
    ({"worker.actor.clip_ratio_low": "0.1"}, {"algorithm.clip_ratio_low": 0.1}),
    ({"worker.actor.clip_ratio_high": "0.25"}, {"algorithm.clip_ratio_high": 0.25}),
    ({"worker.actor.clip_ratio_dual": "5"}, {"algorithm.clip_ratio_dual": 5.0}),
    ({"worker.actor.loss_avg_mode": "seq"}, {"algorithm.loss_avg_mode": "seq"}),
    ({"worker.actor.ppo_epochs": "2"}, {"actor.ppo_epochs": 2}),
    ({"worker.actor.ulysses_size": "2"}, {"parallel.context_parallel_size": 2}),
    ({"worker.actor.model.model_path": "Qwen/other"}, {"model.path": "Qwen/other"}),
    ({"worker.actor.model.enable_gradient_checkpointing": "no"}, {"parallel.recompute": "none"}),
    ({"worker.actor.model.freeze_vision_tower": "true"}, {"model.freeze": ["vision_tower", "projector"]}),
    ({"worker.actor.optim.lr": "2e-6"}, {"actor.optim.lr": 2e-6}),
    ({"worker.actor.optim.betas": "[0.9,0.95]"}, {"actor.optim.betas": [0.9, 0.95]}),
    ({"worker.actor.optim.weight_decay": "0.1"}, {"actor.optim.weight_decay": 0.1}),
    ({"worker.actor.optim.lr_warmup_steps": "12"}, {"actor.optim.lr_warmup_steps": 12}),
    ({"worker.actor.optim.lr_warmup_ratio": "0.05", "trainer.max_steps": "130"}, {"actor.optim.lr_warmup_steps": 6}),
    (
        {"worker.actor.optim.lr_warmup_ratio": "0.5", "worker.actor.optim.lr_warmup_steps": "3"},
        {"actor.optim.lr_warmup_steps": 3},
    ),
    ({"worker.actor.fsdp.torch_dtype": "fp32"}, {"model.dtype": "bfloat16"}),
    ({"worker.actor.offload.offload_params": "true"}, {"actor.offload": ["params", "grads"]}),
    ({"worker.actor.offload.offload_optimizer": "true"}, {"actor.offload": ["optimizer"]}),
    ({"worker.rollout.n": "5"}, {"rollout.n": 5}),
    ({"worker.rollout.temperature": "0.7"}, {"rollout.temperature": 0.7, "rollout.val.temperature": 0.7}),
    ({"worker.rollout.top_p": "0.8"}, {"rollout.top_p": 0.8, "rollout.val.top_p": 0.8}),
    (
        {"worker.rollout.top_k": "40", "worker.rollout.val_override_config.top_k": "-1"},
        {"rollout.top_k": 40},
    ),
    ({"worker.rollout.limit_images": "1"}, {"rollout.max_images_per_prompt": 1}),
    ({"worker.rollout.gpu_memory_utilization": "0.5"}, {"rollout.gpu_memory_utilization": 0.5}),
    ({"worker.rollout.enforce_eager": "true"}, {"rollout.enforce_eager": True}),
    ({"worker.rollout.tensor_parallel_size": "4"}, {"rollout.tensor_parallel_size": 4}),
    (
        {"worker.rollout.val_override_config": "{n: 8, temperature: 0.6, top_p: 0.95}"},
        {"rollout.val.n": 8, "rollout.val.temperature": 0.6, "rollout.val.top_p": 0.95},
    ),
    ({"algorithm.online_filtering": "true"}, {"algorithm.online_filtering": True, "algorithm.max_try_make_batch": 20}),
    ({"algorithm.filter_low": "0.2"} | VPPO, {"algorithm.filter_low": 0.2}),
    ({"algorithm.filter_high": "0.9"} | VPPO, {"algorithm.filter_high": 0.9}),
    ({"algorithm.filter_low": "0.2"}, {"algorithm.filter_low": 0.01}),
    (
        {"algorithm.use_vppo_on_perception": "true"},
        {"algorithm.use_vppo_on_perception": True, "algorithm.top_p_perception_tokens": 0.2},
    ),
    ({"algorithm.top_p_perception_tokens": "0.6"} | VPPO, {"algorithm.top_p_perception_tokens": 0.6}),
    ({"algorithm.use_entropy_penalty": "true"}, {"algorithm.use_entropy_penalty": True}),
    ({"algorithm.entropy_penalty_coef": "0.1"} | VPPO, {"algorithm.entropy_penalty_coef": 0.1}),
    (
        {"algorithm.use_advantage_shaping": "true", "algorithm.use_vppo_on_perception": "true"},
        {
            "algorithm.use_advantage_shaping": True, "algorithm.advantage_scaling_min": 0.8,
            "algorithm.reference_devices": 8,
        },
    ),
    ({"algorithm.use_advantage_shaping": "true"}, {"algorithm.use_advantage_shaping": False}),
    ({"algorithm.advantage_scaling_min": "0.7"} | VPPO, {"algorithm.advantage_scaling_min": 0.7}),
    ({"trainer.total_epochs": "3"}, {"trainer.total_epochs": 3}),
    ({"trainer.max_steps": "130"}, {"trainer.total_steps": 130}),
    ({"trainer.project_name": "mine"}, {"trainer.project_name": "mine"}),
    ({"trainer.experiment_name": "8"}, {"trainer.experiment_name": "8"}),
    ({"trainer.logger": "['console','wandb','swanlab']"}, {"trainer.loggers": ["wandb", "swanlab"]}),
    ({"trainer.logger": "[tensorboard,file]"}, {"trainer.loggers": []}),
    ({"trainer.nnodes": "4"} | VPPO, {"algorithm.reference_devices": 32}),
    ({"trainer.n_gpus_per_node": "2"} | VPPO, {"algorithm.reference_devices": 2}),
    ({"worker.actor.ulysses_size": "2"} | VPPO, {"algorithm.reference_devices": 4}),
    ({"trainer.max_try_make_batch": "6"} | VPPO, {"algorithm.max_try_make_batch": 6}),
    ({"trainer.max_try_make_batch": "0"} | VPPO, {"algorithm.max_try_make_batch": 1000}),
    (
        {"data.mini_rollout_batch_size": "100", "trainer.max_try_make_batch": "6"} | VPPO,
        {"algorithm.max_try_make_batch": 2},
    ),
    ({"trainer.val_freq": "1"}, {"trainer.val_freq": 1}),
    ({"trainer.val_freq": "0"}, {"trainer.val_freq": -1}),
    ({"trainer.val_before_train": "false"}, {"trainer.val_before_train": False}),
    ({"trainer.save_freq": "1"}, {"trainer.save_freq": 1}),
    ({"trainer.save_freq": "0"}, {"trainer.save_freq": -1}),
    ({"trainer.save_limit": "1"}, {"trainer.save_limit": 1}),
    ({"trainer.save_limit": "0"}, {"trainer.save_limit": -1}),
    ({"trainer.save_model_only": "true"}, {"trainer.save_model_only": True}),
    ({"trainer.save_checkpoint_path": "/big/easy_r1/demo"}, {"trainer.runs_dir": "/big"}),
    ({"trainer.find_last_checkpoint": "false"}, {"trainer.resume": False}),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "settings"), TRANSLATED, ids=map(name_of, TRANSLATED))
def test_a_value_becomes_settings(tmp_path: Path, keys: dict[str, str], settings: dict[str, Any]) -> None:
    config = import_keys(keys, tmp_path).config
    assert {name: value_of(config, name) for name in settings} == settings


REFUSED: list[tuple[dict[str, str], str]] = [
    ({"data.train_files": "''"}, "data.train_files = '': set data.train_files"),
    ({"data.video_key": "clips"}, "rows have images, no videos"),
    ({"data.image_dir": "nowhere"}, "there is no folder nowhere; there it is ignored"),
    ({"data.format_prompt": "nowhere/r1v.jinja"}, "there is no file nowhere/r1v.jinja"),
    ({"data.override_chat_template": "'{{ x }}'"}, "the chat template is that of the model's folder"),
    ({"data.min_pixels": "null"}, "a number is needed here"),
    ({"data.max_pixels": "null"}, "a number is needed here"),
    ({"data.filter_overlong_prompts": "false"}, "never cut, which would cut images"),
    ({"worker.hybrid_engine": "false"}, "engines share the trainer's GPUs"),
    ({"worker.actor.loss_type": "dppo"}, "set default, gspo, gspo_token, cispo"),
    (
        {"worker.actor.loss_type": "gspo", "worker.actor.ulysses_size": "2"},
        "it needs whole responses on a rank here; set worker.actor.ulysses_size=1",
    ),
    ({"worker.actor.model.model_path": "null"}, "set worker.actor.model.model_path"),
    ({"worker.actor.model.tokenizer_path": "other/model"}, "the tokenizer is that of model.path"),
    ({"worker.actor.model.override_config.num_hidden_layers": "2"}, "the model's config.json holds"),
    ({"worker.actor.optim.strategy": "sgd"}, "AdamW is the only optimizer"),
    ({"worker.actor.optim.lr_warmup_ratio": "0.1"}, "a share of the steps needs their number"),
    ({"worker.actor.fsdp.enable_cpu_offload": "true"}, "parameters are on the GPU while it trains"),
    ({"worker.actor.fsdp.torch_dtype": "fp16"}, "set bf16"),
    ({"worker.actor.fsdp.mp_param_dtype": "fp32"}, "the model computes in bfloat16"),
    ({"worker.actor.fsdp.mp_reduce_dtype": "bf16"}, "gradients are summed in float32"),
    ({"worker.reward.reward_function": "null"}, "set worker.reward.reward_function"),
    ({"worker.reward.reward_function": "nowhere.py:f"}, "there is no file nowhere.py"),
    ({"worker.reward.skip_special_tokens": "false"}, "graded without special tokens"),
    ({"worker.rollout.name": "sglang"}, "vLLM is the only engine"),
    ({"worker.rollout.seed": "42"}, "the seeds 42, 43, ... there, and 1, 2, ... here"),
    ({"worker.rollout.dtype": "fp16"}, "engines have model.dtype"),
    ({"worker.rollout.ignore_eos": "true"}, "a response ends at its end token"),
    ({"worker.rollout.max_model_len": "1000"}, "prompt and response have up to 1024 tokens"),
    ({"worker.rollout.top_k": "40"}, "validation has no top_k here, and 40 there"),
    ({"worker.rollout.val_override_config.presence_penalty": "1"}, "presence_penalty: validation has n, temperature"),
    ({"worker.rollout.val_override_config.n": "many"}, "should be a whole number"),
    ({"algorithm.adv_estimator": "gae"}, "set grpo or rloo"),
    ({"algorithm.adv_estimator": "reinforce_plus_plus"}, "over tokens there, and over responses here"),
    ({"algorithm.kl_penalty": "full"} | WITH_KL, "it needs all log-probs of the vocabulary"),
    ({"algorithm.kl_type": "adaptive"} | WITH_KL, "the weight is fixed here"),
    ({"algorithm.filter_key": "format"} | VPPO, "groups are kept by the 'accuracy'"),
    ({"algorithm.use_vppo_on_entropy": "true"}, "one score ranks tokens here"),
    ({"trainer.logger": "[console,mlflow]"}, "mlflow is no logger here; set wandb or swanlab"),
    ({"trainer.critic_warmup": "5"}, "there the actor waits for these steps"),
    ({"trainer.val_only": "true"}, "no command only validates"),
    ({"trainer.save_checkpoint_path": "/big/mine"}, "a folder ends in easy_r1/demo"),
    ({"trainer.load_checkpoint_path": "checkpoints/global_step_5"}, "theirs hold FSDP's shards"),
]


@pytest.mark.parametrize(("keys", "reason"), REFUSED, ids=map(name_of, REFUSED))
def test_a_value_is_refused_by_name(tmp_path: Path, keys: dict[str, str], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        import_keys(keys, tmp_path)
    message = str(caught.value)
    assert reason in message and message.startswith("theirs.yaml: 1 key cannot be imported; nothing is written\n  - ")
    name = message.partition("\n  - ")[2].partition(" = ")[0]
    assert name in SETTABLE and (next(iter(keys)).startswith(name) or name == "worker.rollout.val_override_config")


FIXED_LIKE_HERE: list[dict[str, str]] = [
    {"worker.actor.model.tokenizer_path": "some/model"},
    {"worker.actor.optim.strategy": "adamw_bf16"},
    {"worker.actor.fsdp.mp_param_dtype": "bfloat16"},
    {"worker.actor.fsdp.mp_reduce_dtype": "float32"},
    {"worker.rollout.dtype": "bfloat16"},
    {"worker.rollout.max_model_len": "1024"},
    {"algorithm.filter_key": "accuracy"},
    {"worker.reward.reward_type": "sequential"},
    {"data.mini_rollout_batch_size": "128"},
]
"""Values that are done here anyway: nothing of our file depends on them."""
DROPPED: dict[str, str] = {
    "data.video_fps": "1.0", "data.val_batch_size": "512", "worker.actor.strategy": "fsdp2",
    "worker.actor.padding_free": "false", "worker.actor.use_torch_compile": "false",
    "worker.actor.model.trust_remote_code": "false", "worker.actor.optim.min_lr_ratio": "0.1",
    "worker.actor.optim.warmup_style": "cosine", "worker.actor.fsdp.enable_full_shard": "false",
    "worker.actor.fsdp.enable_rank0_init": "false", "worker.actor.fsdp.use_orig_params": "true",
    "worker.actor.fsdp.fsdp_size": "4", "worker.actor.fsdp.mp_buffer_dtype": "bf16",
    "worker.reward.num_cpus": "4", "worker.rollout.enable_chunked_prefill": "true",
    "worker.rollout.max_num_batched_tokens": "12289", "worker.rollout.disable_log_stats": "false",
    "worker.rollout.disable_tqdm": "true", "algorithm.gamma": "0.9", "algorithm.lam": "0.9",
    "algorithm.use_kl_loss": "true", "algorithm.kl_penalty": "low_var_kl",
    "algorithm.kl_type": "adaptive", "algorithm.kl_horizon": "1", "algorithm.kl_target": "1",
    "algorithm.top_p_entropy_tokens": "0.5", "trainer.val_generations_to_log": "3", "trainer.ray_timeline": "x.json",
}  # fmt: skip
"""Keys of whose value nothing here depends, with another value than their default."""
SAID = {
    "worker.actor.optim.min_lr_ratio", "worker.actor.optim.warmup_style", "worker.rollout.max_num_batched_tokens",
    "trainer.val_generations_to_log",
}  # fmt: skip
"""Those of DROPPED that are said to differ."""


def other_than(default: Any) -> str:
    """A value that is not the default, as an override has it."""
    if isinstance(default, bool):
        return str(not default)
    if isinstance(default, dict):
        return "{some: 1}"
    if isinstance(default, tuple):
        return "[0.5, 0.5]"
    return str(default + 1) if isinstance(default, int | float) else "7"


def of_no_effect() -> dict[str, str]:
    groups = {k: v for k, v in (SETTABLE | SET_BY_PROGRAM).items() if k.startswith(("worker.critic.", "worker.ref."))}
    overwritten = {
        k: v for k, v in SETTABLE.items() if k.startswith("worker.actor.") and f"algorithm.{k[13:]}" in SETTABLE
    }
    return {k: other_than(v) for k, v in (groups | SET_BY_PROGRAM | overwritten).items()}


@pytest.mark.parametrize(
    "keys",
    [*FIXED_LIKE_HERE, *({k: v} for k, v in (DROPPED | of_no_effect()).items())],
    ids=lambda keys: next(iter(keys)),
)
def test_a_value_changes_nothing(tmp_path: Path, keys: dict[str, str]) -> None:
    plain, imported = import_keys({}, tmp_path), import_keys(keys, tmp_path)
    assert imported.config == plain.config and imported.text == plain.text
    (name,) = keys
    assert any(line.startswith(f"{name} = ") for line in imported.dropped)


def test_some_dropped_values_are_said_to_differ(tmp_path: Path) -> None:
    plain, imported = import_keys({}, tmp_path), import_keys(DROPPED | of_no_effect(), tmp_path)
    new = {line.partition(" = ")[0] for line in set(imported.differs) - set(plain.differs)}
    overwritten = {f"worker.actor.{name.removeprefix('algorithm.')}" for name in SETTABLE if "algorithm." in name}
    assert new == SAID | (overwritten & SETTABLE.keys())
    assert not set(plain.differs) - set(imported.differs)


def test_every_key_was_tried_with_another_value() -> None:
    tried = {key for keys, _ in [*TRANSLATED, *REFUSED] for key in keys}
    tried |= {key for keys in FIXED_LIKE_HERE for key in keys} | DROPPED.keys() | of_no_effect().keys()
    of_mappings = {"worker.rollout.val_override_config", "worker.actor.model.override_config"}
    tried |= {mapping for mapping in of_mappings if any(key.startswith(mapping) for key in tried)}
    in_their_own_tests = {"worker.reward.reward_function", "worker.reward.reward_function_kwargs"}
    assert sorted((SETTABLE.keys() | SET_BY_PROGRAM.keys()) - tried - in_their_own_tests) == []


def test_warmup_dynamic_batches_and_shaping_say_how_they_differ(tmp_path: Path) -> None:
    def differs(keys: dict[str, str], name: str) -> str:
        return next((line for line in import_keys(keys, tmp_path).differs if line.startswith(f"{name} = ")), "")

    assert "step k of the 12 has k/12 of the rate here, and (k-1)/12 there" in differs(
        {"worker.actor.optim.lr_warmup_steps": "12"}, "worker.actor.optim.lr_warmup_steps"
    )
    assert "step k of the 1 has" in differs(
        {"worker.actor.optim.lr_warmup_steps": "1"}, "worker.actor.optim.lr_warmup_steps"
    )
    assert "not 16 rows of full length" in differs({}, "worker.actor.dynamic_batching")
    assert differs({"worker.actor.dynamic_batching": "false"}, "worker.actor.dynamic_batching") == ""
    shaping = "algorithm.use_advantage_shaping"
    assert "does nothing there without use_vppo_on_perception" in differs({shaping: "true"}, shaping)
    assert differs(VPPO, shaping) == ""
