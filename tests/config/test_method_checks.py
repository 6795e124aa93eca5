"""Refusals of settings of single methods, by what their messages name; and that what is possible passes."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vppo.config.checks import problems_of
from tests.config.test_checks import config_of

VGPO = {"dependency": "visual_focus", "token_weighting": "vgpo", "shaping_kind": "vgpo"}
CENTRED = {"policy_loss": "reinforce", "score_centering_tokens": 20}
POSSIBLE: list[dict[str, Any]] = [
    {"algorithm": {**VGPO, "vgpo_strength": 0.5, "vgpo_tail": 1.0, "vgpo_top": 0.1}},
    {"algorithm": {"shaping_kind": "vgpo", "vgpo_top": 0.1}},
    {"algorithm": {"token_scores": "vepo", "dependency": "jsd", "vepo_alpha": 0.5}},
    {"algorithm": {"token_scores": "vepo", "dependency": "kl_full", "token_weighting": "soft"}},
    {"algorithm": {"shaping_in": "reward", "advantage_scaling_min": 0.8}},
    {"reward": {"overlong_buffer_tokens": 2048, "overlong_penalty": 0.5}},
    {"algorithm": {**CENTRED, "rollout_correction_cap": 2}},
    {"algorithm": {**CENTRED, "rollout_correction_cap": 2, "rollout_correction": "geometric_mask"}},
]


@pytest.mark.parametrize("sections", POSSIBLE, ids=str)
def test_possible_combination(sections: dict[str, dict[str, Any]]) -> None:
    assert problems_of(config_of(**sections)) == []


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"algorithm": {"token_scores": "vepo"}},
            ["token_scores 'vepo'", "dependency is 'k3_sampled'", "algorithm.dependency=jsd"],
        ),
        ({"algorithm": {"token_scores": "vepo", "dependency": "top1_drop"}}, ["dependency is 'top1_drop'"]),
        ({"algorithm": {"vepo_alpha": 0.5}}, ["vepo_alpha without effect"]),
        ({"algorithm": {"vgpo_top": 0.5, "vgpo_tail": 0.1}}, ["vgpo_tail and vgpo_top without effect"]),
        (
            {"algorithm": {"shaping_kind": "vgpo", "shaping_in": "reward", "use_advantage_shaping": False}},
            ["shaping_kind 'vgpo' and algorithm.shaping_in 'reward'", "use_advantage_shaping=true"],
        ),
        (
            {"algorithm": {"shaping_kind": "vgpo", "advantage_scaling_max": 1.1}},
            ["advantage_scaling_max without effect with shaping_kind 'vgpo'"],
        ),
        (
            {"algorithm": {"shaping_in": "reward", "negative_advantages": "unscaled"}},
            ["negative_advantages 'unscaled' has no effect with shaping_in 'reward'"],
        ),
        (
            {"reward": {"overlong_buffer_tokens": 2049}},
            ["overlong_buffer_tokens 2049 is more than data.max_response_length 2048"],
        ),
        (
            {"algorithm": {"score_centering_tokens": 4}},
            ["score_centering_tokens 4", "policy_loss is 'clip'", "policy_loss=reinforce"],
        ),
        (
            {"algorithm": {**CENTRED, "rollout_correction_cap": 3, "rollout_correction": "sequence_mask"}},
            ["weighs tokens one by one, and rollout_correction 'sequence_mask'"],
        ),
        ({"algorithm": CENTRED, "rollout": {"top_k": 50}}, ["a sampler cut by top_p 1.0 and top_k 50"]),
        (
            {"algorithm": {**CENTRED, "rollout_correction_cap": 3}, "rollout": {"unfinished": "carry"}},
            ["not carried from step to step"],
        ),
        (
            {"algorithm": {"dependency": "top1_drop", "shaping_kind": "vgpo"}},
            ["shaping_kind 'vgpo' raises scores by a factor", "'top1_drop' may be negative"],
        ),
        (
            {"algorithm": CENTRED, "data": {"max_response_length": 43691}},
            ["score_centering_tokens 20", "max_response_length 43691", "set at most 43690"],
        ),
        ({"reward": {"overlong_penalty": 0.5}}, ["overlong_penalty 0.5 has no effect without a buffer"]),
    ],
    ids=str,
)
def test_impossible_combination(sections: dict[str, dict[str, Any]], words: list[str]) -> None:
    (problem,) = problems_of(config_of(**sections))
    for word in words:
        assert word in problem
