"""The authors' configuration and scripts, as facts: their keys and values, in the form in which they pass them.

The values are those that VPPO-RL published on 2025-11-11: its base configuration, and what its scripts for the 7B and
the 8B model set over it. Nothing here is their text.
"""

from __future__ import annotations

from pathlib import Path

CONFIG = """
data:
  train_files: chamber111/VPPO_ViRL39K_train
  val_files: chamber111/VPPO_MMK12_validation
  prompt_key: problem
  answer_key: answer
  image_key: images
  max_prompt_length: 4096
  max_response_length: 2048
  rollout_batch_size: 384
  val_batch_size: 512
  format_prompt: examples/format_prompt/math_format_perception.jinja
  override_chat_template: null
  shuffle: true
  seed: 1
  max_pixels: 1003520
  min_pixels: 200704
  filter_overlong_prompts: true
algorithm:
  adv_estimator: grpo
  disable_kl: true
  use_kl_loss: true
  kl_penalty: low_var_kl
  kl_coef: 1.0e-2
  online_filtering: true
  filter_key: accuracy
  filter_low: 0.01
  filter_high: 0.99
worker:
  actor:
    clip_ratio_low: 0.2
    clip_ratio_high: 0.28
    dynamic_batching: false
    global_batch_size: 128
    micro_batch_size_per_device_for_update: 8
    micro_batch_size_per_device_for_experience: 16
    max_grad_norm: 1.0
    padding_free: true
    ulysses_size: 1
    model:
      model_path: Qwen/Qwen2.5-7B-Instruct
      enable_gradient_checkpointing: true
      trust_remote_code: true
      freeze_vision_tower: false
    optim: {lr: 1.0e-6, weight_decay: 1.0e-2, strategy: adamw_bf16, lr_warmup_ratio: 0.0}
    fsdp: {torch_dtype: bf16, enable_full_shard: true, enable_cpu_offload: false, enable_rank0_init: true}
    offload: {offload_params: true, offload_optimizer: true}
  rollout:
    n: 5
    temperature: 1.0
    top_p: 0.99
    gpu_memory_utilization: 0.9
    enforce_eager: false
    enable_chunked_prefill: false
    tensor_parallel_size: 2
    limit_images: 0
    val_override_config: {temperature: 1.0, n: 8}
  ref:
    dynamic_batching: false
    fsdp: {torch_dtype: bf16, enable_full_shard: true, enable_cpu_offload: true, enable_rank0_init: true}
    offload: {offload_params: false}
  reward:
    reward_type: batch
    reward_function: examples/reward_function/math.py
trainer:
  max_try_make_batch: -1
  total_epochs: 15
  max_steps: null
  project_name: easy_r1
  experiment_name: qwen2_5_3b_math_grpo
  logger: ["console", "wandb"]
  nnodes: 1
  n_gpus_per_node: 2
  val_freq: 5
  val_before_train: true
  val_only: false
  val_generations_to_log: 3
  save_freq: 5
  save_limit: 1
  save_checkpoint_path: null
  load_checkpoint_path: null
"""

COMMON = """
    config=${CONGI_FILE} \\
    data.train_files=chamber111/VPPO_ViRL39K_train \\
    data.val_files=chamber111/VPPO_MMK12_validation \\
    data.format_prompt=./examples/format_prompt/math_format_perception.jinja \\
    data.max_prompt_length=${MAX_PROMPT_LENGTH} \\
    data.max_response_length=${MAX_RESPONSE_LENGTH} \\
    worker.actor.model.model_path=${MODEL_PATH} \\
    worker.actor.micro_batch_size_per_device_for_update=${UPDATE} \\
    worker.actor.micro_batch_size_per_device_for_experience=${EXPERIENCE} \\
    worker.rollout.n=8 \\
    worker.rollout.tensor_parallel_size=1 \\
    worker.reward.reward_function=./examples/reward_function/math.py:compute_score_wo_format \\
    algorithm.use_vppo_on_perception=True \\
    algorithm.top_p_perception_tokens=${PERCEPTION} \\
    algorithm.use_entropy_penalty=True \\
    algorithm.entropy_penalty_coef=${PENALTY} \\
    algorithm.use_advantage_shaping=True \\
    algorithm.advantage_scaling_min=${SCALING} \\
    trainer.project_name="${PROJECT}" \\
    trainer.experiment_name="${EXPERIMENT}" \\
    trainer.logger=['console','swanlab'] \\
    trainer.n_gpus_per_node=8 \\
"""

SCRIPT_7B = f"""#!/bin/bash

set -x
export PYTHONUNBUFFERED=1

CONGI_FILE="examples/configs/config.yaml"
MODEL_PATH="Qwen/Qwen2.5-VL-7B-Instruct"  # or a folder
MAX_PROMPT_LENGTH=4096
MAX_RESPONSE_LENGTH=2048
UPDATE=16
EXPERIENCE=32
PERCEPTION=0.4
SCALING=0.9
PENALTY=0.06
EPOCHS=2
VAL_BATCH_SIZE=512
PROJECT="7b_vppo"
EXPERIMENT="perc${{PERCEPTION}}_advsc${{SCALING}}_pen${{PENALTY}}_ep${{EPOCHS}}_rollout8"

python3 -m verl.trainer.main \\{COMMON}    trainer.total_epochs=${{EPOCHS}}
"""

SCRIPT_8B = f"""#!/bin/bash
set -x
CONGI_FILE="examples/configs/config.yaml"
MODEL_PATH="Qwen/Qwen3-VL-8B-Instruct"
MAX_PROMPT_LENGTH=4096
MAX_RESPONSE_LENGTH=8192
UPDATE=4
EXPERIENCE=8
PERCEPTION=0.4
SCALING=0.9
PENALTY=0.12
MAX_STEPS=130
PROJECT="8b_vppo"
EXPERIMENT="perc${{PERCEPTION}}_pen${{PENALTY}}"
python3 -m verl.trainer.main \\{COMMON}    worker.rollout.max_num_batched_tokens=12289 \\
    trainer.max_steps=${{MAX_STEPS}} \\
    trainer.total_epochs=${{TOTAL_EPOCHES}}
"""


def make_repository(folder: Path) -> Path:
    """Writes the files as they lie in the authors' repository, except for templates and rewards. Returns its root."""
    root = folder / "VPPO-RL"
    (root / "examples" / "configs").mkdir(parents=True)
    (root / "examples" / "configs" / "config.yaml").write_text(CONFIG)
    (root / "train_vppo_7b.sh").write_text(SCRIPT_7B)
    (root / "train_vppo_8b.sh").write_text(SCRIPT_8B)
    return root
