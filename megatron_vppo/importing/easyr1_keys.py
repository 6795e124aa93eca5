"""The table: every key of VPPO-RL, a fork of EasyR1 0.3.3, with the default of its dataclass and its rule here.

docs/import.md has the same table, which tools/import_table.py writes from this one.
"""

from __future__ import annotations

from megatron_vppo.importing import input_rules as inputs
from megatron_vppo.importing import objective_rules as objective
from megatron_vppo.importing import training_rules as training
from megatron_vppo.importing.actor_keys import ACTOR, CRITIC, REFERENCE, VPPO_FIELDS
from megatron_vppo.importing.rules import Computed, Dropped, Fixed, Same, TheirKey, keys_of
from megatron_vppo.importing.their_values import COUNT, FLAG, MAPPING, NUMBER, TEXT, TEXTS

ADAPTIVE = Dropped("of an adaptive kl_type, which is refused")
NO_GAE = Dropped("of the estimator gae, which is refused")
SET_BY_PROGRAM = Dropped("their program sets it, whatever is written")
DEVICES = Computed(
    ("algorithm.reference_devices",), training.devices, "all GPUs over ulysses_size, where advantages are shaped"
)

DATA = keys_of(
    "data",
    ("train_files", TEXT, "", Computed(("data.train_files",), inputs.train_rows, "must be set; path@split as there")),
    ("val_files", TEXT.or_null, "", Computed(("data.val_files",), inputs.val_rows, "empty is null: no validation")),
    ("prompt_key", TEXT, "prompt", Same("data.prompt_key")),
    ("answer_key", TEXT, "answer", Same("data.answer_key")),
    ("image_key", TEXT, "images", Same("data.image_key")),
    ("video_key", TEXT, "videos", Fixed(("videos",), "rows have images, no videos; leave it out")),
    ("image_dir", TEXT.or_null, None, Computed(("data.image_dir",), inputs.image_dir, "must exist; ignored there")),
    ("video_fps", NUMBER, 2.0, Dropped("of videos")),
    ("max_prompt_length", COUNT, 512, Same("data.max_prompt_length")),
    ("max_response_length", COUNT, 512, Same("data.max_response_length")),
    ("rollout_batch_size", COUNT, 512, Same("data.rollout_batch_size")),
    ("mini_rollout_batch_size", COUNT.or_null, None, Dropped("a step has no rounds here; their limit holds")),
    ("val_batch_size", COUNT, -1, Dropped("validation goes to the engines whole")),
    ("format_prompt", TEXT.or_null, None, Computed(("data.format_prompt",), inputs.format_prompt, "must exist")),
    (
        "override_chat_template", TEXT.or_null, None,
        Fixed((None,), "the chat template is that of the model's folder; put yours there, and set it to null"),
    ),
    ("shuffle", FLAG, True, Same("data.shuffle")),
    ("seed", COUNT, 1, Same("trainer.seed", "the order of the data; here also perturbations")),
    ("min_pixels", COUNT.or_null, 262144, Computed(("data.min_pixels",), inputs.min_pixels, "null is refused")),
    ("max_pixels", COUNT.or_null, 4194304, Computed(("data.max_pixels",), inputs.max_pixels, "null is refused")),
    (
        "filter_overlong_prompts", FLAG, True,
        Fixed((True,), "longer prompts are left out and counted, never cut, which would cut images; set it to true"),
    ),
    ("filter_overlong_prompts_workers", COUNT, 16, Same("data.num_workers")),
)  # fmt: skip

WORKER = keys_of("worker", ("hybrid_engine", FLAG, True, Fixed((True,), "engines share the trainer's GPUs; set true")))

REWARD = keys_of(
    "worker.reward",
    ("reward_type", TEXT, "batch", Computed(("reward.reward_type",), inputs.reward_type, "of a function of yours")),
    (
        "reward_function", TEXT.or_null, None,
        Computed(("reward.reward_function",), inputs.reward_function,
                 "math.py:compute_score_wo_format is mathruler; another file must exist; without a name :main"),
    ),
    ("reward_function_kwargs", MAPPING, {}, Same("reward.reward_function_kwargs", "of a function of yours")),
    ("skip_special_tokens", FLAG, True, Fixed((True,), "responses are graded without special tokens; set true")),
    ("num_cpus", COUNT, 1, Dropped("Ray's reservation; reward.num_workers follows the cores")),
)  # fmt: skip

