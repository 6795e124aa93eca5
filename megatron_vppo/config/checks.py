"""Combinations of settings that cannot work, each refused by a small function with the numbers and what to set.

Only the impossible is refused: what is merely unusual is the user's business. A setting without effect counts as
impossible if the run would then be another than its file says.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from megatron_vppo.config.choices import DEPENDENCY_SCORES, GRADERS
from megatron_vppo.config.data_files import files_of, name_of, settings_of_files
from megatron_vppo.config.method_checks import (
    check_overlong,
    check_perception_loss,
    check_score_centering,
    check_shaping,
    check_token_scores,
    is_changed,
)
from megatron_vppo.config.ranges import LEAST_TEMPERATURE
from megatron_vppo.config.schema import RewardConfig, RunConfig


def problems_of(config: RunConfig) -> list[str]:
    """Returns the messages of all CHECKS, which need nothing but the config."""
    problems = []
    for check in CHECKS:
        try:
            check(config)
        except ValueError as problem:
            problems.append(str(problem))
    return problems


def check_layout(config: RunConfig, world_size: int) -> int:
    """Returns the data-parallel size of `world_size` trainer ranks.

    Raises ValueError if tensor x context x pipeline x data is another number of ranks.
    """
    parallel = config.parallel
    copy = ranks_per_copy(config)
    model = (
        f"tensor_model_parallel_size {parallel.tensor_model_parallel_size} x context_parallel_size "
        f"{parallel.context_parallel_size} x pipeline_model_parallel_size {parallel.pipeline_model_parallel_size} = "
        f"{copy} ranks per model copy"
    )
    if world_size % copy:
        below = world_size - world_size % copy
        counts = f"{below} or {below + copy}" if below else f"{copy}"
        raise ValueError(f"{model} does not divide {world_size} ranks; start {counts} ranks, or change parallel.*")
    fitting = world_size // copy
    asked = parallel.data_parallel_size
    if asked is not None and asked != fitting:
        raise ValueError(
            f"{model}, x data_parallel_size {asked} = {copy * asked}, but there are {world_size} ranks; "
            f"set parallel.data_parallel_size={fitting} (or null), or start {copy * asked} ranks"
        )
    return fitting


def ranks_per_copy(config: RunConfig) -> int:
    """Counts the trainer ranks that hold one copy of the model."""
    parallel = config.parallel
    return parallel.tensor_model_parallel_size * parallel.context_parallel_size * parallel.pipeline_model_parallel_size


def check_training(config: RunConfig) -> None:
    """Refuses settings without effect in a training run; `vppo fp8-fidelity` takes them."""
    ends = config.fp8.bf16_layers_at_ends
    if ends and config.fp8.recipe is None and config.rollout.quantization is None:
        raise ValueError(
            f"fp8.bf16_layers_at_ends={ends} keeps layers out of FP8, which nothing uses; set fp8.recipe or "
            "rollout.quantization, or leave it out"
        )


def check_device(config: RunConfig, *, on_cpu: bool) -> None:
    """Refuses settings that need GPUs on a machine without."""
    if not on_cpu:
        return
    gpu_only = {
        "actor.offload": (list(config.actor.offload), []),
        "rollout.free_cache_engine": (config.rollout.free_cache_engine or False, False),
        "rollout.weight_transfer": (config.rollout.weight_transfer.replace("auto", "shm"), "shm"),
        "rollout.quantization": (config.rollout.quantization, None),
    }
    for name, (asked, possible) in gpu_only.items():
        if asked != possible:
            raise ValueError(f"{name} is {asked}, which needs GPUs, and this machine has none; leave it out")


def check_pipeline(config: RunConfig) -> None:
    """Refuses a split of the layers without one entry per stage, and virtual stages without a pipeline."""
    layers, pipeline = config.parallel.pipeline_layers, config.parallel.pipeline_model_parallel_size
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    if virtual > 1 and pipeline == 1:
        raise ValueError(
            f"parallel.virtual_pipeline_model_parallel_size {virtual} interleaves the stages of a pipeline, but "
            "parallel.pipeline_model_parallel_size is 1; raise it, or set the virtual size to 1"
        )
    if layers is not None and len(layers) != pipeline * virtual:
        raise ValueError(
            f"parallel.pipeline_layers {list(layers)} describes {len(layers)} stages, but "
            f"parallel.pipeline_model_parallel_size is {pipeline}"
            + (f" with {virtual} virtual stages on each rank" if virtual > 1 else "")
            + f"; give one number per stage, {pipeline * virtual} in all"
        )


def check_freeze(config: RunConfig) -> None:
    """Refuses to freeze the whole model."""
    if len(set(config.model.freeze)) == 3:
        raise ValueError(
            "model.freeze names vision_tower, projector and language_model: nothing is left to train; drop one of them"
        )


def check_offload(config: RunConfig) -> None:
    """Refuses an offload that makes room for nobody: for engines that never give up the memory they hold."""
    if config.actor.offload and config.rollout.free_cache_engine is False:
        raise ValueError(
            f"actor.offload {list(config.actor.offload)} makes room for engines while they sample, but with "
            "rollout.free_cache_engine=false they hold the same memory all the time; leave one of the two out"
        )


def check_fp8(config: RunConfig) -> None:
    """Refuses a recipe that no phase uses, and 'delayed' without updates, from which it takes its scales."""
    fp8 = config.fp8
    if fp8.recipe is not None and not fp8.scope:
        raise ValueError(
            f"fp8.recipe '{fp8.recipe}' is used nowhere, since fp8.scope is empty; name a phase, or leave both out"
        )
    if fp8.recipe == "delayed" and set(fp8.scope) == {"scoring"}:
        raise ValueError(
            "fp8.recipe 'delayed' takes its scales from updates, which fp8.scope leaves out; add 'update' to it, "
            "or take fp8.recipe 'tensorwise'"
        )


def check_rollout_quantization(config: RunConfig) -> None:
    """Refuses quantised engines of a float32 model: vLLM quantises 16-bit weights."""
    if config.rollout.quantization is not None and config.model.dtype == "float32":
        raise ValueError(
            f"rollout.quantization '{config.rollout.quantization}' needs model.dtype=bfloat16, and it is float32; "
            "change one of the two"
        )


def check_batches(config: RunConfig) -> None:
    """Refuses a training step that is not a whole number of optimizer steps."""
    rollout, update = config.data.rollout_batch_size, config.actor.global_batch_size
    if update > rollout:
        raise ValueError(
            f"actor.global_batch_size {update} is more than data.rollout_batch_size {rollout}, both in prompts; "
            f"set actor.global_batch_size to {rollout} or a divisor of it"
        )
    if rollout % update:
        nearest = max(d for d in range(1, update) if rollout % d == 0)
        raise ValueError(
            f"data.rollout_batch_size {rollout} is no multiple of actor.global_batch_size {update} (prompts per step "
            f"and per optimizer step): {rollout % update} prompts would be left over; set actor.global_batch_size="
            f"{nearest} or data.rollout_batch_size={rollout - rollout % update}"
        )


def check_micro_batch_tokens(config: RunConfig) -> None:
    """Refuses micro-batches that the longest row would not fit."""
    most, data = config.actor.max_tokens_per_micro_batch, config.data
    longest = data.max_prompt_length + data.max_response_length - 1  # an update does not read the last token
    if most is not None and most < 2 * longest and _updates_both_views(config):
        raise ValueError(
            f"actor.max_tokens_per_micro_batch is {most}, and both views of the longest row, which the perception loss "
            f"reads at once, have 2 x {longest} tokens; set at least {2 * longest}, or "
            "algorithm.perception_gradient=original_view"
        )
    in_scoring, counted = longest, " - 1"
    if _reads_to_end(config):
        in_scoring, counted = longest + 1, ", all of which algorithm.dependency 'visual_focus' reads"
    if most is not None and most < in_scoring:
        raise ValueError(
            f"actor.max_tokens_per_micro_batch is {most}, and the longest row has {in_scoring} tokens "
            f"(data.max_prompt_length {data.max_prompt_length} + data.max_response_length {data.max_response_length}"
            f"{counted}); set at least {in_scoring}"
        )


def check_sampling(config: RunConfig) -> None:
    """Refuses sampling settings that vLLM refuses later, and a correction between two different distributions."""
    rollout = config.rollout
    if rollout.top_k != -1 and rollout.top_k < 1:
        raise ValueError(f"rollout.top_k is {rollout.top_k}; set -1 (off) or at least 1")
    if 0 < rollout.val.temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"rollout.val.temperature is {rollout.val.temperature}, and vLLM samples at {LEAST_TEMPERATURE} at least; "
            f"set 0 (greedy) or at least {LEAST_TEMPERATURE}"
        )
    if rollout.val.temperature == 0 and rollout.val.n > 1:
        raise ValueError(
            f"rollout.val.temperature is 0, so all {rollout.val.n} validation samples of a prompt would be the same; "
            "set rollout.val.n=1 or a temperature above 0"
        )
    cap = config.algorithm.rollout_correction_cap
    if cap is not None and (rollout.top_p < 1 or rollout.top_k != -1):
        raise ValueError(
            f"algorithm.rollout_correction_cap {cap} compares the trainer's full distribution with a sampler cut by "
            f"top_p {rollout.top_p} and top_k {rollout.top_k}; set rollout.top_p=1 rollout.top_k=-1, or the cap to null"
        )


def check_perturbation(config: RunConfig) -> None:
    """Refuses a patch size at stage 'patches', and squares without a size at stage 'pixels'."""
    perturb = config.algorithm.perturb
    if perturb.stage == "patches" and perturb.patch_size is not None:
        raise ValueError(
            f"algorithm.perturb.patch_size {perturb.patch_size} has no effect at stage 'patches', which uses the "
            "model's own patches; leave it out, or set algorithm.perturb.stage=pixels"
        )
    if perturb.stage == "pixels" and perturb.kind == "patch_black" and perturb.patch_size is None:
        raise ValueError(
            "algorithm.perturb.stage 'pixels' blacks squares of a fixed size; set algorithm.perturb.patch_size "
            "(the authors use 14), or algorithm.perturb.stage=patches"
        )


def check_reference_devices(config: RunConfig) -> None:
    """Refuses an emulated split of the devices on which no statistic depends."""
    algorithm = config.algorithm
    if algorithm.reference_devices is None:
        return
    scopes = (algorithm.shaping_min_scope, algorithm.shaping_mean_scope)
    if not algorithm.use_advantage_shaping or scopes == ("minibatch", "minibatch"):
        raise ValueError(
            f"algorithm.reference_devices {algorithm.reference_devices} has no effect with use_advantage_shaping="
            f"{str(algorithm.use_advantage_shaping).lower()}, shaping_min_scope '{scopes[0]}' and shaping_mean_scope "
            f"'{scopes[1]}'; leave it out, or set algorithm.preset=reference"
        )


def check_filter(config: RunConfig) -> None:
    """Refuses a lower bound of group filtering that is not below the upper one."""
    algorithm = config.algorithm
    if algorithm.online_filtering and algorithm.filter_low >= algorithm.filter_high:
        raise ValueError(
            f"no mean accuracy lies between algorithm.filter_low {algorithm.filter_low} and filter_high "
            f"{algorithm.filter_high}; set filter_low below filter_high, or algorithm.online_filtering=false"
        )


def check_order(config: RunConfig) -> None:
    """Refuses an order of arrival where all prompts that may be sampled are waited for."""
    algorithm = config.algorithm
    if config.rollout.order == "arrival" and (not algorithm.online_filtering or algorithm.max_try_make_batch == 1):
        raise ValueError(
            f"rollout.order 'arrival' has no effect with algorithm.online_filtering="
            f"{str(algorithm.online_filtering).lower()} and max_try_make_batch {algorithm.max_try_make_batch}: a step "
            "waits for all of its prompts; leave it out, or set online_filtering=true and max_try_make_batch above 1"
        )


def check_token_weights(config: RunConfig) -> None:
    """Refuses ways to choose and weigh tokens that have no effect, or that say nothing together."""
    algorithm = config.algorithm
    changed = [
        f"algorithm.{name} '{getattr(algorithm, name)}'"
        for name, usual in (("token_scores", "dependency"), ("token_weighting", "mask"))
        if getattr(algorithm, name) != usual
    ]
    if changed and not algorithm.use_vppo_on_perception:
        raise ValueError(
            f"{' and '.join(changed)}: no effect with algorithm.use_vppo_on_perception=false, which filters no tokens; "
            "leave it out, or set use_vppo_on_perception=true"
        )
    if algorithm.token_weighting != "mask" and algorithm.token_scores in ("random", "dependency_or_entropy"):
        raise ValueError(
            f"algorithm.token_weighting '{algorithm.token_weighting}' weighs tokens by one score that says something, "
            f"and token_scores is '{algorithm.token_scores}'; set token_scores to dependency or entropy, or "
            "token_weighting=mask"
        )
    idle = [name for name in ("pgpo_tau", "pgpo_beta") if is_changed(algorithm, name)]
    if idle and algorithm.token_weighting != "pgpo":
        raise ValueError(f"algorithm.{' and '.join(idle)} without effect: token_weighting is not 'pgpo'; leave it out")
    low, high = algorithm.advantage_scaling_min, algorithm.advantage_scaling_max
    if high is not None and not algorithm.use_advantage_shaping:
        raise ValueError(
            f"algorithm.advantage_scaling_max {high} has no effect with use_advantage_shaping=false; leave it out"
        )
    if high is not None and high < low:
        raise ValueError(f"algorithm.advantage_scaling_max {high} is below advantage_scaling_min {low}; raise it")


def check_policy_loss(config: RunConfig) -> None:
    """Refuses losses on ranks that cannot compute them, and settings of a loss that it does not read."""
    algorithm = config.algorithm
    context = config.parallel.context_parallel_size
    if algorithm.policy_loss == "gspo" and context > 1:
        raise ValueError(
            f"algorithm.policy_loss 'gspo' needs whole responses, and parallel.context_parallel_size {context} cuts "
            "them; set it to 1, or another loss"
        )
    idle = [name for name in ("sapo_tau_positive", "sapo_tau_negative") if is_changed(algorithm, name)]
    if idle and algorithm.policy_loss != "sapo":
        raise ValueError(f"algorithm.{' and '.join(idle)} without effect: policy_loss is not 'sapo'; leave it out")
    if algorithm.loss_avg_mode == "fixed_length" and algorithm.loss_denominator == "selected":
        raise ValueError(
            "algorithm.loss_denominator 'selected' has no effect with loss_avg_mode 'fixed_length', which divides by "
            "data.max_response_length; leave it out"
        )
    changed = [f"{name} '{getattr(algorithm, name)}'" for name in ("kl_kind", "kl_in") if is_changed(algorithm, name)]
    if changed and not algorithm.kl_coef:
        raise ValueError(
            f"algorithm.{' and '.join(changed)}: no effect without a reference model; set algorithm.kl_coef (0.01 is "
            "usual), or leave it out"
        )
    if algorithm.rollout_correction != "token" and algorithm.rollout_correction_cap is None:
        raise ValueError(
            f"algorithm.rollout_correction '{algorithm.rollout_correction}' has no effect without a cap; set "
            "algorithm.rollout_correction_cap (3 is usual), or leave it out"
        )


def _updates_both_views(config: RunConfig) -> bool:
    return config.algorithm.perception_loss_coef > 0 and config.algorithm.perception_gradient == "both_views"


def _reads_to_end(config: RunConfig) -> bool:
    """Returns True if scoring reads the last tokens of responses, too: visual_focus compares their hidden states."""
    algorithm = config.algorithm
    filters = algorithm.use_vppo_on_perception and algorithm.token_scores in DEPENDENCY_SCORES
    return algorithm.dependency == "visual_focus" and (filters or algorithm.use_advantage_shaping)


def check_carry(config: RunConfig) -> None:
    """Refuses to carry groups where none is left, and where nothing corrects for their older weights."""
    if config.rollout.unfinished == "drop":
        return
    algorithm = config.algorithm
    if not algorithm.online_filtering or algorithm.max_try_make_batch == 1:
        raise ValueError(
            f"rollout.unfinished 'carry' has no effect with algorithm.online_filtering="
            f"{str(algorithm.online_filtering).lower()} and max_try_make_batch {algorithm.max_try_make_batch}: a step "
            "needs all of its prompts; leave it out, or set online_filtering=true and max_try_make_batch above 1"
        )
    if algorithm.rollout_correction_cap is None:
        raise ValueError(
            "rollout.unfinished 'carry' trains on tokens that older weights sampled, and nothing corrects for that; "
            "set algorithm.rollout_correction_cap (2 is usual), or rollout.unfinished=drop"
        )


def check_data_files(config: RunConfig) -> None:
    """Refuses an empty list, files of one name, weights for some files only, and weights that nothing is drawn by."""
    for setting in ("train_files", "val_files"):
        paths: dict[str, str] = {}
        given = getattr(config.data, setting)
        if given == ():
            raise ValueError(f"data.{setting} is a list without a file; name one, or several")
        for file in given if isinstance(given, tuple) else ():
            if (name := name_of(file)) in paths:
                raise ValueError(
                    f"data.{setting}: {paths[name]} and {file.path} are both called {name!r}; give one of them a name "
                    "of its own, such as {path: ..., name: geometry}"
                )
            paths[name] = file.path
    weights = [file.weight for file in files_of(config.data, "train").values()]
    if None in weights and any(weights):
        without = [file.path for file in files_of(config.data, "train").values() if file.weight is None]
        raise ValueError(
            f"data.train_files: {', '.join(without)} without a weight next to files with one; give every file a "
            "weight, or none"
        )
    if any(file.weight is not None for file in files_of(config.data, "val").values()):
        raise ValueError("data.val_files: weights have no effect, since every row is validated on; leave them out")


def check_keys(config: RunConfig) -> None:
    """Refuses one column for two purposes: the answer would stand in the prompt."""
    for setting, file in settings_of_files(config.data).items():
        keys = {"prompt_key": file.prompt_key, "answer_key": file.answer_key, "image_key": file.image_key}
        for (one, column), (other, same) in itertools.combinations(keys.items(), 2):
            if column == same:
                where = f" of {setting}" if "[" in setting else ""
                raise ValueError(
                    f"data.{one} and data.{other}{where} are both '{column}'; each names a column of its own, so set "
                    "one of them"
                )


def check_pixels(config: RunConfig) -> None:
    """Refuses a pixel budget whose lower bound is above its upper one."""
    low, high = config.data.min_pixels, config.data.max_pixels
    if low > high:
        raise ValueError(f"data.min_pixels {low} is more than data.max_pixels {high}; set min_pixels to at most {high}")


def check_background(config: RunConfig) -> None:
    """Refuses a background that the authors' resize does not look at."""
    default = type(config.data).model_fields["background"].default
    if config.algorithm.resize == "easyr1" and config.data.background != default:
        raise ValueError(
            f"data.background '{config.data.background}' has no effect with algorithm.resize 'easyr1', which drops "
            "transparency as the authors' code does; leave it out, or set algorithm.resize=smart"
        )


