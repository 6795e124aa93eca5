"""Scoring, updates, export and checkpoints of the policy, against transformers and across restarts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor
from transformers import AutoModelForImageTextToText

from megatron_vppo.config.choices import PolicyLoss
from megatron_vppo.parallel.checkpoint import load_checkpoint, save_checkpoint
from megatron_vppo.parallel.layout import Layout, init_layout, single_rank
from megatron_vppo.parallel.training import OptimSettings
from tests.gloo import run_gloo
from tests.models.tiny import (
    save_tiny_model,
    tiny_config,
    tiny_qwen3_config,
)
from tests.parallel.policy_rig import (
    OPTIM,
    RESUMED_OPTIM,
    STEP,
    Outcome,
    expected_outcome,
    expected_update,
    make_batch,
    make_policy,
    make_responses,
    resumed_equals_straight,
)

LOGP_TOLERANCE = 1e-5
CHANGE_TOLERANCE = 1e-4
"""Relative, of the norm of each tensor's change."""
NORM_TOLERANCE = 1e-5
"""Relative."""
LOSS_TOLERANCE = 2e-5
"""Relative, of a sum of terms of both signs."""
OTHER_SIZE_OPTIM = dataclasses.replace(RESUMED_OPTIM, eps=1e-5)

CONFIGS = {
    "tied": tiny_config(tied=True, vocab=299),
    "untied": tiny_config(tied=False, vocab=301),
    "Qwen3": tiny_qwen3_config(tied=False, vocab=301, taps=(1,)),
}


def one_update(folder: Path, layout: Layout, *, rows: int, entropy_kind: str, optim: OptimSettings) -> Outcome:
    policy = make_policy(folder, layout, rows=rows, optim=optim)
    responses = make_responses()
    scores = policy.score(responses, step=STEP, views="both", divergence="kl_full")
    metrics = policy.update(make_batch(responses, entropy_kind))
    assert scores.perturbed_logp_BT is not None and scores.divergence_BT is not None
    return Outcome(
        scores.old_logp_BT, scores.perturbed_logp_BT, scores.entropy_BT, scores.divergence_BT, metrics, {},
        {name: tensor.clone() for name, tensor in policy.hf_weights()},
    )  # fmt: skip


def resumed_before_any_update_equals_fresh(folder: Path, layout: Layout, checkpoints: Path) -> bool:
    """Steps without anything to train on may come first: Adam has no state yet when the checkpoint is written."""
    batch = make_batch(make_responses(), "nll")
    fresh, resumed = (make_policy(folder, layout, rows=2, optim=RESUMED_OPTIM) for _ in range(2))
    save_checkpoint(checkpoints, step=1, trainable=fresh.trainable, layout=layout, state={}, keep=1)
    load_checkpoint(checkpoints, step=1, trainable=resumed.trainable, layout=layout)
    untouched = make_policy(folder, layout, rows=2, optim=RESUMED_OPTIM)
    for policy in (fresh, resumed, untouched):
        policy.update(batch)
    return all(
        [
            torch.equal(a, b) and torch.equal(a, c)
            for (_, a), (_, b), (_, c) in zip(
                fresh.hf_weights(), resumed.hf_weights(), untouched.hf_weights(), strict=True
            )
        ]
    )


def infinite_gradient_changes_nothing(folder: Path, layout: Layout) -> bool:
    policy = make_policy(folder, layout, rows=4)
    before = {name: tensor.clone() for name, tensor in policy.hf_weights()}
    batch = make_batch(make_responses(), "nll")
    infinite_BT = batch.pg_weight_BT.clone()
    infinite_BT[0, 0] = float("inf")
    metrics = policy.update(dataclasses.replace(batch, pg_weight_BT=infinite_BT))
    return metrics["actor/skipped_updates"] == 1.0 and all(
        [torch.equal(before[name], tensor) for name, tensor in policy.hf_weights()]
    )


@dataclass(frozen=True)
class Found:
    """The results of a rank under one layout."""

    outcomes: dict[tuple[str, int], Outcome]
    """By model and rows of a micro-batch."""
    resumed_exactly: bool
    skipped_infinite_gradient: bool


def _rank(
    rank: int, world: int, layouts: list[tuple[int, int]], folders: dict[str, Path], scratch: Path
) -> dict[tuple[int, int], Found]:
    found = {}
    for tensor, pipeline in layouts:
        layout = init_layout(tensor=tensor, pipeline=pipeline, timeout_seconds=300)
        outcomes = {
            (name, rows): one_update(folder, layout, rows=rows, entropy_kind=KINDS[name], optim=OPTIMS[name])
            for name, folder in folders.items()
            for rows in (1, 4)
        }
        checkpoints = scratch / f"{tensor}{pipeline}{world}"
        resumed_exactly = resumed_before_any_update_equals_fresh(
            folders["tied"], layout, checkpoints / "before"
        ) and resumed_equals_straight(folders["tied"], layout, checkpoints, distributed_optimizer=True)
        found[tensor, pipeline] = Found(
            outcomes, resumed_exactly, infinite_gradient_changes_nothing(folders["tied"], layout)
        )
        parallel_state.destroy_model_parallel()
    return found