ROLLOUT = keys_of(
    "worker.rollout",
    ("name", TEXT, "vllm", Fixed(("vllm",), "vLLM is the only engine; set vllm")),
    ("n", COUNT, 1, Same("rollout.n", "at least 2")),
    ("temperature", NUMBER, 1.0, Same("rollout.temperature")),
    ("top_p", NUMBER, 1.0, Same("rollout.top_p")),
    ("top_k", COUNT, -1, Same("rollout.top_k")),
    ("seed", COUNT, 1, Computed(("rollout.seeds",), inputs.rollout_seed, "1 is shared; another number is refused")),
    (
        "limit_images", COUNT, 0,
        Computed(("rollout.max_images_per_prompt",), inputs.limit_images, "0, no limit there, is our default"),
    ),
    ("dtype", TEXT, "bf16", Fixed(("bf16", "bfloat16"), "engines have model.dtype, which is bfloat16; set bf16")),
    (
        "gpu_memory_utilization", NUMBER, 0.6,
        Computed(("rollout.gpu_memory_utilization",), inputs.gpu_share, "the trainer differs: see a dry run"),
    ),
    ("ignore_eos", FLAG, False, Fixed((False,), "a response ends at its end token; set false")),
    ("enforce_eager", FLAG, False, Same("rollout.enforce_eager")),
    ("enable_chunked_prefill", FLAG, False, Dropped("of vLLM's first engine")),
    ("tensor_parallel_size", COUNT, 2, Same("rollout.tensor_parallel_size")),
    ("max_model_len", COUNT.or_null, None, Computed((), inputs.model_length, "refused if it is too short")),
    ("max_num_batched_tokens", COUNT, 8192, Dropped("vLLM's own number holds; no result depends on it", matters=True)),
    ("disable_log_stats", FLAG, True, Dropped("logs of vLLM are in files")),
    ("disable_tqdm", FLAG, False, Dropped("progress is shown our way")),
    (
        "val_override_config", MAPPING, {},
        Computed(("rollout.val.n", "rollout.val.temperature", "rollout.val.top_p"), inputs.val_sampling,
                 "what it lacks is that of worker.rollout; other parameters are refused"),
    ),
)  # fmt: skip

FILTERING, PERCEPTION = "algorithm.online_filtering", "algorithm.use_vppo_on_perception"
TOKEN_FILTER = Same("algorithm.top_p_perception_tokens")
MOST_DRAWS = Computed(
    ("algorithm.max_try_make_batch",), training.most_draws,
    "below 1, no limit, is 1000; at the limit a step trains on what it has, there the run ends",
)  # fmt: skip
ALGORITHM_RULES = {
    "use_vppo_on_entropy": (
        Fixed((False,), "one score ranks tokens here; set it to false, and algorithm.token_scores in our file"),
    ),
    "top_p_entropy_tokens": (Dropped("of use_vppo_on_entropy"),),
    "use_vppo_on_perception": (Same(PERCEPTION),),
    "top_p_perception_tokens": (TOKEN_FILTER, PERCEPTION),
    "use_entropy_penalty": (Same("algorithm.use_entropy_penalty"),),
    "entropy_penalty_coef": (Same("algorithm.entropy_penalty_coef"), "algorithm.use_entropy_penalty"),
    "use_advantage_shaping": (
        Computed(("algorithm.use_advantage_shaping",), training.shaping, "false without the token filter, as there"),
    ),
    "advantage_scaling_min": (
        Computed(("algorithm.advantage_scaling_min",), training.scaling_min, "where advantages are shaped"),
    ),
}
ALGORITHM = keys_of(
    "algorithm",
    ("gamma", NUMBER, 1.0, NO_GAE),
    ("lam", NUMBER, 1.0, NO_GAE),
    ("adv_estimator", TEXT, "grpo", Computed(("algorithm.advantage",), objective.advantage, "grpo and rloo")),
    ("disable_kl", FLAG, False, Dropped("true: kl_coef is 0 here")),
    ("use_kl_loss", FLAG, False, Computed(("algorithm.kl_in",), objective.kl_in, "true: loss; false: reward")),
    ("kl_penalty", TEXT, "kl", Computed(("algorithm.kl_kind",), objective.kl_kind, "k1, abs, k2, k3; not full")),
    ("kl_coef", NUMBER, 1e-3, Computed(("algorithm.kl_coef",), objective.kl_coef, "0 with disable_kl")),
    ("kl_type", TEXT, "fixed", Computed((), objective.kl_type, "fixed alone")),
    ("kl_horizon", NUMBER, 10000.0, ADAPTIVE),
    ("kl_target", NUMBER, 0.1, ADAPTIVE),
    ("online_filtering", FLAG, False, Same(FILTERING)),
    (
        "filter_key", TEXT, "overall",
        Computed((), training.filter_key, "accuracy; overall with mathruler only, where they are equal"), FILTERING,
    ),
    ("filter_low", NUMBER, 0.01, Same("algorithm.filter_low"), FILTERING),
    ("filter_high", NUMBER, 0.99, Same("algorithm.filter_high"), FILTERING),
    *((name, *field, *ALGORITHM_RULES[name]) for name, field in VPPO_FIELDS.items()),
)  # fmt: skip

