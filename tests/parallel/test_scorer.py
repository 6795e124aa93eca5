"""A model without gradients and optimizer scores like the policy, bit by bit, and is gone when nobody holds it."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_vppo.algorithm.types import Scores
from megatron_vppo.models.options import ModelOptions
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config, tiny_qwen3_config
from tests.parallel.case import Case
from tests.parallel.policy_rig import STEP, make_policy, make_responses, make_scorer

MODELS = {
    "Qwen2.5-VL": tiny_config(tied=True, vocab=299, num_hidden_layers=4),
    "Qwen3-VL": tiny_qwen3_config(tied=False, vocab=301, taps=(0,), num_hidden_layers=4),
}
LAYOUTS = {
    "TP 2, sequence parallel": Case(tensor=2, options=ModelOptions(sequence_parallel=True)),
    "CP 2": Case(context=2),
    "PP 2, interleaved": Case(pipeline=2, options=ModelOptions(virtual_stages=2)),
}
DIVERGENCES = (None, "kl_full", "jsd")


def unequal_fields(left: Scores, right: Scores) -> list[str]:
    """Names of the fields that differ in any bit."""
    pairs = {
        field.name: (getattr(left, field.name), getattr(right, field.name)) for field in dataclasses.fields(Scores)
    }
    return [
        name
        for name, (a, b) in pairs.items()
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b)
    ]


def _rank(rank: int, world: int, folders: dict[str, Path]) -> dict[tuple[str, str, str | None], list[str]]:
    found = {}
    for name, case in LAYOUTS.items():
        layout = case.open()
        for model, folder in folders.items():
            policy = make_policy(folder, layout, rows=4, options=case.options)
            scorer = make_scorer(folder, layout, rows=4, options=case.options)
            for divergence in DIVERGENCES:
                scores = [
                    scoring.score(make_responses(), step=STEP, views="both", divergence=divergence)
                    for scoring in (policy, scorer)
                ]
                assert scores[0].old_logp_BT.abs().sum() > 0 and scores[0].perturbed_logp_BT is not None
                assert not torch.equal(scores[0].old_logp_BT, scores[0].perturbed_logp_BT)
                found[name, model, divergence] = unequal_fields(*scores)
            stages = [weakref.ref(stage) for stage in scorer.stages]
            del scorer
            gc.collect()
            assert all(stage() is None for stage in stages), "the model of a scorer can be let go"
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.distributed
def test_a_model_without_an_optimizer_scores_like_the_policy(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in MODELS}
    for name, config in MODELS.items():
        save_tiny_model(folders[name], config)
    expected = {(name, model, kind): [] for name in LAYOUTS for model in MODELS for kind in DIVERGENCES}
    assert run_gloo(_rank, 2, folders, timeout_seconds=300) == [expected] * 2
