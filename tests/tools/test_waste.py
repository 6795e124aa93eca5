"""The parts of waste.py: floors, differences and counts, against numbers worked out by hand or by other means."""

from __future__ import annotations

import faulthandler
import json
import mmap
import random
import signal
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from bench import waste
from bench.counted_flops import Floor, count_flops
from bench.pretended_memory import Moment, Tally
from bench.waste_bars import Bar, Case
from bench.waste_export import WRITTEN, _round_trips, live_weights
from bench.waste_packing import draw_responses
from bench.waste_policy import GRID, LENGTHS, PATCH_SIDE, distinct_image_bytes, make_responses, small_config
from bench.waste_waits import SMALL_PATCH, Counted, _pixel_bytes
from bench.waste_widths import odd_widths, row_distance
from bench.workload import with_layers
from bench.written_bytes import WrittenBytes

from megatron_vppo.models.flops import ModelCost
from megatron_vppo.planning.published import PUBLISHED, published_config

COST = ModelCost(
    per_token=10, attention=2, per_head_position=7, per_patch=3, full_attention=1, window_attention=4
)  # fmt: skip


def test_a_bar_is_met_if_all_of_its_cases_are() -> None:
    met, missed = Case("a", 1.0, 1.0), Case("b", 1.23456789, 1.2)
    assert Bar(3, "words", (met,)).report() == {
        "bar": 3, "words": "words", "met": True, "cases": {"a": {"value": 1, "limit": 1, "met": True}}
    }  # fmt: skip
    report = Bar(3, "words", (met, missed), {"line": 2}).report()
    assert report["met"] is False and report["where"] == {"line": 2}
    assert report["cases"]["b"] == {"value": 1.2346, "limit": 1.2, "met": False}


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def test_floors_by_hand() -> None:
    rows = make_responses(1, lengths=(3, 2))
    prompt, patches = len(rows[0].prompt.token_ids), GRID[1] * GRID[2]
    image = 7 * patches + patches**2
    shared = image + 10 * prompt + 2 * prompt**2 + 5 * 7  # the prompt and its image once, five positions of the head
    shared += 3 * 10 + 2 * ((prompt + 2) ** 2 - prompt**2) + 2 * ((prompt + 1) ** 2 - prompt**2)
    alone = sum(image + 10 * n + 2 * n**2 for n in (prompt + 2, prompt + 1)) + 5 * 7
    floor = Floor(COST, patch_product=2)
    assert floor.scoring([rows], per=None) == shared
    assert floor.scoring([rows], per="image") == 2 * shared
    assert floor.scoring([rows], per="row") == shared + alone
    two = make_responses(2, lengths=(3, 2))
    assert floor.scoring([two[:2], two[2:]], per=None) == 2 * shared
    assert floor.scoring([two[:2], two[2:]], per="image") == 4 * shared
    assert floor.update([rows]) == 3 * shared + 5 * 7 - 2 * patches
    # Each of three ranks has the tower's first product: of the update twice, of a view once.
    ranks = Floor(COST, patch_product=2, ranks=3)
    assert ranks.scoring([rows], per="image") == 2 * shared + 2 * 2 * 2 * patches
    assert ranks.update([rows]) == floor.update([rows]) + 2 * 2 * 2 * patches


def test_flops_of_attention_with_and_without_a_mask() -> None:
    q, k = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 9, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attend(q, q, q, is_causal=True)) == 4 * 2 * 3 * 5 * 5 * 8 / 2
    assert count_flops(lambda: attend(q, k, k)) == 4 * 2 * 3 * 5 * 9 * 8
    causal = torch.nn.attention.bias.causal_lower_right
    assert count_flops(lambda: attend(q, k, k, attn_mask=causal(5, 9))) == 4 * 2 * 3 * 5 * 9 * 8
    assert count_flops(lambda: torch.zeros(4, 5) @ torch.zeros(5, 6)) == 2 * 4 * 5 * 6


# --- Waits and bytes --------------------------------------------------------------------------------------------------


def test_pixels_are_what_grows_with_a_patch() -> None:
    """Two float32 of each of 1000 values of a patch of 14 x 14 pixels, and 300 other bytes."""
    large = Counted(Tally(bytes_to_device=Counter(pixels=8000, ids=200, masks=100)), tokens=50)
    small = Counted(Tally(bytes_to_device=Counter(pixels=2000, ids=200, masks=100)), tokens=50)
    assert SMALL_PATCH**2 * 4 == PATCH_SIDE**2
    assert _pixel_bytes(large, small) == 8000


def test_counts_between_micro_batches() -> None:
    found = Counted(Tally(moments=[Moment(5, 2), Moment(7, 4), Moment(11, 10)]), tokens=1)
    assert (found.waits_between, found.copies_between) == (6, 4)