def check_optimizer(config: RunConfig) -> None:
    """Refuses decay rates of AdamW outside [0, 1), a weight decay that turns the signs of the weights, and a floor of a
    learning rate that does not fall.
    """
    optim = config.actor.optim
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise ValueError(f"actor.optim.betas is {list(optim.betas)}; both belong in [0, 1), for example [0.9, 0.999]")
    if optim.lr * optim.weight_decay >= 1:
        raise ValueError(
            f"actor.optim.lr {optim.lr} x weight_decay {optim.weight_decay} = {optim.lr * optim.weight_decay:g} is the "
            f"share of each weight that a step takes away; set actor.optim.weight_decay below {1 / optim.lr:g}"
        )
    if optim.min_lr_ratio and optim.lr_scheduler_type == "constant":
        raise ValueError(
            f"actor.optim.min_lr_ratio {optim.min_lr_ratio} has no effect with lr_scheduler_type 'constant'; leave it "
            "out, or set actor.optim.lr_scheduler_type to linear or cosine"
        )


def check_warmup(config: RunConfig, *, total_steps: int | None = None) -> None:
    """Refuses a warm-up that is longer than the run, which would never have its learning rate.

    Args:
        total_steps: the steps of the run; None: trainer.total_steps, if it is set.
    """
    warmup, steps = config.actor.optim.lr_warmup_steps, total_steps or config.trainer.total_steps
    if steps is not None and warmup > steps:
        raise ValueError(
            f"actor.optim.lr_warmup_steps {warmup} is more than the {steps} steps of the run, so that actor.optim.lr "
            f"{config.actor.optim.lr} is never reached; set it to at most {steps}"
        )


