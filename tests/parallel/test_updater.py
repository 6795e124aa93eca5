"""Terms that methods add to the loss of an update, against transformers' model.

The update that reads both views of a response is compared in float64, row by row. Its loss is written out here, from
PAPO's paper and code, so that no formula of `algorithm/` is part of what it is compared with.
"""

from __future__ import annotations

import dataclasses
import pickle
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor
from transformers import AutoModelForImageTextToText

from megatron_vppo.algorithm.types import PerceptionTerms, PerturbKey, TrainBatch
from megatron_vppo.config.choices import PerturbUnit
from megatron_vppo.models.options import ModelOptions
from megatron_vppo.parallel.layout import Layout, single_rank
from megatron_vppo.parallel.policy import MegatronPolicy
from megatron_vppo.parallel.schedule import ScheduleRunner
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config, tiny_qwen3_config
from tests.parallel.case import Case
from tests.parallel.policy_rig import (
    OPTIM,
    RESPONSE_LENGTH,
    STEP,
    _released,
    expected_update,
    hf_gradients,
    hf_logits,
    make_batch,
    make_policy,
    make_responses,
)

GRADIENT_TOLERANCE = 1e-4
"""Relative, of each tensor's norm: the same as for the other losses (tests/proofs/test_layouts.py)."""
LOSS_TOLERANCE = 1e-5
"""Relative, of each part of the loss and of each mean."""
MODELS = {
    "Qwen2.5-VL": tiny_config(tied=False, vocab=301, num_hidden_layers=4),
    "Qwen3-VL": tiny_qwen3_config(tied=True, vocab=299, taps=(0,), num_hidden_layers=4),
}
LIKELIEST = 3
"""Tokens that score centering counts at each position."""
WHOLE = dataclasses.replace(OPTIM, use_distributed_optimizer=False)
"""Every rank has all of each gradient."""
LAYOUTS = {
    "TP 2, sequence parallel, recomputed": Case(
        tensor=2, options=ModelOptions(sequence_parallel=True, recompute="full")
    ),
    "CP 2": Case(context=2),
    "PP 2, interleaved": Case(pipeline=2, options=ModelOptions(virtual_stages=2)),
    "DP 2": Case(data=2),
}


def perception_batch(entropy_kind: str, *, per: PerturbUnit, constant: bool = False) -> TrainBatch:
    """The batch of the rig with weights of both terms, zero for the group without an image."""
    responses = make_responses()
    batch, generator = make_batch(responses, entropy_kind), torch.Generator().manual_seed(8)
    has_image_B1 = torch.tensor([[float(bool(response.prompt.images))] for response in responses])
    weight_BT, entropy_BT, noise_BT = (torch.rand(batch.old_logp_BT.shape, generator=generator) for _ in range(3))
    counted_BT = batch.response_mask_BT * has_image_B1
    keys = [PerturbKey.of(r, STEP, per=per) if r.prompt.images else None for r in responses]
    terms = PerceptionTerms(
        weight_BT=weight_BT * counted_BT,
        entropy_weight_BT=None if constant else 0.3 * entropy_BT * counted_BT,
        perturb_keys=None if constant else tuple(keys),
        perturbed_logp_BT=(-6.0 - noise_BT) * batch.response_mask_BT if constant else None,
    )
    return dataclasses.replace(batch, perception=terms)


@dataclass(frozen=True)
class Expected:
    metrics: dict[str, float]
    gradients: dict[str, Tensor]


