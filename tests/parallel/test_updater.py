"""Score centering in an update: the gradient of every parameter against transformers' autograd."""

from __future__ import annotations

import dataclasses
from array import array
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from megatron_vppo.parallel.layout import single_rank
from tests.models.tiny import save_tiny_model, tiny_config
from tests.parallel.policy_rig import (
    OPTIM,
    RESPONSE_LENGTH,
    expected_update,
    hf_gradients,
    make_batch,
    make_policy,
    make_responses,
)

LIKELIEST = 3
GRADIENT_TOLERANCE = 1e-4
"""Relative, of the norm of each parameter's gradient."""


def test_score_centering_equals_transformers(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, tiny_config(tied=False, vocab=299))
    generator = torch.Generator().manual_seed(6)
    responses = []
    for response in make_responses():
        count = len(response.token_ids) * LIKELIEST
        ids = torch.randint(2, 280, (count,), generator=generator).tolist()
        logps = (-2.0 - torch.rand(count, generator=generator)).tolist()
        responses.append(
            dataclasses.replace(response, likeliest_ids=array("i", ids), likeliest_logps=array("d", logps))
        )
    batch = make_batch(responses, "nll", policy_loss="reinforce")
    weight_BT = torch.rand(len(responses), RESPONSE_LENGTH, generator=generator) * batch.response_mask_BT
    batch = dataclasses.replace(batch, centering_weight_BT=weight_BT)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    expected = expected_update(model, batch, OPTIM)
    with single_rank() as layout:
        policy = make_policy(
            tmp_path, layout, rows=4, optim=dataclasses.replace(OPTIM, use_distributed_optimizer=False)
        )
        metrics = policy.accumulate_gradients(batch)
        gradients = hf_gradients(policy)
    assert abs(metrics["actor/score_centering"]) > 0.01
    for name in ("actor/score_centering", "actor/pg_loss", "actor/loss"):
        assert metrics[name] == pytest.approx(expected.metrics[name], rel=1e-5)
    for name, right in expected.gradients.items():
        assert float((gradients[name] - right).norm() / right.norm()) < GRADIENT_TOLERANCE, name