def check_intervals(config: RunConfig) -> None:
    """Refuses intervals that are neither a positive number of steps nor -1, which means only at the ends.

    So with the number of checkpoints that are kept, where -1 means all.
    """
    for name in ("val_freq", "save_freq"):
        value = getattr(config.trainer, name)
        if value != -1 and value < 1:
            raise ValueError(f"trainer.{name} is {value}; set a number of steps of at least 1, or -1")
    limit = config.trainer.save_limit
    if limit != -1 and limit < 1:
        raise ValueError(f"trainer.save_limit is {limit}; set a number of checkpoints of at least 1, or -1 to keep all")


def check_resume(config: RunConfig) -> None:
    """Refuses a step to go on from in a run that must not go on."""
    step = config.trainer.resume_step
    if step is not None and not config.trainer.resume:
        raise ValueError(
            f"trainer.resume_step {step} has no effect with trainer.resume=false; leave it out, or set "
            "trainer.resume=true"
        )


def check_timeouts(config: RunConfig) -> None:
    """Refuses engines that are given up only after the ranks that wait for them have given up."""
    engine, ranks = config.rollout.engine_timeout_seconds, config.parallel.collective_timeout_seconds
    if engine >= ranks:
        raise ValueError(
            f"rollout.engine_timeout_seconds {engine:g} is not below parallel.collective_timeout_seconds {ranks:g}: "
            "the other ranks would give up before an engine that hangs is started again; raise the second"
        )