KINDS = {"tied": "nll", "untied": "entropy", "Qwen3": "nll"}
OPTIMS = {"tied": dataclasses.replace(OPTIM, max_grad_norm=0.1), "untied": OPTIM, "Qwen3": OPTIM}
"""Gradients of the tied model are clipped."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Outcome, dict[str, Tensor]]]:
    made = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(name)
        save_tiny_model(folder, config)
        expected = expected_outcome(folder, KINDS[name], OPTIMS[name])
        clips = expected.metrics["actor/grad_norm"] > OPTIMS[name].max_grad_norm
        assert clips == (name == "tied"), expected.metrics
        made[name] = (folder, expected, _start_weights(folder))
    return made


def _start_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param([(1, 1)], id="one"),
        pytest.param([(2, 1), (1, 2), (1, 1)], id="two", marks=pytest.mark.extended),
        pytest.param([(2, 2)], id="four", marks=pytest.mark.extended),
    ],
)
def test_update_equals_transformers(
    layouts: list[tuple[int, int]], models: dict[str, tuple[Path, Outcome, dict[str, Tensor]]], tmp_path: Path
) -> None:
    world = max(tensor * pipeline for tensor, pipeline in layouts)
    folders = {name: folder for name, (folder, _, _) in models.items()}
    by_rank = run_gloo(_rank, world, layouts, folders, tmp_path, timeout_seconds=300)
    for of_rank in by_rank:
        assert list(of_rank) == layouts
        for (tensor, pipeline), found in of_rank.items():
            where = f"TP {tensor} PP {pipeline} of {world} ranks"
            assert found.resumed_exactly, f"{where}: resumed weights differ"
            assert found.skipped_infinite_gradient, f"{where}: an infinite gradient changed the weights"
            for (name, rows), outcome in found.outcomes.items():
                _, expected, start = models[name]
                _compare(outcome, expected, start, where=f"{where}, {name}, {rows} rows a micro-batch")


@pytest.mark.parametrize(("policy_loss", "rows"), [("gspo", 1), ("gspo", 3), ("cispo", 3), ("sapo", 3)])
def test_other_losses_equal_transformers(policy_loss: PolicyLoss, rows: int, tmp_path: Path) -> None:
    """GSPO needs whole responses, however they are packed."""
    folder = tmp_path / "model"
    save_tiny_model(folder, CONFIGS["tied"])
    batch = make_batch(make_responses(), "nll", policy_loss=policy_loss)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    expected = expected_update(model, batch, OPTIM)
    with single_rank() as layout:
        metrics = make_policy(folder, layout, rows=rows, optim=OPTIM).update(batch)
    for name in ("actor/pg_loss", "actor/grad_norm"):
        assert metrics[name] == pytest.approx(expected.metrics[name], rel=NORM_TOLERANCE)


def _compare(outcome: Outcome, expected: Outcome, start: dict[str, Tensor], *, where: str) -> None:
    for field in ("logp_BT", "perturbed_logp_BT", "entropy_BT", "kl_BT"):
        difference = (getattr(outcome, field) - getattr(expected, field)).abs().max()
        assert difference < LOGP_TOLERANCE * (5 if field == "kl_BT" else 1), f"{where}: {field} off by {difference}"
    for name, value in expected.metrics.items():
        assert outcome.metrics[name] == pytest.approx(value, rel=LOSS_TOLERANCE), f"{where}: {name}"
    assert outcome.weights.keys() == expected.weights.keys(), where
    for name, weight in expected.weights.items():
        change = weight - start[name]
        assert change.norm() > 0, f"{name} did not change; the test would not see an error"
        error = (outcome.weights[name] - weight).norm() / change.norm()
        assert error < CHANGE_TOLERANCE, f"{where}: the change of {name} is off by {error:.1e} of its norm"


def _save_after_one_update(rank: int, world: int, folder: Path, checkpoints: Path) -> None:
    layout = init_layout(tensor=1, pipeline=1, timeout_seconds=300)
    policy = make_policy(folder, layout, rows=2, optim=OTHER_SIZE_OPTIM)
    policy.update(make_batch(make_responses(), "nll"))
    save_checkpoint(checkpoints, step=1, trainable=policy.trainable, layout=layout, state={}, keep=1)


def _second_update(rank: int, world: int, folder: Path, checkpoints: Path) -> dict[str, Tensor]:
    layout = init_layout(tensor=1, pipeline=1, timeout_seconds=300)
    policy = make_policy(folder, layout, rows=2, optim=OTHER_SIZE_OPTIM)
    load_checkpoint(checkpoints, step=1, trainable=policy.trainable, layout=layout)
    policy.update(make_batch(make_responses(), "nll"))
    return {name: tensor.clone() for name, tensor in policy.hf_weights()}


@pytest.mark.distributed
@pytest.mark.extended
@pytest.mark.parametrize("written, read", [(2, 1), (1, 2)])
def test_resume_under_another_data_parallel_size(
    written: int, read: int, models: dict[str, tuple[Path, Outcome, dict[str, Tensor]]], tmp_path: Path
) -> None:
    """Weights after a second update, against those of a run that kept its size. Adam divides by the root of what it
    summed. Its eps keeps the rounding of a gradient that is nearly zero from becoming a whole step."""
    folder, _, start = models["tied"]
    run_gloo(_save_after_one_update, written, folder, tmp_path, timeout_seconds=300)
    kept, changed = (
        run_gloo(_second_update, size, folder, tmp_path, timeout_seconds=300)[0] for size in (written, read)
    )
    for name, weight in kept.items():
        error = (changed[name] - weight).norm() / (weight - start[name]).norm()
        assert error < CHANGE_TOLERANCE, f"the change of {name} is off by {error:.1e} of its norm"
