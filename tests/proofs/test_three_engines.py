"""A converted model through three engines, by the real commands. Training from one is in test_killed_run.py."""

from __future__ import annotations

import json
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


@pytest.mark.slow
@pytest.mark.extended
def test_rotary_sections_that_a_configuration_leaves_out(tmp_path: Path) -> None:
    """By itself vLLM would give image tokens one coordinate: 0.4 nats from transformers on the row with an image."""
    from digits import checkpoint

    processor = checkpoint.make_processor()
    config = checkpoint.make_config(processor.tokenizer)
    sizes = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}  # heads of 128 values
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]}
    config = type(config)(
        **{
            **config.to_dict(),
            "text_config": {**config.text_config.to_dict(), **sizes, "rope_parameters": rope},
            "vision_config": {**config.vision_config.to_dict(), "out_hidden_size": 256},
        }
    )
    checkpoint.save_checkpoint(checkpoint.make_model(config, seed=2), processor, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    del described["architectures"], described["text_config"]["rope_parameters"]
    described["text_config"] |= {"rope_theta": 1e4, "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(described))
    printed = vppo("convert", "verify", tmp_path, tmp_path, "--vllm")
    assert printed.count("vLLM - transformers") == 2, printed
