"""Settings of a run to those of sampling: for training, for validation, and the tokens that end a response."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.setup.sampling import eos_ids, train_sampling, val_sampling


def test_generation_configuration_before_tokenizer(tmp_path: Path) -> None:
    tokenizer = SimpleNamespace(eos_token_id=7)
    assert eos_ids(tmp_path, tokenizer) == (7,)
    for eos, expected in (([5, 6], (5, 6)), (4, (4,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert eos_ids(tmp_path, tokenizer) == expected
    (tmp_path / "generation_config.json").write_text("{}")
    assert eos_ids(tmp_path, tokenizer) == (7,)
    with pytest.raises(ValueError, match="names no EOS token"):
        eos_ids(tmp_path, SimpleNamespace(eos_token_id=None))


def test_training_and_validation_have_settings_of_their_own() -> None:
    config = RunConfig.model_validate(
        {
            "data": {"train_files": "x", "max_response_length": 9},
            "model": {"path": "m"},
            "rollout": {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "val": {"temperature": 0.0, "top_p": 0.8}},
        }
    )
    train, val = train_sampling(config, (1,)), val_sampling(config, (1,))
    assert (train.temperature, train.top_p, train.top_k, train.max_tokens) == (0.7, 0.9, 5, 9)
    assert (val.temperature, val.top_p, val.top_k, val.max_tokens) == (0.0, 0.8, -1, 9)
    assert train.stop_token_ids == val.stop_token_ids == (1,)