def test_only_the_values_of_a_patch_depend_on_its_side() -> None:
    for family in ("qwen2.5-vl", "qwen3-vl"):
        large, small = small_config(family).to_dict(), small_config(family, patch_side=SMALL_PATCH).to_dict()
        differ = {key for key in large["vision_config"] if large["vision_config"][key] != small["vision_config"][key]}
        assert "patch_size" in differ <= {"patch_size", "window_size"}
        assert large["text_config"] == small["text_config"]
    assert distinct_image_bytes(2) == 2 * 24 * 28 * 3 * 14 * 14


# --- Widths -----------------------------------------------------------------------------------------------------------


def test_distances_between_rows() -> None:
    matrix = torch.zeros(6, 10)
    assert row_distance(matrix) == row_distance(matrix.T) == row_distance(matrix[:, :3]) == 10
    assert row_distance(matrix[:1]) == row_distance(matrix[:, :1]) == 0
    assert row_distance(torch.zeros(2, 6, 10)) == 10


def test_an_odd_width_is_found() -> None:
    """Logits have as many columns as the vocabulary has tokens."""
    config = small_config("qwen3-vl")
    assert config.text_config.vocab_size == 300 and odd_widths(config, tensor=1) == [300]
    config.text_config.vocab_size = 304
    assert odd_widths(config, tensor=1) == [] and odd_widths(config, tensor=2) == []


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen3-vl-8b"])
def test_models_of_both_families_are_cut(name: str) -> None:
    assert with_layers(published_config(name), 3).text_config.num_hidden_layers == 3


# --- Export -----------------------------------------------------------------------------------------------------------


def test_written_bytes() -> None:
    x = torch.zeros(10, 4)
    with WrittenBytes() as written:
        x.view(40)[:8].clone()  # 32 bytes
        torch.empty(1000).unsqueeze(0)
        x[:, 1].copy_(x[:, 0])  # 40 bytes
        torch.cat([x, x])  # 320 bytes
        x[:, 2].fill_(1.0)  # 40 bytes
        x.view(20, 2).copy_(x.view(20, 2))
        x[:3].copy_(x[3:6])  # 48 bytes: the same memory, but not the same place
    assert (written.bytes, written.filled_bytes) == (480, 40)


def _copy_into_what_is_read_only(*, onto_itself: bool) -> None:
    faulthandler.disable()
    page = torch.frombuffer(mmap.mmap(-1, 4096, prot=mmap.PROT_READ), dtype=torch.float32)
    page.copy_(page.view(32, 32).view(1024) if onto_itself else torch.ones(1024))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("onto_itself", [True, False])
def test_a_copy_onto_itself_writes_nothing(onto_itself: bool) -> None:
    """The kernel ends a process that writes to a page which it may only read."""
    process = get_context("fork").Process(target=_copy_into_what_is_read_only, kwargs={"onto_itself": onto_itself})
    process.start()
    process.join()
    assert process.exitcode == (0 if onto_itself else -signal.SIGSEGV)


def test_parameters_of_an_engine() -> None:
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight",
             "model.layers.0.self_attn.v_proj.weight", "visual.blocks.1.attn.qkv.weight",
             "model.language_model.layers.0.mlp.down_proj.weight", "lm_head.weight"]  # fmt: skip
    assert [weight.parameter for weight in live_weights(names)] == [
        "language_model.model.layers.0.self_attn.qkv_proj.weight",
        "visual.blocks.1.attn.qkv.weight",
        "language_model.model.layers.0.mlp.down_proj.weight",
        "language_model.lm_head.weight",
    ]


def test_round_trips_carry_the_whole_model() -> None:
    case = _round_trips("qwen3-vl-2b")
    assert case.limit == pytest.approx(PUBLISHED["qwen3-vl-2b"].parameters * 2 / 2**31 + 1)
    assert case.value >= 1 and set(WRITTEN) == {1, 2}


# --- Packing ----------------------------------------------------------------------------------------------------------


def test_lengths_are_realistic() -> None:
    rows = draw_responses(random.Random(1), range(100, 400))
    assert len(rows) == 8 * 300 and {row.group_id for row in rows} == set(range(100, 400))
    mean = sum(len(row.token_ids) for row in rows) / len(rows)
    assert 430 < mean < 480
    for row in rows:
        _, down, across = row.prompt.grids_thw[0]
        assert 60 <= down * across // 4 == row.prompt.token_ids.count(290) <= 1300


def test_a_group_has_a_response_of_each_length() -> None:
    rows = make_responses(2)
    assert [len(row.token_ids) for row in rows] == [*LENGTHS, *LENGTHS]
    assert [row.group_id for row in rows] == [0] * 8 + [1] * 8


# --- The whole --------------------------------------------------------------------------------------------------------


def test_every_part_has_its_function() -> None:
    folder = Path(waste.__file__).parent
    for part, module in waste.PARTS.items():
        assert f"def {part}() -> list[Bar]:" in (folder / f"{module.removeprefix('bench.')}.py").read_text()


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.distributed
def test_every_bar_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    waste.main([])
    report = json.loads(capsys.readouterr().out)
    assert [bar["bar"] for bar in report["bars"]] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 13, 16, 17]
    assert all(bar["cases"] for bar in report["bars"]) and report["git"]["commit"]
