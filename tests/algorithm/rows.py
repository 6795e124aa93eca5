"""Responses, scores and settings for tests of the algorithm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vppo.algorithm.padding import length_mask
from megatron_vppo.algorithm.settings import VppoSettings
from megatron_vppo.algorithm.types import GradedResponse, ImageRef, Prompt, Response, Reward, Scores
from megatron_vppo.config.schema import AlgorithmConfig

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())
"""Measured on the authors' code, CPU, float32 unless noted."""
CHECKS = json.loads((Path(__file__).parent / "golden" / "checks.json").read_text())


def settings(**changes: Any) -> VppoSettings:
    """The settings of a preset, with changes, as the trainer builds them: by field name."""
    config = AlgorithmConfig(**changes)
    return VppoSettings(**{field.name: getattr(config, field.name) for field in fields(VppoSettings)})


def response(
    length: int,
    *,
    group: int = 0,
    sample: int = 0,
    image: bool = True,
    finish: str = "stop",
    rollout_logps: Sequence[float] | None = None,
) -> Response:
    prompt = Prompt(
        split="train",
        row=group,
        problem="?",
        answer="!",
        token_ids=(1, 2),
        compact_token_ids=(1, 2),
        images=(ImageRef("train", group, 0),) if image else (),
        grids_thw=((1, 2, 2),) if image else (),
    )
    return Response(
        prompt=prompt,
        group_id=group,
        sample=sample,
        token_ids=tuple(range(length)),
        rollout_logps=tuple([-1.0] * length if rollout_logps is None else rollout_logps),
        finish_reason=finish,
        weight_version=0,
    )


def graded(responses: Sequence[Response], rewards: Sequence[float]) -> list[GradedResponse]:
    return [
        GradedResponse(response=r, text="", reward=Reward(overall=reward, accuracy=reward, metrics={}))
        for r, reward in zip(responses, rewards, strict=True)
    ]


def scores(old_logp_BT: Tensor, perturbed_logp_BT: Tensor | None, divergence_BT: Tensor | None = None) -> Scores:
    return Scores(old_logp_BT, torch.zeros_like(old_logp_BT), perturbed_logp_BT, divergence_BT)


class SharedExample:
    """Two responses of which all quantities are known."""

    old_logp_BT = torch.full((2, 6), -1.0)
    perturbed_logp_BT = torch.tensor([[-1.0, -2.0, -1.5, -4.0, -1.0, -9.0], [-1.0, -1.2, -0.5, -3.0, -1.1, -7.0]])
    lengths = (5, 4)
    mask_BT = length_mask(lengths)
    """[2, 5]"""
    wide_mask_BT = length_mask(lengths, width=6)
    ratio_BT = torch.tensor([[1, 1.5, 0.7, 1.1, 1, 1], [1, 0.5, 1, 4, 1, 1]])
    new_logp_BT = old_logp_BT + ratio_BT.log()
    advantage_B = torch.tensor([1.0, -1.0])
