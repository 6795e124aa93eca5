"""`vppo fp8-fidelity` on real components: vLLM samples, Megatron scores, on CPU with emulated FP8."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vppo.cli.main import main

ROOT = Path(__file__).parents[2]
RESPONSES, MOST_TOKENS = 4 * 3, 6


def arguments(digits: Path, options: list[str], *overrides: str) -> list[str]:
    return [
        "fp8-fidelity", "--config", str(ROOT / "examples/digits_cpu/config.yaml"), *options,
        f"data.train_files={digits}/data/train.parquet", f"data.val_files={digits}/data/val.parquet",
        f"model.path={digits}/model", "rollout.n=3", f"data.max_response_length={MOST_TOKENS}",
        "rollout.cpu_kv_cache_gib=0.125", "data.max_val_rows=8", *overrides,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.extended
def test_command_reports_what_fp8_changes(digits: Path, tmp_path: Path) -> None:
    recipes = ("blockwise", "delayed")
    asked = [f"--recipe={name}" for name in recipes]
    small = ("actor.micro_batch_size_per_device_for_experience=5", "algorithm.dependency=kl_full")
    command = [sys.executable, "-m", "megatron_vppo.cli.main"]
    command += arguments(digits, ["--prompts=4", f"--out={tmp_path}", *asked], *small)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
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
    ("options", "overrides", "environment", "message"),
    [
        (["--recipe=delayed"], ["fp8.bf16_layers_at_ends=1"], {}, "delayed: takes no fp8.bf16_layers_at_ends"),
        ([], ["fp8.bf16_layers_at_ends=2"], {}, "leaves none of the 4 layers"),
        ([], [], {"RANK": "0", "WORLD_SIZE": "2"}, "runs in one process"),
    ],
)
def test_impossible_requests_end_before_the_engine_starts(
    digits: Path,
    tmp_path: Path,
    options: list[str],
    overrides: list[str],
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(arguments(digits, [f"--out={tmp_path}", *options], *overrides)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
