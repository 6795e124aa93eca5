"""Settings to what data/ takes: each perturbation with its own parameters, and the background."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vppo.config.schema import PerturbConfig, RunConfig
from megatron_vppo.data.perturb import BlackPatches, BlackSquares, GaussianBlur, GaussianNoise, GreyImage, Perturbation
from megatron_vppo.setup.inputs import background_color, make_perturbation


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


@pytest.mark.parametrize(
    ("text", "color"), [("white", (255, 255, 255)), ("#0a141e", (10, 20, 30)), ("hsl(0,0%,0%)", (0,) * 3)]
)
def test_a_background_is_a_color(text: str, color: tuple[int, int, int]) -> None:
    assert background_color(_with_background(text).data) == color


@pytest.mark.parametrize("text", ["whitee", "#12345", "#ffffff80", ""])
def test_other_backgrounds_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.background: .*set a name such as white, or '#rrggbb'$"):
        background_color(_with_background(text).data)


def _with_background(text: str) -> RunConfig:
    data = {"train_files": "x", "background": text}
    return RunConfig.model_validate({"data": data, "model": {"path": "m"}})
