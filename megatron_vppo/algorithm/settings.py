"""The settings of the algorithm, under the names of the configuration section `algorithm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args, get_type_hints

from megatron_vppo.config.choices import (
    DEPENDENCY_SCORES,
    AdvantageKind,
    CorrectionKind,
    CountedTokens,
    DependencyKind,
    Divergence,
    EntropyKind,
    KlKind,
    KlPlace,
    LossAverage,
    NegativeAdvantages,
    PerceptionGradient,
    PolicyLoss,
    ShapingKind,
    ShapingMeanScope,
    ShapingMinScope,
    ShapingPlace,
    TextOnlyRows,
    TokenScores,
    TokenWeighting,
    TruncatedResponses,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VppoSettings:
    """The settings that the algorithm reads. Descriptions, defaults and presets are in `config/schema.py` alone."""

    advantage: AdvantageKind
    policy_loss: PolicyLoss
    sapo_tau_positive: float
    sapo_tau_negative: float
    kl_coef: float
    kl_kind: KlKind
    kl_in: KlPlace
    perception_loss_coef: float
    perception_gradient: PerceptionGradient
    perturbed_entropy_coef: float
    use_vppo_on_perception: bool
    token_scores: TokenScores
    vepo_alpha: float
    token_weighting: TokenWeighting
    pgpo_tau: float
    pgpo_beta: float
    vgpo_strength: float
    vgpo_tail: float
    vgpo_top: float
    use_advantage_shaping: bool
    shaping_kind: ShapingKind
    shaping_in: ShapingPlace
    use_entropy_penalty: bool
    top_p_perception_tokens: float
    advantage_scaling_min: float
    advantage_scaling_max: float | None
    entropy_penalty_coef: float
    dependency: DependencyKind
    dependency_expm1: bool
    stable_ranking: bool
    integer_ceil: bool
    shaping_min_scope: ShapingMinScope
    shaping_mean_scope: ShapingMeanScope
    negative_advantages: NegativeAdvantages
    text_only_rows: TextOnlyRows
    loss_denominator: CountedTokens
    loss_avg_mode: LossAverage
    entropy_kind: EntropyKind
    entropy_tokens: CountedTokens
    clip_ratio_low: float
    clip_ratio_high: float
    clip_ratio_dual: float
    truncated_responses: TruncatedResponses
    rollout_correction_cap: float | None
    rollout_correction: CorrectionKind
    score_centering_tokens: int
    reference_devices: int | None

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(hint)
            if isinstance(value, str) and value not in choices:
                raise ValueError(f"algorithm.{name} is {value!r}; set it to one of {', '.join(map(repr, choices))}")

    @property
    def needs_dependency(self) -> bool:
        """True if something reads the tokens' dependency on the image."""
        filter_reads_it = self.token_scores in DEPENDENCY_SCORES
        return (self.use_vppo_on_perception and filter_reads_it) or self.use_advantage_shaping

    @property
    def updates_both_views(self) -> bool:
        """True if the update reads the perturbed view, too, with a gradient."""
        return self.perception_loss_coef > 0 and self.perception_gradient == "both_views"

    @property
    def needs_perturbed_view(self) -> bool:
        """True if the perturbed view has to be scored at all."""
        constant_in_loss = self.perception_loss_coef > 0 and self.perception_gradient == "original_view"
        return (self.needs_dependency and not self.needs_visual_focus) or constant_in_loss

    @property
    def needs_visual_focus(self) -> bool:
        """True if scoring has to compare hidden states with those of the images."""
        return self.needs_dependency and self.dependency == "visual_focus"

    @property
    def divergence(self) -> Divergence | None:
        """The divergence that scoring has to compute between the two views; None if log-probs are enough."""
        return divergence_of(self.dependency) if self.needs_dependency else None


def divergence_of(dependency: DependencyKind) -> Divergence | None:
    """Returns the measure of dependency if it takes both distributions over the vocabulary; None if not."""
    return None if dependency == "k3_sampled" or dependency == "visual_focus" else dependency
