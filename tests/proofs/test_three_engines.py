"""A converted model through three engines, by the real commands. Training from one is in test_killed_run.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.proofs.runs import vppo


@pytest.mark.slow
@pytest.mark.extended
def test_logprobs_agree_through_all_three_engines(digits: Path, tmp_path: Path) -> None:
    vppo("convert", "hf-to-megatron", digits / "model", tmp_path / "converted")
    printed = vppo("convert", "verify", digits / "model", tmp_path / "converted", "--vllm")
    for engines in ("Megatron - transformers", "vLLM - transformers", "vLLM - Megatron"):
        assert printed.count(engines) == 2, printed
    assert "tolerance 1e-04" in printed