TRAINER = keys_of(
    "trainer",
    ("total_epochs", COUNT, 15, Computed(("trainer.total_epochs",), training.epochs, "dropped next to max_steps")),
    ("max_steps", COUNT.or_null, None, Same("trainer.total_steps")),
    ("project_name", TEXT, "easy_r1", Same("trainer.project_name")),
    ("experiment_name", TEXT, "demo", Same("trainer.experiment_name")),
    (
        "logger", TEXTS, ("console", "wandb"),
        Computed(("trainer.loggers",), training.loggers, "console, tensorboard, file: always on; mlflow is refused"),
    ),
    ("nnodes", COUNT, 1, DEVICES),
    ("n_gpus_per_node", COUNT, 8, DEVICES),
    ("max_try_make_batch", COUNT, 20, MOST_DRAWS, FILTERING),
    ("critic_warmup", COUNT, 0, Fixed((0,), "there the actor waits for these steps; set trainer.critic_warmup=0")),
    ("val_freq", COUNT, -1, Computed(("trainer.val_freq",), training.val_freq, "below 1 is -1: at the ends")),
    ("val_before_train", FLAG, True, Same("trainer.val_before_train")),
    ("val_only", FLAG, False, Fixed((False,), "no command only validates; set trainer.val_only=false")),
    ("val_generations_to_log", COUNT, 0, Dropped("responses of validation are not recorded here", matters=True)),
    ("save_freq", COUNT, -1, Computed(("trainer.save_freq",), training.save_freq, "below 1 is -1: at the end")),
    ("save_limit", COUNT, -1, Computed(("trainer.save_limit",), training.save_limit, "below 1 is -1: all")),
    ("save_model_only", FLAG, False, Same("trainer.save_model_only")),
    (
        "save_checkpoint_path", TEXT.or_null, None,
        Computed(("trainer.runs_dir",), training.save_path, "refused unless it ends in project and experiment"),
    ),
    (
        "load_checkpoint_path", TEXT.or_null, None,
        Computed(("trainer.load_checkpoint_path",), training.load_path, "a checkpoint of ours; theirs are refused"),
    ),
    ("ray_timeline", TEXT.or_null, None, Dropped("Ray's")),
    ("find_last_checkpoint", FLAG, True, Same("trainer.resume", "false: a folder that has one is refused")),
)  # fmt: skip

PROGRAM = (
    *keys_of(
        "worker.actor",
        ("global_batch_size_per_device", COUNT, -1, SET_BY_PROGRAM),
        ("disable_kl", FLAG, False, SET_BY_PROGRAM),
        ("use_kl_loss", FLAG, False, SET_BY_PROGRAM),
        ("kl_penalty", TEXT, "kl", SET_BY_PROGRAM),
        ("kl_coef", NUMBER, 0.0, SET_BY_PROGRAM),
        ("optim.training_steps", COUNT, -1, SET_BY_PROGRAM),
    ),
    *keys_of(
        "worker.critic",
        ("global_batch_size_per_device", COUNT, -1, SET_BY_PROGRAM),
        ("optim.training_steps", COUNT, -1, SET_BY_PROGRAM),
    ),
    *keys_of(
        "worker.ref",
        ("micro_batch_size_per_device_for_experience", COUNT, -1, SET_BY_PROGRAM),
        ("padding_free", FLAG, False, SET_BY_PROGRAM),
        ("dynamic_batching", FLAG, False, SET_BY_PROGRAM),
        ("ulysses_size", COUNT, 1, SET_BY_PROGRAM),
        ("use_torch_compile", FLAG, True, SET_BY_PROGRAM),
    ),
    *keys_of("worker.reward", ("reward_function_name", TEXT.or_null, None, SET_BY_PROGRAM)),
    *keys_of(
        "worker.rollout",
        ("prompt_length", COUNT, -1, SET_BY_PROGRAM),
        ("response_length", COUNT, -1, SET_BY_PROGRAM),
        ("trust_remote_code", FLAG, False, SET_BY_PROGRAM),
    ),
)
"""Fields that cannot be passed to their dataclasses, but may stand in a file."""

SETTABLE = (*DATA, *ALGORITHM, *WORKER, *ACTOR, *CRITIC, *REFERENCE, *REWARD, *ROLLOUT, *TRAINER)
KEYS: dict[str, TheirKey] = {key.name: key for key in (*SETTABLE, *PROGRAM)}
"""Every key by its name."""
