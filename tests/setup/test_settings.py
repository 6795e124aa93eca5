"""The algorithm's settings are those of the schema, under the same names and with the same types."""

from __future__ import annotations

import dataclasses
from typing import get_type_hints

from megatron_vppo.algorithm.settings import VppoSettings
from megatron_vppo.config.schema import AlgorithmConfig, RunConfig
from megatron_vppo.setup.settings import vppo_settings


def test_names_and_types_are_the_schemas() -> None:
    declared, read = get_type_hints(AlgorithmConfig), get_type_hints(VppoSettings)
    assert read == {name: declared[name] for name in read}
    assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(VppoSettings))


def test_values_are_taken_by_name() -> None:
    algorithm = {"top_p_perception_tokens": 0.3, "dependency": "jsd", "reference_devices": 4}
    config = RunConfig.model_validate({"data": {"train_files": "x"}, "model": {"path": "m"}, "algorithm": algorithm})
    settings = vppo_settings(config)
    assert {name: getattr(settings, name) for name in algorithm} == algorithm


def test_scoring_computes_a_divergence_only_if_one_is_asked_for() -> None:
    def divergence(**algorithm: object) -> str | None:
        sections = {"data": {"train_files": "x"}, "model": {"path": "m"}, "algorithm": algorithm}
        return vppo_settings(RunConfig.model_validate(sections)).divergence

    neither = {"use_vppo_on_perception": False, "use_advantage_shaping": False}
    assert divergence(dependency="k3_sampled") is None
    assert divergence(dependency="kl_full") == "kl_full"
    assert divergence(dependency="jsd") == "jsd"
    assert divergence(dependency="jsd", **neither) is None
