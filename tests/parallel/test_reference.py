"""The reference model: its log-probs are those of the start weights, and the trained weights come back unchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from megatron_vppo.parallel.layout import init_layout, single_rank
from megatron_vppo.parallel.reference import ReferenceWeights
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config
from tests.parallel.policy_rig import OPTIM, STEP, expected_update, make_batch, make_policy, make_responses


def check_reference(folder: Path, layout: object) -> None:
    policy = make_policy(folder, layout, rows=2, optim=OPTIM, with_reference=True)  # type: ignore[arg-type]
    responses = make_responses()
    before = policy.score(responses, step=STEP, views="both")
    assert before.reference_logp_BT is not None
    # Both are scored by the same weights, packed otherwise.
    assert (before.reference_logp_BT - before.old_logp_BT).abs().max() < 1e-5
    policy.update(make_batch(responses, "nll"))
    weights = {name: tensor.clone() for name, tensor in policy.hf_weights()}
    after = policy.score(responses, step=STEP, views="both")
    assert after.reference_logp_BT is not None and torch.equal(after.reference_logp_BT, before.reference_logp_BT)
    assert (after.old_logp_BT - before.old_logp_BT).abs().max() > 1e-3, "the update moved the policy"
    again = {name: tensor.clone() for name, tensor in policy.hf_weights()}
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)


def test_the_reference_stays_where_the_run_began(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, tiny_config(tied=True, vocab=299))
    with single_rank() as layout:
        check_reference(tmp_path, layout)


def _rank(rank: int, world: int, folder: Path) -> None:
    check_reference(folder, init_layout(tensor=1, pipeline=2, timeout_seconds=300))


@pytest.mark.distributed
@pytest.mark.extended
def test_the_reference_of_pipeline_stages(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, tiny_config(tied=True, vocab=299))
    run_gloo(_rank, 2, tmp_path, timeout_seconds=300)


def test_the_weights_come_back_when_scoring_is_cut_off(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    stage = torch.nn.ParameterList([parameter, torch.nn.Parameter(torch.tensor([5.0]), requires_grad=False)])
    reference = ReferenceWeights([stage])  # type: ignore[list-item]
    with torch.no_grad():
        parameter.mul_(-1)
    with pytest.raises(KeyError), reference.in_place():
        assert parameter.tolist() == [1.0, 2.0]
        raise KeyError
    assert parameter.tolist() == [-1.0, -2.0]


def test_its_divergence_in_the_loss_equals_transformers(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, tiny_config(tied=True, vocab=299))
    plain = make_batch(make_responses(), "nll")
    generator = torch.Generator().manual_seed(8)
    batch = replace(
        plain,
        reference_logp_BT=-4.0 + torch.randn(plain.old_logp_BT.shape, generator=generator),
        kl_weight_BT=0.3 * plain.response_mask_BT,
    )
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    expected = expected_update(model, batch, OPTIM).metrics
    with single_rank() as layout:
        found = make_policy(tmp_path, layout, rows=3, optim=OPTIM).update(batch)
    for name in ("actor/kl_loss", "actor/loss", "actor/grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
