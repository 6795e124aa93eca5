"""The values that `algorithm.preset` fills in; a user's own value always wins."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vppo.config.schema import AlgorithmConfig, RunConfig

# Written down from the two columns of the specification, not from the code.
EXPECTED: dict[str, dict[str, Any]] = {
    "global": {
        "algorithm.dependency_expm1": True,
        "algorithm.stable_ranking": True,
        "algorithm.integer_ceil": True,
        "algorithm.shaping_min_scope": "minibatch",
        "algorithm.shaping_mean_scope": "minibatch",
        "algorithm.text_only_rows": "bypass",
        "algorithm.perturb.stage": "patches",
        "algorithm.perturb.per": "image",
        "algorithm.perturb.patch_size": None,
        "algorithm.resize": "smart",
        "algorithm.score_banned_tokens": False,
        "rollout.seeds": "independent",
        "rollout.top_p": 1.0,
    },
    "reference": {
        "algorithm.dependency_expm1": False,
        "algorithm.stable_ranking": False,
        "algorithm.integer_ceil": False,
        "algorithm.shaping_min_scope": "device_minibatch",
        "algorithm.shaping_mean_scope": "microbatch",
        "algorithm.text_only_rows": "rank",
        "algorithm.perturb.stage": "pixels",
        "algorithm.perturb.per": "row",
        "algorithm.perturb.patch_size": 14,
        "algorithm.resize": "easyr1",
        "algorithm.score_banned_tokens": True,
        "rollout.seeds": "shared",
        "rollout.top_p": 0.99,
    },
}
# A value for each that neither preset would give.
OTHER: dict[str, dict[str, Any]] = {
    "global": {"dependency_expm1": False, "shaping_min_scope": "device_minibatch", "text_only_rows": "rank"},
    "reference": {"dependency_expm1": True, "shaping_min_scope": "minibatch", "text_only_rows": "bypass"},
}


def run_config(algorithm: dict[str, Any] | None = None, rollout: dict[str, Any] | None = None) -> RunConfig:
    values: dict[str, Any] = {"data": {"train_files": "x"}, "model": {"path": "m"}}
    if algorithm is not None:
        values["algorithm"] = algorithm
    if rollout is not None:
        values["rollout"] = rollout
    return RunConfig.model_validate(values)


def read(config: RunConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("preset", EXPECTED)
def test_preset_fills_every_open_setting(preset: str) -> None:
    config = run_config({"preset": preset})
    assert {name: read(config, name) for name in EXPECTED[preset]} == EXPECTED[preset]


def test_global_is_the_default() -> None:
    for config in (run_config(), run_config({}), run_config({"clip_ratio_low": 0.1}, {"n": 4})):
        assert {name: read(config, name) for name in EXPECTED["global"]} == EXPECTED["global"]


@pytest.mark.parametrize("preset", EXPECTED)
def test_explicit_settings_win(preset: str) -> None:
    config = run_config({"preset": preset, **OTHER[preset], "perturb": {"per": "image"}}, {"seeds": "engine"})
    assert {name: getattr(config.algorithm, name) for name in OTHER[preset]} == OTHER[preset]
    assert config.algorithm.perturb.per == "image"
    assert config.rollout.seeds == "engine"
    assert config.algorithm.integer_ceil is EXPECTED[preset]["algorithm.integer_ceil"]  # the others are still filled


def test_reference_with_the_models_own_patches_leaves_the_patch_size_open() -> None:
    config = run_config({"preset": "reference", "perturb": {"stage": "patches"}})
    assert config.algorithm.perturb.patch_size is None


def test_presets_act_on_sections_built_in_code_too() -> None:
    config = RunConfig.model_validate(
        {"data": {"train_files": "x"}, "model": {"path": "m"}, "algorithm": AlgorithmConfig(preset="reference")}
    )
    assert config.rollout.seeds == "shared"
    assert config.algorithm.perturb.patch_size == 14
