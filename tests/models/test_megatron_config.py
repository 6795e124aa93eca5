"""Splits of a model over ranks: what fits, and what is refused with which numbers."""

from __future__ import annotations

import pytest

from megatron_vppo.models.megatron_config import check_tensor_parallel, stage_layers
from megatron_vppo.models.qwen3_vl.family import QWEN3_VL
from megatron_vppo.models.qwen25_vl.family import QWEN25_VL
from tests.models.tiny import tiny_config, tiny_qwen3_config


def test_impossible_layouts_are_refused_with_numbers() -> None:
    config = tiny_config(tied=False, vocab=301)
    check_tensor_parallel(config, tensor=2, vision_split="tensor")
    with pytest.raises(
        ValueError, match=r"2 key-value heads .* parallel.tensor_model_parallel_size = 4; set it to one of \[1, 2\]"
    ):
        check_tensor_parallel(config, tensor=4, vision_split="tensor")
    with pytest.raises(ValueError, match=r"4 attention heads .* 3"):
        check_tensor_parallel(config, tensor=3, vision_split="tensor")
    config.vision_config.num_heads = 3
    with pytest.raises(ValueError, match=r"3 vision attention heads .*, or parallel\.vision_split=images"):
        check_tensor_parallel(config, tensor=2, vision_split="tensor")
    check_tensor_parallel(config, tensor=2, vision_split="images")


def test_pipeline_splits() -> None:
    config = tiny_config(tied=False, vocab=301)
    assert stage_layers(config, family=QWEN25_VL, pipeline=3, pipeline_layers=None) == (1, 1, 1)
    assert stage_layers(config, family=QWEN25_VL, pipeline=2, pipeline_layers=(2, 1)) == (2, 1)
    with pytest.raises(ValueError, match=r"3 layers do not divide over 2.*pipeline_layers, for example \[2, 1\]"):
        stage_layers(config, family=QWEN25_VL, pipeline=2, pipeline_layers=None)
    for wrong in ((1, 1), (3,), (3, 0)):
        with pytest.raises(ValueError, match="must have 2 entries"):
            stage_layers(config, family=QWEN25_VL, pipeline=2, pipeline_layers=wrong)
    with pytest.raises(ValueError, match=r"3 layers are too few for 4 pipeline stages; each .* lower parallel"):
        stage_layers(config, family=QWEN25_VL, pipeline=2, virtual_stages=2, pipeline_layers=None)
    config.text_config.num_hidden_layers = 8
    for given, expected in ((None, (2, 2, 2, 2)), ((1, 3, 2, 2), (1, 3, 2, 2))):
        split = stage_layers(config, family=QWEN25_VL, pipeline=2, virtual_stages=2, pipeline_layers=given)
        assert split == expected


def test_deepstack_layers_have_to_lie_on_the_first_stage() -> None:
    config = tiny_qwen3_config(tied=False, vocab=301, taps=(0, 2))
    assert stage_layers(config, family=QWEN3_VL, pipeline=2, pipeline_layers=(2, 1)) == (2, 1)
    with pytest.raises(ValueError, match=r"first pipeline stage has 1 language layers, but the first 2 take features"):
        stage_layers(config, family=QWEN3_VL, pipeline=3, pipeline_layers=None)


def test_any_tensor_parallel_size_is_refused_at_once() -> None:
    """The sizes that fit were searched for up to the one asked for: minutes for this one."""
    with pytest.raises(ValueError, match=r"set it to one of \[1, 2\]"):
        check_tensor_parallel(tiny_config(tied=False, vocab=301), tensor=2**31 - 1, vision_split="tensor")
