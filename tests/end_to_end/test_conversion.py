"""A converted model through three engines, by the real commands. Training from one is in test_training.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def vppo(*arguments: object) -> str:
    command = [sys.executable, "-m", "megatron_vppo.cli.main", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.extended
def test_logprobs_agree_through_all_three_engines(digits: Path, tmp_path: Path) -> None:
    vppo("convert", "hf-to-megatron", digits / "model", tmp_path / "converted")
    printed = vppo("convert", "verify", digits / "model", tmp_path / "converted", "--vllm")
    for engines in ("Megatron - transformers", "vLLM - transformers", "vLLM - Megatron"):
        assert printed.count(engines) == 2, printed
    assert "tolerance 1e-04" in printed
