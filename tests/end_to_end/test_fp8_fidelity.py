"""`vppo fp8-fidelity` on real components: vLLM samples, Megatron scores, on CPU with emulated FP8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESPONSES, MOST_TOKENS = 4 * 3, 6


def run(digits: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "megatron_vppo.cli.main", "fp8-fidelity", "--config", "examples/digits_cpu/config.yaml",
        f"data.train_files={digits}/data/train.parquet", f"data.val_files={digits}/data/val.parquet",
        f"model.path={digits}/model", "rollout.n=3", f"data.max_response_length={MOST_TOKENS}",
        "rollout.cpu_kv_cache_gib=0.125", "data.max_val_rows=8", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.slow
def test_command_reports_what_fp8_changes(digits: Path, tmp_path: Path) -> None:
    recipes = ("blockwise", "delayed")
    asked = [f"--recipe={name}" for name in recipes]
    small = ("actor.micro_batch_size_per_device_for_experience=5", "algorithm.dependency=kl_full")
    done = run(digits, "--prompts=4", f"--out={tmp_path}", *asked, *small)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Emulated FP8 against float32" in done.stdout and "bfloat16 alone" in done.stdout
    report = json.loads((tmp_path / "fidelity.json").read_text())
    assert report["emulated"] is True and report["baseline_dtype"] == "float32"
    assert (report["prompts"], report["responses"], report["split"]) == (4, RESPONSES, "val")
    assert RESPONSES <= report["tokens"] <= RESPONSES * MOST_TOKENS
    assert tuple(report["recipes"]) == recipes
    for found in (*report["recipes"].values(), report["controls"]["bfloat16"]):
        assert 0 < found["logp"]["p50"] <= found["logp"]["p99"] <= found["logp"]["largest"] < 1
        assert found["masked_logp"]["mean"] > 0 and found["dependency"]["largest"] > 0
        assert 0.4 < found["overlap_least"] <= found["overlap"] <= 1 and 0 <= found["lost_dependency"] < 0.2
        assert 0.5 < found["spearman"] < 1
        drawn = found["histograms"]
        assert sum(drawn["logp"]) == sum(drawn["masked_logp"]) == report["tokens"]
        assert sum(drawn["dependency_up"]) + sum(drawn["dependency_down"]) == report["tokens"]
        assert sum(drawn["overlap"]) == RESPONSES
    bfloat16 = report["controls"]["bfloat16"]["logp"]["mean"]
    assert all(found["logp"]["mean"] > 2 * bfloat16 for found in report["recipes"].values()), "3 bits against 7"
    page = (tmp_path / "fidelity.html").read_text()
    assert "<title>Emulated FP8 against float32</title>" in page
    assert "http:" not in page and "https:" not in page


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--recipe=delayed", "fp8.bf16_layers_at_ends=1"], {}, "delayed takes no fp8.bf16_layers_at_ends"),
        (["fp8.bf16_layers_at_ends=2"], {}, "leaves none of the 4 language layers"),
        ([], {"RANK": "0", "WORLD_SIZE": "2"}, "runs in one process"),
    ],
)
def test_impossible_requests_end_before_the_engine_starts(
    digits: Path, tmp_path: Path, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    done = run(digits, f"--out={tmp_path}", *arguments, **environment)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr[-2000:]
    assert not list(tmp_path.iterdir())