def check_watchdog(config: RunConfig) -> None:
    """Refuses a watchdog that every other step would wake."""
    factor = config.trainer.watchdog
    if 0 < factor <= 1:
        raise ValueError(
            f"trainer.watchdog is {factor:g}: half of the steps take longer than {factor:g} times their median; set "
            "several times the median, or 0 for no limit"
        )


def check_reward(config: RunConfig) -> None:
    """Refuses a name that is neither a built-in grader's nor a function with its file, and parts that leave it out."""
    reward = config.reward
    name = reward.reward_function
    file, colon, function = name.rpartition(":")
    if name not in GRADERS and not (colon and file and function.isidentifier()):
        raise ValueError(f"reward.reward_function is '{name}'; set file.py:function, or one of {', '.join(GRADERS)}")
    if reward.parts and name not in GRADERS:
        raise ValueError(
            f"reward.parts adds up built-in graders, and reward.reward_function is '{name}'; leave reward.parts out, "
            "and add up in your function"
        )
    if reward.parts and name not in reward.parts:
        raise ValueError(
            f"reward.parts {dict(reward.parts)} has no weight for reward.reward_function '{name}', whose accuracy "
            "counts; add it, or set reward.reward_function to one of the parts"
        )
    if reward.reward_function_kwargs and name in GRADERS:
        raise ValueError(
            f"reward.reward_function_kwargs {reward.reward_function_kwargs} are arguments of a function of yours, and "
            f"reward.reward_function is the built-in '{name}'; leave them out"
        )


