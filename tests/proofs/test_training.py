"""The whole program on real components: `vppo train` with Megatron Core over gloo, vLLM on CPU, real images."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_vppo.observability.metrics import read_metrics
from megatron_vppo.observability.rollouts import read_rollouts, rollout_path
from tests.proofs.runs import (
    LEARNING,
    LEARNING_STEPS,
    ROOT,
    check_export,
    check_learned,
    train,
)


@pytest.mark.slow
def test_reward_rises_and_engines_hold_the_trainers_weights(digits: Path, tmp_path: Path) -> None:
    run = train(digits, tmp_path, "learns", *LEARNING)
    trained = check_learned(run)
    assert all(line["actor/grad_norm"] > 0 and line["critic/score/max"] == 1.0 for line in trained), "a dead run"
    _check_names_of_metrics(read_metrics(run))
    first = trained[0]
    assert first["actor/perception_token_fraction"] == pytest.approx(4 / 8, abs=0.02), "ceil(0.4 x 8) of 8 tokens"
    assert first["actor/low_var_kl_mean_selected"] > 2 * first["actor/low_var_kl_mean_rejected"] > 0
    assert (run / "report.html").stat().st_size > 50_000
    imaged = [record for record in read_rollouts(rollout_path(run, LEARNING_STEPS)) if "images" in record]
    assert {record["accuracy"] for record in imaged} == {0.0, 1.0}, "right and wrong answers keep their images"
    check_export(run / "huggingface" / f"step_{LEARNING_STEPS}", tmp_path)


def _check_names_of_metrics(lines: list[dict[str, float]]) -> None:
    """The run logs what docs/metrics.md lists, and nothing else."""
    rows = [line for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if line.startswith("| `")]
    documented: set[str] = set()
    for row in rows:
        first, *others = re.findall(r"`([^`]+)`", row.split("|")[1])
        documented.add(first)
        for ending in others:  # a whole name, or `/max` or `_max` in place of the first one's last part
            whole = not ending.startswith(("/", "_"))
            documented.add(ending if whole else first.rpartition(ending[0])[0] + ending)
    logged = {name for line in lines for name in line} - {"step", "time"}
    placeholders = {
        "timing_s/...", ".../max", "..._max", ".../min", "..._min", "reward/<name>", "val/reward/<name>",
        "val/<name>/accuracy", "data/<name>/trained_share", "data/<name>/reward", "data/<name>/accuracy",
    }  # fmt: skip
    assert logged <= documented, logged - documented
    assert documented - logged - placeholders == {
        "actor/rollout_correction_mean", "actor/kl_loss", "actor/reference_kl", "rollout/carried_groups",
        "rollout/carried_share", "actor/perception_loss", "actor/perturbed_entropy_penalty", "actor/kl_prcp_loss",
        "actor/aug_entropy_loss", "actor/score_centering", "reward/overlong",
    }, "of settings that this run has not"  # fmt: skip
