"""The settings of the algorithm, under the names of the configuration section `algorithm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args, get_type_hints

from megatron_vppo.config.choices import (
    CountedTokens,
    DependencyKind,
    EntropyKind,
    LossAverage,
    NegativeAdvantages,
    ShapingMeanScope,
    ShapingMinScope,
    TextOnlyRows,
    TruncatedResponses,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VppoSettings:
    """Everything that `assemble` decides by. Defaults and presets live in the configuration, not here."""

    use_vppo_on_perception: bool
    """Token gradient filtering (paper Eq. 4)."""
    use_advantage_shaping: bool
    """Trajectory advantage shaping (paper Eq. 5); works with and without the filter."""
    use_entropy_penalty: bool
    top_p_perception_tokens: float
    """Share of each response's tokens that receive policy gradient, in (0, 1]."""
    advantage_scaling_min: float
    """beta_min, in (0, 1]."""
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
    reference_devices: int | None
    """Devices of the emulated split for scope 'device_minibatch'; None: the data-parallel size."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(hint)
            if isinstance(value, str) and value not in choices:
                raise ValueError(f"algorithm.{name} is {value!r}; set it to one of {', '.join(map(repr, choices))}")

    @property
    def needs_dependency(self) -> bool:
        """True if the perturbed view has to be scored at all."""
        return self.use_vppo_on_perception or self.use_advantage_shaping
