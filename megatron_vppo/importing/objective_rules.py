"""Keys of theirs about advantages, the policy's loss and the KL term. Formulas are compared with their code."""

from __future__ import annotations

from megatron_vppo.config.choices import AdvantageKind, KlKind, PolicyLoss
from megatron_vppo.importing.rules import Outcome, becomes
from megatron_vppo.importing.their_values import TheirValues

ADVANTAGES: dict[str, AdvantageKind] = {"grpo": "grpo", "rloo": "rloo"}
LOSSES: dict[str, PolicyLoss] = {"default": "clip", "gspo": "gspo", "gspo_token": "gspo", "cispo": "cispo"}
ESTIMATORS: dict[str, KlKind] = {"kl": "k1", "abs": "abs", "mse": "k2", "low_var_kl": "k3"}


def advantage(value: str, theirs: TheirValues) -> Outcome:
    """Takes the estimator of advantages."""
    if value in ADVANTAGES:
        return becomes("algorithm.advantage", ADVANTAGES[value])
    if value == "reinforce_plus_plus":
        return Outcome(
            refused="it takes mean and deviation over tokens there, and over responses here; set grpo, and "
            "algorithm.advantage=reinforce_pp in our file if that is what you want"
        )
    return Outcome(refused=f"set {' or '.join(ADVANTAGES)}; gae needs a critic, and remax greedy responses")


def policy_loss(value: str, theirs: TheirValues) -> Outcome:
    """Takes the surrogate loss. Their GSPO also has the dual bound, which no ratio within its range reaches."""
    if value not in LOSSES:
        return Outcome(refused=f"set {', '.join(LOSSES)}")
    if LOSSES[value] == "gspo" and theirs["worker.actor.ulysses_size"] > 1:
        return Outcome(refused="it needs whole responses on a rank here; set worker.actor.ulysses_size=1")
    return becomes("algorithm.policy_loss", LOSSES[value])


def kl_coef(value: float, theirs: TheirValues) -> Outcome:
    """Takes the weight of the KL term, if there is a reference model."""
    return becomes("algorithm.kl_coef", 0.0 if theirs["algorithm.disable_kl"] else value)


def kl_kind(value: str, theirs: TheirValues) -> Outcome:
    """Takes the estimator of the divergence."""
    if not _has_reference(theirs):
        return Outcome(dropped="without effect: there is no reference model")
    if value not in ESTIMATORS:
        return Outcome(refused=f"it needs all log-probs of the vocabulary; set {', '.join(ESTIMATORS)}")
    return becomes("algorithm.kl_kind", ESTIMATORS[value])


def kl_in(value: bool, theirs: TheirValues) -> Outcome:
    """Takes the side of the advantage on which the divergence counts."""
    if not _has_reference(theirs):
        return Outcome(dropped="without effect: there is no reference model")
    return becomes("algorithm.kl_in", "loss" if value else "reward")


def kl_type(value: str, theirs: TheirValues) -> Outcome:
    """Takes a fixed weight; an adaptive one is refused where it has an effect."""
    if value == "fixed" or not _has_reference(theirs):
        return Outcome(dropped="the weight is fixed")
    return Outcome(refused="the weight is fixed here; set algorithm.kl_type=fixed")


def _has_reference(theirs: TheirValues) -> bool:
    return not theirs["algorithm.disable_kl"] and theirs["algorithm.kl_coef"] > 0
