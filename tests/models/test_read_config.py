"""A configuration that cannot be read is named; no code next to it is executed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vppo.models.read_config import read_hf_config
from tests.models.tiny import tiny_config, tiny_qwen3_config


def test_both_families(tmp_path: Path) -> None:
    tiny_config(tied=True, vocab=299).save_pretrained(tmp_path / "a")
    tiny_qwen3_config(tied=False, vocab=301, taps=(1,)).save_pretrained(tmp_path / "b")
    assert read_hf_config(tmp_path / "a").text_config.vocab_size == 299
    assert read_hf_config(tmp_path / "b").vision_config.deepstack_visual_indexes == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"config\.json is not valid JSON \(Expecting value"),
        ('{"model_type": "qwen2_5_vl", ', r"config\.json is not valid JSON"),
        ("[" * 100_000, r"config\.json is not valid JSON"),
        ("[]", r"config\.json: a model of type None is not supported; qwen2_5_vl, qwen3_vl are"),
        ('{"model_type": "qwen2"}', r"config\.json: a model of type 'qwen2' is not supported"),
        ('{"model_type": "qwen3_vl", "text_config": "none"}', r"config\.json: ."),
        ('{"model_type": "qwen2_5_vl", "text_config": {"hidden_size": "wide"}}', r"config\.json: ."),
    ],
)
def test_no_configuration_of_ours(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_hf_config(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent: no such folder"):
        read_hf_config(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize("model_type", ["own", "qwen2_5_vl"])
def test_code_beside_it_is_not_run(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks on the terminal whether to run it."""
    tiny_config(tied=True, vocab=299).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, "model_type": model_type, "auto_map": {"AutoConfig": "own.Config"}}))
    (tmp_path / "own.py").write_text(
        f"from transformers import Qwen2_5_VLConfig\nopen({str(tmp_path / 'ran')!r}, 'w')\n"
        f"class Config(Qwen2_5_VLConfig):\n    model_type = {model_type!r}\n"
    )
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    if model_type == "own":
        with pytest.raises(ValueError, match="a model of type 'own' is not supported"):
            read_hf_config(tmp_path)
    else:
        assert read_hf_config(tmp_path).text_config.vocab_size == 299
    assert not (tmp_path / "ran").exists()
