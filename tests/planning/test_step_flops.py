"""FLOPs of a model and of a step: by hand, and against what torch counts in transformers' models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from megatron_vppo.models.flops import ModelCost, model_cost
from megatron_vppo.planning.step_flops import (
    StepWork,
    least_update,
    micro_batches_of_group,
    prefill_of_prompt,
    scoring_of_group,
    update_of_group,
)
from tests.models.tiny import IMAGE, MODEL_CLASSES, PATCH_VALUES, tiny_config, tiny_qwen3_config


def small_config() -> Qwen2_5_VLConfig:
    """Two language layers, three vision layers of which one sees the whole image."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 50, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]},
        },
        vision_config={
            "depth": 3, "hidden_size": 8, "intermediate_size": 24, "num_heads": 2, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56, "fullatt_block_indexes": [1],
            "out_hidden_size": 16,
        },
        image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6,
        attn_implementation="eager",
    )  # fmt: skip


def test_cost_of_a_small_model_by_hand() -> None:
    cost = model_cost(small_config())
    # q 16x16, k and v 16x8 each, o 16x16, three MLP matrices 16x40; 2 layers; 2 FLOPs per parameter.
    assert cost.per_token == 2 * 2 * (256 + 128 + 128 + 256 + 3 * 640)
    assert cost.per_head_position == 2 * 50 * 16
    # Scores and values: 2 FLOPs x width 16 each for every pair of tokens, half of which are masked; 2 layers.
    assert cost.attention == 2 * (2 * 16 + 2 * 16) / 2
    # qkv and o 4 x 8x8, MLP 3 x 8x24, 3 layers; patch 3*2*14*14 values to 8; merger 32x32 and 32x16 per four patches.
    assert cost.per_patch == 2 * (3 * (256 + 576) + 1176 * 8 + (1024 + 512) // 4)
    assert cost.full_attention == 2 * 2 * 8
    assert cost.window_attention == 2 * (2 * 2 * 8) * 16  # two layers; a window of 4 x 4 patches


def test_linear_layers_agree_with_torchs_count_of_the_real_model() -> None:
    config = small_config()
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    ids = torch.tensor([[7, 5, 3, 3, 3, 3, 6, 8, 9, 10]])
    grid = torch.tensor([[1, 4, 4]])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(
            input_ids=ids, pixel_values=torch.randn(16, 1176), image_grid_thw=grid, mm_token_type_ids=(ids == 3).int()
        )
    by_operation = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    counted = sum(n for op, n in by_operation.items() if op in ("aten.mm", "aten.addmm", "aten.convolution"))
    cost = model_cost(config)
    assert counted == 10 * (cost.per_token + cost.per_head_position) + 16 * cost.per_patch


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
def test_forward_and_backward_agree_with_torchs_count_of_whole_models(family: str) -> None:
    """Attention included. Transformers computes the full square, causal or not: twice the causal half counted here."""
    if family == "qwen2.5":
        config: Any = tiny_config(tied=False, vocab=299)
    else:
        config = tiny_qwen3_config(tied=False, vocab=299, taps=(0, 2))
    config._attn_implementation = "eager"
    model = MODEL_CLASSES[config.model_type](config).train()
    tokens, patches = 40, 64
    ids = torch.full((1, tokens), 7)
    ids[0, 3 : 3 + patches // 4] = IMAGE
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(patches, PATCH_VALUES),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    with FlopCounterMode(display=False) as forward:
        loss = model(**inputs).logits.square().mean()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    cost = model_cost(config)
    counted = cost.sequence(tokens) + cost.attention * tokens**2
    counted += tokens * cost.per_head_position + cost.image(patches)
    assert forward.get_total_flops() == pytest.approx(counted, rel=0.01)
    # Pixels need no gradient: the backward pass of the first layer has one product instead of two.
    first = 2 * patches * PATCH_VALUES * config.vision_config.hidden_size
    assert backward.get_total_flops() == pytest.approx(2 * counted - first, rel=0.01)


COST = ModelCost(
    per_token=100, attention=2, per_head_position=50, per_patch=10, full_attention=1, window_attention=3
)  # fmt: skip
WORK = StepWork(
    prompts=4, responses=8, drawn=2.0, minibatches=2, prompt_tokens=6, response_tokens=5, longest_response=9,
    images=2, patches=4, rows_per_update=4, rows_per_scoring=8,
)  # fmt: skip


def test_a_packed_group_by_hand() -> None:
    """A row is 6 + 5 - 1 = 10 tokens: 1,000 + 2 x 100 FLOPs. An image of 4 patches is 13 x 4 + 16 = 68, two are 136."""
    update, scoring = update_of_group(COST, WORK), scoring_of_group(COST, WORK)
    assert (update.language, update.attention, update.head, update.tokens) == (8 * 1200, 8 * 200, 8 * 250, 80)
    assert (update.towers, update.tower) == (2, 136), "the second micro-batch of 4 rows reads the features of the first"
    assert (scoring.language, scoring.head, scoring.tokens) == (16 * 1200, 16 * 250, 160)
    assert (scoring.perturbed, update.perturbed) == (16, 0)
    assert (scoring.towers, scoring.tower) == (18, 9 * 136), "the originals once, and those of 8 perturbed rows"


def test_a_group_that_shares_its_prompt_by_hand() -> None:
    """A prompt of 6 tokens is 600 + 2 x 36 = 672, the 4 tokens after it 400 + 2 x (100 - 36) = 528."""
    update, scoring = (of(COST, replace(WORK, shared_prefix=True)) for of in (update_of_group, scoring_of_group))
    assert (update.language, update.tokens) == (2 * 672 + 8 * 528, 2 * 6 + 8 * 4), "two micro-batches"
    assert update.attention == 2 * (2 * 36 + 8 * 64)
    assert (scoring.language, scoring.tokens) == (672 + 8 * 528 + 8 * 1200, 6 + 8 * 4 + 80), "perturbed rows are whole"
    by_image = scoring_of_group(COST, replace(WORK, shared_prefix=True, perturbed_per_row=False))
    assert (by_image.language, by_image.tokens) == (2 * (672 + 8 * 528), 2 * 38)
    assert (update.tower, scoring.tower, by_image.tower) == (136, 9 * 136, 2 * 136)


def test_the_perturbed_view_in_the_update_by_hand() -> None:
    """With as many rows to a micro-batch, it reads what scoring of both views reads."""
    both = replace(WORK, rows_per_scoring=4, scores_both_views=False, updates_both_views=True)
    update, scoring = update_of_group(COST, both), scoring_of_group(COST, both)
    assert update == scoring_of_group(COST, replace(WORK, rows_per_scoring=4))
    assert scoring == update_of_group(COST, WORK)
    assert (update.language, update.tower, update.perturbed) == (16 * 1200, 9 * 136, 16)
    assert least_update(COST, both) == 3 * 4 * (16 * (1200 + 250) + 9 * 136)
    shared = replace(both, shared_prefix=True, perturbed_per_row=False)
    assert least_update(COST, shared) == 3 * 4 * 2 * (672 + 8 * (528 + 250) + 136)


def test_images_shared_by_a_group_and_split_groups() -> None:
    by_image = replace(WORK, perturbed_per_row=False)
    assert scoring_of_group(COST, by_image).tower == 2 * 136
    assert scoring_of_group(COST, replace(by_image, rows_per_scoring=4)).tower == 2 * 136
    assert [micro_batches_of_group(8, rows) for rows in (1, 3, 4, 8, 16)] == [8, 3, 2, 1, 1]


def test_least_work_by_hand() -> None:
    assert least_update(COST, WORK) == 3 * 4 * (8 * (1200 + 250) + 136)
    assert least_update(COST, replace(WORK, shared_prefix=True)) == 3 * 4 * (672 + 8 * (528 + 250) + 136)
    assert prefill_of_prompt(COST, WORK) == 600 + 2 * 36 + 136