def expected_gradients(folder: Path, batch: TrainBatch) -> Expected:
    """In float64. The surrogate is PPO's with the rig's bounds; a row without an image has no perturbed view."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64)
    assert batch.perception is not None
    terms, spec = batch.perception, batch.loss
    sums = dict.fromkeys(("pg_loss", "perception_loss", "perturbed_entropy_penalty", "kl_prcp_loss"), 0.0)
    sums["aug_entropy_loss"] = 0.0
    for row, response in enumerate(batch.responses):
        length = len(response.token_ids)
        targets = torch.tensor(response.token_ids)[:, None]

        def of_row(value_BT: Tensor, row: int = row, length: int = length) -> Tensor:
            return value_BT[row, :length].double()

        logp_NV = hf_logits(model, response, None).log_softmax(-1)
        logp_N = logp_NV.gather(1, targets)[:, 0]
        ratio_N, advantage_N = (logp_N - of_row(batch.old_logp_BT)).exp(), of_row(batch.advantage_BT)
        clipped_N = ratio_N.clamp(1 - spec.clip_ratio_low, 1 + spec.clip_ratio_high)
        surrogate_N = torch.maximum(-advantage_N * ratio_N, -advantage_N * clipped_N)
        bounded_N = torch.minimum(surrogate_N, -advantage_N * spec.clip_ratio_dual)
        pg_loss = (of_row(batch.pg_weight_BT) * torch.where(advantage_N < 0, bounded_N, surrogate_N)).sum()
        entropy_N = -logp_N if spec.entropy_kind == "nll" else -(logp_NV.exp() * logp_NV).sum(-1)
        loss = pg_loss + (of_row(batch.entropy_weight_BT) * entropy_N).sum()
        sums["pg_loss"] += pg_loss.item()
        if terms.perturbed_logp_BT is not None:
            perturbed_N, perturbed_entropy_N = of_row(terms.perturbed_logp_BT), None
        elif terms.perturb_keys is not None and (key := terms.perturb_keys[row]) is not None:
            perturbed_NV = hf_logits(model, response, key).log_softmax(-1)
            perturbed_N = perturbed_NV.gather(1, targets)[:, 0]
            full_N = -(perturbed_NV.exp() * perturbed_NV).sum(-1)
            perturbed_entropy_N = -perturbed_N if spec.entropy_kind == "nll" else full_N
        else:
            perturbed_N, perturbed_entropy_N = logp_N.detach(), None
        x_N = perturbed_N - logp_N
        divergence_N = x_N.exp() - x_N - 1  # far from both limits, as the next line holds
        assert x_N.abs().max() < 20 and divergence_N.max() < 10
        perception = -(of_row(terms.weight_BT) * divergence_N).sum()
        loss = loss + perception
        sums["perception_loss"] += perception.item()
        if response.prompt.images:
            sums["kl_prcp_loss"] -= divergence_N.sum().item()
        sums["aug_entropy_loss"] -= perturbed_N.sum().item()
        if perturbed_entropy_N is not None and terms.entropy_weight_BT is not None:
            penalty = (of_row(terms.entropy_weight_BT) * perturbed_entropy_N).sum()
            loss = loss + penalty
            sums["perturbed_entropy_penalty"] += penalty.item()
        loss.backward()
    tokens = sum(len(response.token_ids) for response in batch.responses)
    for name in ("kl_prcp_loss", "aug_entropy_loss"):
        sums[name] /= tokens
    if terms.perturbed_logp_BT is not None:
        del sums["perturbed_entropy_penalty"]
    gradients = {
        _released(name, model.config.model_type): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Expected({f"actor/{name}": value for name, value in sums.items()}, gradients)


def differences(policy: MegatronPolicy, batch: TrainBatch, expected: Expected) -> tuple[float, float]:
    """The largest relative differences of a part of the loss, and of a parameter's gradient."""
    metrics = policy.accumulate_gradients(batch)
    policy.trainable.optimizer.prepare_grads()  # sums over ranks, if they were not summed behind the backward pass
    loss = max(abs(metrics[name] / value - 1) for name, value in expected.metrics.items())
    gradients = hf_gradients(policy)
    assert gradients.keys() == expected.gradients.keys()
    return loss, max(
        float((gradients[name].double() - right).norm() / right.norm()) for name, right in expected.gradients.items()
    )


@pytest.fixture(scope="module")
def layout() -> Any:
    with single_rank() as made:
        yield made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("model") for name in MODELS}
    for name, config in MODELS.items():
        save_tiny_model(made[name], config)
    return made


@pytest.mark.parametrize("entropy_kind", ["nll", "entropy"])
@pytest.mark.parametrize("model", MODELS)
def test_both_views_have_the_gradient_of_the_paper(
    model: str, entropy_kind: str, layout: Layout, folders: dict[str, Path]
) -> None:
    """One by one, some rows without an image; groups torn; all packed; filled by tokens; perturbations shared or not.

    The limit of 120 tokens holds all views of a micro-batch together.
    """
    for per, splits in (("row", [(1, None), (2, None), (8, None)]), ("image", [(8, None), (1, 120)]), (2, [(8, None)])):
        batch = perception_batch(entropy_kind, per=per)
        expected = expected_gradients(folders[model], batch)
        for rows, most_tokens in splits:
            policy = make_policy(
                folders[model], layout, rows=rows, optim=WHOLE, perturb_per=per, most_tokens=most_tokens
            )
            loss, gradient = differences(policy, batch, expected)
            where = f"{rows} rows or {most_tokens} tokens, a perturbation per {per}"
            assert loss < LOSS_TOLERANCE, f"{where}: {loss:.1e}"
            assert gradient < GRADIENT_TOLERANCE, f"{where}: {gradient:.1e}"


