"""report.html of runs whose files hold what no run writes: the page is made, and says what it can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard

from megatron_vppo.observability.report import render_report
from megatron_vppo.observability.rollouts import rollout_path

LINE = {"step": 1, "timing_s/step": 2.0, "val/accuracy": 0.25, "training/rollout_logp_diff_max": 0.01}
RECORD = {"split": "train", "row": 0, "problem": "sum?", "tokens": ["a", "b"], "dependency": [0.1, 0.2], "accuracy": 1}


def write(run_dir: Path, *, lines: list[str], config: str = "", records: list[str]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (run_dir / "config.yaml").write_text(config)
    path = rollout_path(run_dir, 1)
    path.parent.mkdir()
    path.write_bytes(zstandard.compress("".join(f"{record}\n" for record in records).encode()))


@pytest.mark.parametrize(
    "config",
    [
        "trainer: {experiment_name: 2026-13-45}",  # YAML takes it for a date
        "[" * 100_000,
        "rollout: {logprob_diff_bound: -1}",
        "rollout: {logprob_diff_bound: 0}",
        "rollout: {logprob_diff_bound: .nan}",
        f"rollout: {{logprob_diff_bound: {10**400}}}",
        f"algorithm: {{top_p_perception_tokens: {10**400}, use_vppo_on_perception: true}}",
        "algorithm: {top_p_perception_tokens: many, use_vppo_on_perception: true, use_advantage_shaping: true}",
        "algorithm: {top_p_perception_tokens: [1], use_vppo_on_perception: true, use_advantage_shaping: true}",
    ],
)
def test_settings(config: str, tmp_path: Path) -> None:
    write(tmp_path, lines=[json.dumps(LINE)], config=config, records=[])
    html = render_report(tmp_path)
    assert "Held-out accuracy 25% at step 1" in html and config[:40] in html


@pytest.mark.parametrize("value", [5e-324, 1e-310, 1.7e308, -1.7e308, 10**400])
def test_numbers_at_the_ends_of_what_a_float_holds(value: float, tmp_path: Path) -> None:
    names = ("timing_s/step", "timing_s/gen", "actor/loss", "actor/low_var_kl_mean_selected", "perf/throughput")
    strange = [{"step": step, **dict.fromkeys((*names, "rollout/sampled_groups"), value)} for step in (2, 3)]
    other = {"step": 4, "actor/loss": -value, "rollout/kept_groups": 3, "rollout/sampled_groups": value}
    write(tmp_path, lines=[json.dumps(line) for line in (LINE, *strange, other)], records=[])
    assert "Held-out accuracy 25% at step 1" in render_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", 5), ("images", "abc"), ("images", {"original": "a"}), ("tokens", 5), ("tokens", {"a": 1}),
        ("row", [1]), ("split", {"a": 1}), ("accuracy", 10**400), ("dependency", [10**400, 1e308]), ("kept", 1),
        ("reward", [1]), ("problem", None), ("reward_error", [1]),
    ],
)  # fmt: skip
def test_fields_of_other_types(name: str, value: object, tmp_path: Path) -> None:
    write(tmp_path, lines=[json.dumps(LINE)], records=[json.dumps({**RECORD, name: value}), json.dumps(RECORD)])
    assert render_report(tmp_path).count("<article") == 2


def test_a_record_that_is_too_deep(tmp_path: Path) -> None:
    write(tmp_path, lines=[json.dumps(LINE)], records=["[" * 100_000, json.dumps(RECORD)])
    assert render_report(tmp_path).count("<article") == 1
