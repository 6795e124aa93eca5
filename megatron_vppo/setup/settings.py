"""The settings of the algorithm, from those of a run."""

from __future__ import annotations

import dataclasses

from megatron_vppo.algorithm.settings import VppoSettings
from megatron_vppo.config.schema import RunConfig


def vppo_settings(config: RunConfig) -> VppoSettings:
    """Takes the algorithm's settings from the configuration, by name."""
    return VppoSettings(
        **{field.name: getattr(config.algorithm, field.name) for field in dataclasses.fields(VppoSettings)}
    )
