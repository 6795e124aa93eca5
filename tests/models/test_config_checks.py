"""Numbers of a configuration that cannot work are named; what may be left out is filled in as transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from megatron_vppo.models.config_checks import engine_overrides
from megatron_vppo.models.families import family_of
from megatron_vppo.models.read_config import read_hf_config
from tests.models.tiny import tiny_config, tiny_qwen3_config

QWEN25 = tiny_config(tied=False, vocab=301)
QWEN3 = tiny_qwen3_config(tied=False, vocab=301, taps=(1,))
ROTARY = {"qwen2_5_vl": Qwen2_5_VLRotaryEmbedding, "qwen3_vl": Qwen3VLTextRotaryEmbedding}
SECTIONS = {"qwen2_5_vl": [16, 24, 24], "qwen3_vl": [24, 20, 20]}


def written(folder: Path, model: Any, *, remove: tuple[str, ...] = (), **changes: Any) -> Path:
    """Writes a configuration; `remove` and the keys of `changes` are dotted names, with two underscores as the dot."""
    model.save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text())
    for name in remove:
        *sections, last = name.split("__")
        inner = described
        for section in sections:
            inner = inner[section]
        del inner[last]
    for name, value in changes.items():
        *sections, last = name.split("__")
        inner = described
        for section in sections:
            inner = inner[section]
        inner[last] = value
    (folder / "config.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize("model", [QWEN25, QWEN3], ids=["2.5", "3"])
@pytest.mark.parametrize("rope", ["null", "no section", "left out"])
def test_rotary_sections_that_are_left_out_are_those_of_transformers(model: Any, rope: str, tmp_path: Path) -> None:
    wide = {"text_config__hidden_size": 512, "text_config__head_dim": 128, "vision_config__out_hidden_size": 512}
    ropes: dict[str, dict[str, Any]] = {
        "null": {"text_config__rope_scaling": None, "text_config__rope_theta": 1e4},
        "no section": {"text_config__rope_scaling": {"type": "default"}, "text_config__rope_theta": 1e4},
        "left out": {"text_config__rope_theta": 1e4},
    }
    folder = written(tmp_path, model, remove=("text_config__rope_parameters",), **wide, **ropes[rope])
    read = read_hf_config(folder)
    assert read.text_config.rope_parameters["mrope_section"] == SECTIONS[read.model_type]
    assert engine_overrides(read)["text_config"]["rope_parameters"]["mrope_section"] == SECTIONS[read.model_type]
    positions_3C = torch.tensor([[0, 3, 7], [0, 5, 1], [0, 2, 9]])
    cos, sin = ROTARY[read.model_type](type(model).from_pretrained(folder).text_config)(
        torch.zeros(1), positions_3C[:, None, :]
    )
    angles_CE = family_of(read).rotary(read.text_config)(positions_3C)[:, 0, 0]
    assert torch.allclose(angles_CE.cos(), cos[0], atol=1e-6)
    assert torch.allclose(angles_CE.sin(), sin[0], atol=1e-6)


def test_architectures_that_are_left_out(tmp_path: Path) -> None:
    """vLLM asks for them, transformers does not."""
    read = read_hf_config(written(tmp_path, QWEN25, architectures=None))
    assert engine_overrides(read)["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no positions": (
        QWEN25,
        {"text_config__max_position_embeddings": 0},
        r"text_config\.max_position_embeddings is 0, it must be",
    ),
    "no heads": (QWEN25, {"vision_config__num_heads": 0}, r"vision_config\.num_heads is 0, it must be"),
    "two patch sizes": (QWEN25, {"vision_config__patch_size": [14, 14]}, r"vision_config\.patch_size is \[14, 14\]"),
    "key-value heads": (
        QWEN25,
        {"text_config__num_key_value_heads": 3},
        r"4 attention heads cannot share 3 key-value heads",
    ),
    "width and heads": (
        QWEN25,
        {"text_config__hidden_size": 66, "vision_config__out_hidden_size": 66},
        r"hidden_size 66 does not divide by 4 heads",
    ),
    "vision width and heads": (QWEN3, {"vision_config__num_heads": 5}, r"vision_config: hidden_size 48 .* by 5 heads"),
    "vision heads": (QWEN3, {"vision_config__num_heads": 8}, r"vision_config: heads of 6 values; .* multiple of 4"),
    "sections": (
        QWEN25,
        {"text_config__rope_parameters__mrope_section": [2, 3, 4]},
        r"mrope_section is \[2, 3, 4\] and must be three numbers above 0 that sum to 8",
    ),
    "two sections": (
        QWEN25,
        {"text_config__rope_parameters__mrope_section": [4, 4]},
        r"mrope_section is \[4, 4\] and must be three numbers",
    ),
    "a section below 0": (
        QWEN25,
        {"text_config__rope_parameters__mrope_section": [-4, 6, 6]},
        r"mrope_section is \[-4, 6, 6\] and must be three numbers above 0",
    ),
    "sections with fractions": (
        QWEN25,
        {"text_config__rope_parameters__mrope_section": [2.0, 3.0, 3.0]},
        r"mrope_section is \[2\.0, 3\.0, 3\.0\] and must be",
    ),
    "default sections": (
        QWEN25,
        {"text_config__rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        r"mrope_section is \[16, 24, 24\] and must be three numbers above 0 that sum to 8",
    ),
    "theta": (
        QWEN25,
        {"text_config__rope_parameters__rope_theta": 0.0},
        r"rope_theta is 0\.0 and must be a number above 0",
    ),
    "interleaved": (
        QWEN25,
        {"text_config__rope_parameters__mrope_interleaved": True},
        r"mrope_interleaved is True, but models of type qwen2_5_vl have False; leave it out",
    ),
    "not interleaved": (
        QWEN3,
        {"text_config__rope_parameters__mrope_interleaved": False},
        r"mrope_interleaved is False, but models of type qwen3_vl have True",
    ),
    "half rotary": (
        QWEN25,
        {"text_config__rope_parameters__partial_rotary_factor": 0.5},
        r"partial_rotary_factor is 0\.5, only 1 is supported",
    ),
    "epsilon": (QWEN25, {"text_config__rms_norm_eps": 0.0}, r"rms_norm_eps is 0\.0 and must be above 0"),
    "grey images": (QWEN25, {"vision_config__in_channels": 1}, r"1 channels and 2 frames per patch"),
    "frames": (QWEN3, {"vision_config__temporal_patch_size": 1}, r"3 channels and 1 frames per patch"),
    "window": (QWEN25, {"vision_config__window_size": 27}, r"a window of 27 pixels is smaller than .* 28"),
    "full layers": (
        QWEN25,
        {"vision_config__fullatt_block_indexes": [1, 3]},
        r"fullatt_block_indexes names the layers \[3\], there are 3",
    ),
    "image token": (QWEN25, {"image_token_id": 301}, r"image_token_id is 301, the vocabulary has 301 tokens"),
    "padding": (QWEN25, {"text_config__pad_token_id": 400}, r"pad_token_id is 400, the vocabulary has 301"),
    "another class": (
        QWEN25,
        {"architectures": ["Qwen2VLForConditionalGeneration"]},
        r"architectures is \['Qwen2VLFor.*'\], but models of type qwen2_5_vl are Qwen2_5_VLForConditionalGeneration",
    ),
    "quantised": (QWEN25, {"quantization_config": {"quant_method": "awq", "bits": 4}}, r"the weights are quantised"),
}


@pytest.mark.parametrize("case", WRONG)
def test_numbers_that_cannot_work(case: str, tmp_path: Path) -> None:
    model, changes, message = WRONG[case]
    with pytest.raises(ValueError, match=rf"config\.json[\s\S]*{message}"):
        read_hf_config(written(tmp_path, model, **changes))


def test_all_are_named_together(tmp_path: Path) -> None:
    folder = written(tmp_path, QWEN25, image_token_id=301, text_config__pad_token_id=400)
    with pytest.raises(
        ValueError, match=r"config\.json describes a model that cannot be built:\n  - .*301.*\n  - .*400"
    ):
        read_hf_config(folder)


def test_padding_counts_from_the_end_below_zero(tmp_path: Path) -> None:
    assert read_hf_config(written(tmp_path, QWEN25, text_config__pad_token_id=-1)).text_config.pad_token_id == -1
