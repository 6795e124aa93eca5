"""Settings to perturbations: each kind gets its own parameters, as the schema has them."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vppo.config.schema import PerturbConfig
from megatron_vppo.data.perturb import BlackPatches, BlackSquares, GaussianBlur, GaussianNoise, GreyImage, Perturbation
from megatron_vppo.setup.inputs import make_perturbation


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, BlackPatches(0.5)),
        ({"probability": 0.25}, BlackPatches(0.25)),
        ({"stage": "pixels", "patch_size": 14}, BlackSquares(0.5, side=14)),
        ({"kind": "gaussian_noise"}, GaussianNoise(189.0)),
        ({"kind": "gaussian_noise", "noise_std": 20}, GaussianNoise(20.0)),
        ({"kind": "gaussian_blur", "blur_radius": 2}, GaussianBlur(2.0)),
        ({"kind": "grey", "grey_level": 7, "stage": "pixels", "patch_size": 14}, GreyImage(7)),
    ],
)
def test_each_kind_gets_its_parameters(settings: dict[str, Any], expected: Perturbation) -> None:
    assert make_perturbation(PerturbConfig.model_validate(settings)) == expected
