"""Settings of a run to the algorithm's settings."""

from __future__ import annotations

import dataclasses

from megatron_vppo.algorithm.settings import VppoSettings
from megatron_vppo.config.schema import RunConfig


def vppo_settings(config: RunConfig) -> VppoSettings:
    """The algorithm's settings, name by name from the configuration."""
    return VppoSettings(
        **{field.name: getattr(config.algorithm, field.name) for field in dataclasses.fields(VppoSettings)}
    )
