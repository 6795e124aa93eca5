"""Combinations of settings of single methods that cannot work, refused as in checks.py, which calls them."""

from __future__ import annotations

from megatron_vppo.config.schema import RunConfig, Section

_MESSAGE_BYTES = 8 << 20
"""The largest message of torch's TCP store, by which engines send responses to rank 0."""
_TOKEN_BYTES = 32
"""Bytes of a message for a token of a response besides its likeliest tokens; twice what pickle takes."""


def is_changed(section: Section, name: str) -> bool:
    """Returns True if a setting has another value than its default."""
    return bool(getattr(section, name) != type(section).model_fields[name].default)


def check_token_scores(config: RunConfig) -> None:
    """Refuses scores without what they are made of, and settings of scores and weights that are not computed."""
    algorithm = config.algorithm
    if algorithm.token_scores == "vepo" and algorithm.dependency not in ("jsd", "kl_full"):
        raise ValueError(
            f"algorithm.token_scores 'vepo' combines a divergence of the two views with their entropies, and "
            f"dependency is '{algorithm.dependency}'; set algorithm.dependency=jsd (the paper's) or kl_full"
        )
    weighs = algorithm.use_vppo_on_perception and algorithm.token_weighting == "vgpo"
    scales = algorithm.use_advantage_shaping and algorithm.shaping_kind == "vgpo"
    if algorithm.dependency == "top1_drop" and (weighs or scales):
        raise ValueError(
            f"algorithm.{'token_weighting' if weighs else 'shaping_kind'} 'vgpo' raises scores by a factor, and "
            "dependency 'top1_drop' may be negative; set algorithm.dependency=visual_focus (VGPO's own) or another"
        )
    if algorithm.token_scores != "vepo" and is_changed(algorithm, "vepo_alpha"):
        raise ValueError("algorithm.vepo_alpha without effect: token_scores is not 'vepo'; leave it out")
    idle = [name for name in ("vgpo_strength", "vgpo_tail", "vgpo_top") if is_changed(algorithm, name)]
    if idle and not weighs and not scales:
        raise ValueError(
            f"algorithm.{' and '.join(idle)} without effect: neither token_weighting nor shaping_kind is 'vgpo'; leave "
            "it out"
        )


def check_shaping(config: RunConfig) -> None:
    """Refuses settings of a scale that is not computed, or that its kind or place does not read."""
    algorithm = config.algorithm
    changed = [
        f"algorithm.{name} '{getattr(algorithm, name)}'"
        for name in ("shaping_kind", "shaping_in")
        if is_changed(algorithm, name)
    ]
    if changed and not algorithm.use_advantage_shaping:
        raise ValueError(
            f"{' and '.join(changed)}: no effect with algorithm.use_advantage_shaping=false; leave it out, or set "
            "use_advantage_shaping=true"
        )
    of_vppo = [name for name in ("advantage_scaling_min", "advantage_scaling_max") if is_changed(algorithm, name)]
    if of_vppo and algorithm.shaping_kind == "vgpo":
        raise ValueError(
            f"algorithm.{' and '.join(of_vppo)} without effect with shaping_kind 'vgpo', whose scales follow from the "
            "group; leave it out"
        )
    if algorithm.shaping_in == "reward" and algorithm.negative_advantages != "same":
        raise ValueError(
            f"algorithm.negative_advantages '{algorithm.negative_advantages}' has no effect with shaping_in 'reward', "
            "where the scale is part of the reward before an advantage has a sign; leave it out"
        )


def check_perception_loss(config: RunConfig) -> None:
    """Refuses parts of the perception loss without it, and an entropy term that would be constant."""
    algorithm = config.algorithm
    names = [name for name in ("perception_gradient", "perturbed_entropy_coef") if is_changed(algorithm, name)]
    if names and not algorithm.perception_loss_coef:
        changed = [f"{name} {getattr(algorithm, name)}" for name in names]
        raise ValueError(
            f"algorithm.{' and '.join(changed)}: no effect without the perception loss; set "
            "algorithm.perception_loss_coef (PAPO: 0.01 to 0.02), or leave it out"
        )
    if algorithm.perturbed_entropy_coef and algorithm.perception_gradient == "original_view":
        raise ValueError(
            f"algorithm.perturbed_entropy_coef {algorithm.perturbed_entropy_coef} has no effect with "
            "perception_gradient 'original_view', by which the perturbed view is constant; leave it out, or set "
            "perception_gradient=both_views"
        )


def check_overlong(config: RunConfig) -> None:
    """Refuses a penalty on overlong responses that is never taken, or that starts before the first token."""
    reward, longest = config.reward, config.data.max_response_length
    if reward.overlong_buffer_tokens > longest:
        raise ValueError(
            f"reward.overlong_buffer_tokens {reward.overlong_buffer_tokens} is more than data.max_response_length "
            f"{longest}: a penalty over the last tokens before the limit; set it to at most {longest}"
        )
    if not reward.overlong_buffer_tokens and is_changed(reward, "overlong_penalty"):
        raise ValueError(
            f"reward.overlong_penalty {reward.overlong_penalty:g} has no effect without a buffer; set "
            "reward.overlong_buffer_tokens, or leave it out"
        )


def check_score_centering(config: RunConfig) -> None:
    """Refuses score centering with what its formula has no place for."""
    algorithm, rollout = config.algorithm, config.rollout
    if not algorithm.score_centering_tokens:
        return
    name = f"algorithm.score_centering_tokens {algorithm.score_centering_tokens}"
    if algorithm.policy_loss != "reinforce":
        raise ValueError(
            f"{name} takes a mean score out of a gradient without ratio and clip, and policy_loss is "
            f"'{algorithm.policy_loss}'; set algorithm.policy_loss=reinforce, or leave it out"
        )
    if algorithm.rollout_correction == "sequence_mask":
        raise ValueError(
            f"{name} weighs tokens one by one, and rollout_correction 'sequence_mask' all of a response alike; set "
            "algorithm.rollout_correction to token or geometric_mask, or leave it out"
        )
    if rollout.top_p < 1 or rollout.top_k != -1:
        raise ValueError(
            f"{name} compares the trainer's full distribution with a sampler cut by top_p {rollout.top_p} and top_k "
            f"{rollout.top_k}; set rollout.top_p=1 rollout.top_k=-1, or leave it out"
        )
    most = _MESSAGE_BYTES // (8 * algorithm.score_centering_tokens + _TOKEN_BYTES)
    if config.data.max_response_length > most:
        raise ValueError(
            f"{name}: a response of data.max_response_length {config.data.max_response_length} tokens would be more "
            f"than the {_MESSAGE_BYTES >> 20} MiB that an engine can send at once; set at most {most}, or fewer "
            "likeliest tokens"
        )
    if rollout.unfinished == "carry":
        raise ValueError(
            f"{name} needs the engine's likeliest tokens at every position, which are not carried from step to step; "
            "set rollout.unfinished=drop, or leave it out"
        )