def check_grader_settings(config: RunConfig) -> None:
    """Refuses a tolerance or threshold of a grader that the run does not use."""
    reward = config.reward
    used = {reward.reward_function, *reward.parts}
    for setting, grader in (
        ("relative_tolerance", "number"),
        ("absolute_tolerance", "number"),
        ("iou_threshold", "iou"),
    ):
        value = getattr(reward, setting)
        if grader not in used and value != RewardConfig.model_fields[setting].default:
            raise ValueError(
                f"reward.{setting} {value:g} is for the grader '{grader}', and the reward is of "
                f"{', '.join(sorted(used))}; leave it out, or set reward.reward_function={grader}"
            )


CHECKS: tuple[Callable[[RunConfig], None], ...] = (
    check_pipeline,
    check_freeze,
    check_offload,
    check_fp8,
    check_rollout_quantization,
    check_batches,
    check_micro_batch_tokens,
    check_sampling,
    check_perturbation,
    check_reference_devices,
    check_filter,
    check_order,
    check_carry,
    check_token_weights,
    check_token_scores,
    check_shaping,
    check_policy_loss,
    check_score_centering,
    check_perception_loss,
    check_data_files,
    check_keys,
    check_pixels,
    check_background,
    check_optimizer,
    check_warmup,
    check_intervals,
    check_resume,
    check_timeouts,
    check_watchdog,
    check_reward,
    check_overlong,
    check_grader_settings,
)
"""Every check that needs nothing but the config; `check_layout` and `check_device` need the machine as well."""