def test_a_constant_view_has_the_gradient_of_the_code(layout: Layout, folders: dict[str, Path]) -> None:
    """The perturbed log-probs are numbers of the batch, so only the original views are read."""
    batch = perception_batch("nll", per="row", constant=True)
    expected = expected_gradients(folders["Qwen2.5-VL"], batch)
    policy = make_policy(folders["Qwen2.5-VL"], layout, rows=3, optim=WHOLE)
    loss, gradient = differences(policy, batch, expected)
    assert loss < LOSS_TOLERANCE and gradient < GRADIENT_TOLERANCE


def test_the_update_reads_the_perturbations_that_scoring_read(layout: Layout, folders: dict[str, Path]) -> None:
    """With the weights of scoring, the means of the update are those of the scores, with the scores' own keys."""
    policy = make_policy(folders["Qwen2.5-VL"], layout, rows=8, optim=WHOLE, perturb_per=2)
    scores = policy.score(make_responses(), step=STEP + 1, views="both")
    batch = perception_batch("nll", per=2)
    assert batch.perception is not None and scores.perturbed_logp_BT is not None
    metrics = policy.accumulate_gradients(
        dataclasses.replace(batch, perception=dataclasses.replace(batch.perception, perturb_keys=scores.perturb_keys))
    )
    tokens = batch.response_mask_BT.sum()
    x_BT = (scores.perturbed_logp_BT - scores.old_logp_BT).double()
    assert metrics["actor/aug_entropy_loss"] == pytest.approx(-float(scores.perturbed_logp_BT.sum() / tokens), rel=1e-6)
    assert metrics["actor/kl_prcp_loss"] == pytest.approx(-float((x_BT.exp() - x_BT - 1).sum() / tokens), rel=1e-5)
    assert {key.step for key in scores.perturb_keys if key} == {STEP + 1}
    assert [key is None for key in scores.perturb_keys] == [not r.prompt.images for r in make_responses()]


def test_a_limit_of_tokens_holds_both_views(layout: Layout, folders: dict[str, Path]) -> None:
    """No micro-batch of the update has more tokens, padding included; so there are more than with one view."""
    packed: list[int] = []
    pack = ScheduleRunner.plan

    def noting(self: ScheduleRunner, batch: Any, **options: Any) -> Any:
        packed.append(batch.packed.token_ids_K.numel())
        return pack(self, batch, **options)

    policy = make_policy(folders["Qwen2.5-VL"], layout, rows=1, optim=WHOLE, most_tokens=120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScheduleRunner, "plan", noting)
        policy.accumulate_gradients(perception_batch("nll", per="row"))
        both = list(packed)
        packed.clear()
        policy.accumulate_gradients(make_batch(make_responses(), "nll"))
    assert max(both) <= 120 and max(packed) <= 120
    assert len(both) > len(packed)


def _rank(rank: int, world: int, folder: Path, expected: bytes) -> dict[str, tuple[float, float]]:
    found = {}
    for name, case in LAYOUTS.items():
        layout = case.open()
        policy = make_policy(folder, layout, rows=2, optim=WHOLE, options=case.options)
        found[name] = differences(policy, perception_batch("entropy", per="row"), pickle.loads(expected))
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("model", ["Qwen2.5-VL", pytest.param("Qwen3-VL", marks=pytest.mark.extended)])
def test_no_layout_changes_loss_or_gradient(model: str, folders: dict[str, Path]) -> None:
    """Micro-batches of two rows tear groups, and have rows without an image next to others."""
    expected = expected_gradients(folders[model], perception_batch("entropy", per="row"))
    for found in run_gloo(_rank, 2, folders[model], pickle.dumps(expected), timeout_seconds=300):
        assert found.keys() == LAYOUTS.keys()
        for where, (loss, gradient) in found.items():
            assert loss < LOSS_TOLERANCE, f"{where}: {loss:.1e}"
            assert gradient < GRADIENT_TOLERANCE, f"{where}: {gradient:.1e}"


def test_score_centering_has_the_gradient_of_transformers(layout: Layout, folders: dict[str, Path]) -> None:
    folder = folders["Qwen2.5-VL"]
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
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    expected = expected_update(model, batch, OPTIM)
    policy = make_policy(folder, layout, rows=4, optim=WHOLE)
    metrics = policy.accumulate_gradients(batch)
    gradients = hf_gradients(policy)
    assert abs(metrics["actor/score_centering"]) > 0.01
    for name in ("actor/score_centering", "actor/pg_loss", "actor/loss"):
        assert metrics[name] == pytest.approx(expected.metrics[name], rel=1e-5)
    for name, right in expected.gradients.items():
        assert float((gradients[name] - right).norm() / right.norm()) < GRADIENT_TOLERANCE, name
