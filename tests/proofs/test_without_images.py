"""A mini-batch in which no row has an image: nobody waits for the vision tower, and the rest is what it should be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from megatron.core import parallel_state
from torch import Tensor

from megatron_vppo.algorithm.types import Response
from megatron_vppo.models.options import ModelOptions
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config, tiny_qwen3_config
from tests.parallel.case import Case
from tests.parallel.policy_rig import (
    OPTIM,
    STEP,
    expected_outcome,
    hf_gradients,
    make_batch,
    make_policy,
    make_responses,
)

LOGP_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
"""Relative, of each tensor's norm."""
MODELS = {
    "Qwen2.5-VL": tiny_config(tied=True, vocab=299, num_hidden_layers=5),
    "Qwen3-VL": tiny_qwen3_config(tied=False, vocab=301, taps=(0, 2), num_hidden_layers=5),
}
LAYOUTS = {
    "TP 2, sequence parallel": Case(tensor=2, options=ModelOptions(sequence_parallel=True)),
    "TP 2, images shared out": Case(tensor=2, options=ModelOptions(vision_split="images", recompute="full")),
    "CP 2": Case(context=2),
    "PP 2, interleaved": Case(pipeline=2, options=ModelOptions(virtual_stages=2, pipeline_layers=(2, 1, 1, 1))),
    "DP 2": Case(data=2),
    "CP 2, overlapped": Case(context=2, overlap=True),
}


def text_only() -> list[Response]:
    responses = [response for response in make_responses() if not response.prompt.images]
    assert len(responses) == 2
    return responses


@dataclasses.dataclass(frozen=True)
class Found:
    logp_BT: Tensor
    perturbed_logp_BT: Tensor | None
    gradients: dict[str, Tensor]


def _rank(rank: int, world: int, folders: dict[str, Path]) -> dict[tuple[str, str], Found]:
    found = {}
    for name, case in LAYOUTS.items():
        layout = case.open()
        optim = dataclasses.replace(OPTIM, use_distributed_optimizer=False, overlap_grad_reduce=case.overlap)
        for model, folder in folders.items():
            policy = make_policy(folder, layout, rows=1, optim=optim, options=case.options)
            scores = policy.score(text_only(), step=STEP, views="both")
            policy.accumulate_gradients(make_batch(text_only(), "nll"))
            found[name, model] = Found(scores.old_logp_BT, scores.perturbed_logp_BT, hf_gradients(policy))
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.distributed
def test_equals_transformers(tmp_path: Path) -> None:
    expected = {}
    for model, config in MODELS.items():
        save_tiny_model(tmp_path / model, config)
        expected[model] = expected_outcome(tmp_path / model, "nll", OPTIM, responses=text_only())
    for found in run_gloo(_rank, 2, {model: tmp_path / model for model in MODELS}, timeout_seconds=300):
        assert found.keys() == {(name, model) for name in LAYOUTS for model in MODELS}
        for (name, model), mine in found.items():
            where, right = f"{name}, {model}", expected[model]
            assert mine.perturbed_logp_BT is not None
            for logp_BT in (mine.logp_BT, mine.perturbed_logp_BT):  # both answers are a token shorter than the longest
                off = float((logp_BT - right.logp_BT[:, : logp_BT.shape[1]]).abs().max())
                assert off < LOGP_TOLERANCE, f"{where}: log-probs off by {off:.1e}"
            assert right.gradients.keys() == {n for n in mine.gradients if "visual." not in n}, where
            for tensor, gradient in mine.gradients.items():
                if tensor not in right.gradients:
                    assert not gradient.any(), f"{where}: {tensor} has a gradient"
                    continue
                off = float((gradient - right.gradients[tensor]).norm() / right.gradients[tensor].norm())
                assert off < GRADIENT_TOLERANCE, f"{where}: gradient of {tensor} off by {off:.1e} of its norm"
