"""The algorithm's settings: every one has a reader, and unknown choices are refused."""

from __future__ import annotations

from dataclasses import fields

import pytest

from megatron_vppo.algorithm.settings import VppoSettings
from megatron_vppo.config.schema import AlgorithmConfig
from tests.algorithm.rows import settings


def test_every_algorithm_setting_is_ours_or_named_here() -> None:
    ours = {field.name for field in fields(VppoSettings)}
    elsewhere = {
        "preset",  # filled into the others
        "resize",  # the image pipeline
        "online_filtering",  # whether the loop calls keep_group
        "filter_low",  # arguments of keep_group
        "filter_high",
        "max_try_make_batch",  # the loop
        "perturb",  # the image perturbation
        "score_banned_tokens",  # the vocabulary head
    }
    assert ours.isdisjoint(elsewhere)
    assert ours | elsewhere == set(AlgorithmConfig.model_fields)


def test_settings_refuse_unknown_choices() -> None:
    assert settings().shaping_mean_scope == "minibatch"
    assert settings(preset="reference").shaping_mean_scope == "microbatch"
    values = {field.name: getattr(settings(), field.name) for field in fields(VppoSettings)}
    with pytest.raises(ValueError, match=r"algorithm\.dependency is 'kl_topM'; set it to one of 'k3_sampled'"):
        VppoSettings(**{**values, "dependency": "kl_topM"})


def test_the_divergence_that_scoring_computes() -> None:
    assert settings(dependency="k3_sampled").divergence is None
    assert settings(dependency="kl_full").divergence == "kl_full"
    unused = settings(dependency="jsd", use_vppo_on_perception=False, use_advantage_shaping=False)
    assert unused.divergence is None
