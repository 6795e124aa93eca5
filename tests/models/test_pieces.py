"""Packed attention, window order, rotary positions and layout checks, each against an independent source."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from megatron_vppo.models.families import family_of
from megatron_vppo.models.language.mrope import mrope_positions
from megatron_vppo.models.layers.attention import packed_attention, plan_attention, plan_context_attention
from megatron_vppo.models.layers.context_parallel import padded_packing, tokens_of_rank
from megatron_vppo.models.layers.packed import PackedBatch
from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.megatron_config import check_tensor_parallel, stage_layers
from megatron_vppo.models.qwen3_vl.family import QWEN3_VL
from megatron_vppo.models.qwen3_vl.vision import segment_lengths, stretch_weights
from megatron_vppo.models.qwen25_vl.family import QWEN25_VL
from megatron_vppo.models.qwen25_vl.vision import window_order
from megatron_vppo.models.vision.image_parallel import assign_images
from megatron_vppo.models.vision.tower import patch_positions
from tests.models.tiny import GRIDS, IMAGE, MERGE, make_rows, tiny_config, tiny_qwen3_config

CPU = torch.device("cpu")
LENGTHS = [(1,), (7, 7, 7), (3, 40, 5, 5, 41, 1, 18, 38, 39), (16, 16, 8, 16, 4, 16), (5, 90)]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float) -> torch.Tensor:
    """One sequence, in the formula's words."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_attention_is_dense_attention(lengths: tuple[int, ...], kv_heads: int, causal: bool) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    inputs = [torch.randn(total, heads, 32, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    upstream = torch.randn(total, 128)

    packed = packed_attention(*inputs, plan_attention(Packing(lengths), causal=causal, device=CPU), scale=0.2)
    gradients = torch.autograd.grad((packed * upstream).sum(), inputs)
    parts = zip(*(x.split(lengths) for x in inputs), strict=True)
    expected = torch.cat([dense(*part, causal=causal, scale=0.2) for part in parts])
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), inputs)

    assert (packed - expected).abs().max() < 2e-6
    for mine, right in zip(gradients, expected_gradients, strict=True):
        assert (mine - right).abs().max() < 5e-6


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("lengths", [(12,), (24, 24), (12, 120, 36, 132, 12, 108)], ids=str)
def test_context_parallel_attention_is_dense_attention(lengths: tuple[int, ...], kv_heads: int, ranks: int) -> None:
    """All ranks' shares together; each gets the gathered keys, one rank after the other, as a collective gives them."""
    torch.manual_seed(0)
    inputs = [torch.randn(sum(lengths), heads, 32, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    upstream = torch.randn(sum(lengths), 128)

    shares = [tokens_of_rank(Packing(lengths), rank=rank, size=ranks) for rank in range(ranks)]
    query, key, value = inputs
    gathered_key, gathered_value = (torch.cat([x[share] for share in shares]) for x in (key, value))
    loss = torch.zeros(())
    outputs = torch.empty(sum(lengths), 128)
    for rank, share in enumerate(shares):
        plan = plan_context_attention(Packing(lengths), rank=rank, size=ranks, device=CPU)
        output = packed_attention(query[share], gathered_key, gathered_value, plan, scale=0.2)
        outputs[share] = output.detach()
        loss = loss + (output * upstream[share]).sum()
    gradients = torch.autograd.grad(loss, inputs)
    parts = zip(*(x.split(lengths) for x in inputs), strict=True)
    expected = torch.cat([dense(*part, causal=True, scale=0.2) for part in parts])
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), inputs)

    assert (outputs - expected).abs().max() < 2e-6
    for mine, right in zip(gradients, expected_gradients, strict=True):
        assert (mine - right).abs().max() < 5e-6


def test_context_parallel_shares_are_balanced() -> None:
    lengths = (16, 64, 8)
    shares = [tokens_of_rank(Packing(lengths), rank=rank, size=4) for rank in range(4)]
    assert torch.cat(shares).sort().values.tolist() == list(range(88))
    starts = torch.tensor([0] * 16 + [16] * 64 + [80] * 8)
    keys_met = {int((share - starts[share] + 1).sum()) for share in shares}
    assert len(keys_met) == 1
    with pytest.raises(ValueError, match="multiples of 8"):
        tokens_of_rank(Packing((16, 12)), rank=0, size=4)


@pytest.mark.parametrize("tensor, context", [(1, 1), (4, 1), (1, 2), (8, 2), (3, 4)])
@pytest.mark.parametrize("alignment", [16, 128])
def test_padding_for_fp8(tensor: int, context: int, alignment: int) -> None:
    lengths = [7, 16, 1, 30]
    packing = padded_packing(lengths, tensor=tensor, context=context, alignment=alignment)
    padded = packing.lengths
    assert packing.ends_in_filler == (len(padded) > len(lengths))
    assert sum(padded) % (tensor * context * alignment) == 0, "as much for every rank, and aligned"
    assert sum(padded) >= sum(lengths)
    if context > 1:
        alone = padded_packing(lengths, tensor=tensor, context=context).lengths
        assert padded[: len(lengths)] == alone, "the cut of a sequence does not depend on the others"
        assert all(length % (2 * context) == 0 for length in padded)
    again = padded_packing(padded, tensor=tensor, context=context, alignment=alignment)
    assert again == Packing(padded)


@pytest.mark.parametrize("tensor, context", [(1, 1), (4, 1), (1, 2), (8, 2), (3, 4)])
def test_padding_divides_over_ranks(tensor: int, context: int) -> None:
    lengths = [7, 16, 1, 30]
    padded = padded_packing(lengths, tensor=tensor, context=context).lengths
    if context > 1:
        views = padded_packing([*lengths, *lengths], tensor=tensor, context=context).lengths
        assert views == padded * 2, "both views of a row are cut at the same places"
    assert all(now >= before for now, before in zip(padded, lengths, strict=True))
    assert context == 1 or all(now % (2 * context) == 0 for now in padded)
    assert sum(padded) % (tensor * context) == 0
    assert sum(padded) - sum(lengths) < (len(lengths) * 2 * context * tensor if context > 1 else tensor)
    assert padded_packing(padded, tensor=tensor, context=context) == Packing(padded)


def test_images_are_assigned_by_size() -> None:
    grids = ((1, 4, 4), (1, 40, 40), (1, 8, 8), (1, 8, 10), (1, 6, 4))
    assert assign_images(grids, ranks=2) == ((1,), (0, 2, 3, 4))
    assert assign_images(grids[:2], ranks=3) == ((1,), (0,), ())


def test_buckets_bound_padding() -> None:
    generator = random.Random(3)
    lengths = tuple(generator.randint(1, 300) for _ in range(500))
    plan = plan_attention(Packing(lengths), causal=True, device=CPU)
    index = torch.arange(sum(lengths))
    padded = sum(len(index[bucket.query_index]) for bucket in plan.buckets)
    assert sum(lengths) <= padded <= sum(lengths) / 0.8
    assert len(plan.buckets) < 30


@pytest.mark.parametrize("grid", [(1, 8, 8), (1, 10, 6), (1, 2, 2), (1, 6, 14), (2, 4, 10), (1, 30, 26)], ids=str)
@pytest.mark.parametrize("window", [56, 112])
def test_window_order(grid: tuple[int, int, int], window: int) -> None:
    order = window_order(grid, merge=2, window_blocks=window // 2 // 14)
    grids = torch.tensor([grid])
    index, boundaries = get_vision_window_index(grids, spatial_merge_size=2, window_size=window, patch_size=14)
    assert torch.equal(order.block_order_M, index)
    assert list(order.window_lengths) == boundaries.diff().tolist()
    assert torch.equal(patch_positions(grid, merge=2), get_vision_position_ids(grids, 2))


def test_mrope_positions() -> None:
    model = Qwen2_5_VLForConditionalGeneration(tiny_config(tied=False, vocab=301))
    for row in make_rows():
        if not row.images:
            continue
        ids = torch.tensor([row.token_ids])
        grids = [GRIDS[name] for name in row.images]
        expected, _ = model.model.get_rope_index(ids, (ids == IMAGE).int(), torch.tensor(grids))
        found = mrope_positions(row.token_ids, grids, image_token_id=IMAGE, merge_size=MERGE)
        assert torch.equal(found, expected[:, 0])


def test_mrope_positions_by_hand() -> None:
    found = mrope_positions([5, IMAGE, IMAGE, 6], [(1, 2, 4)], image_token_id=IMAGE, merge_size=2)
    assert found.tolist() == [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]
    assert mrope_positions([4, 4], [], image_token_id=IMAGE, merge_size=2).tolist() == [[0, 1]] * 3
    with pytest.raises(ValueError, match=r"1 image tokens.*need 2"):
        mrope_positions([5, IMAGE, 6], [(1, 2, 4)], image_token_id=IMAGE, merge_size=2)
    with pytest.raises(ValueError, match="interrupted"):
        mrope_positions([IMAGE, 6, IMAGE], [(1, 2, 4)], image_token_id=IMAGE, merge_size=2)


def test_impossible_layouts_are_refused_with_numbers() -> None:
    config = tiny_config(tied=False, vocab=301)
    check_tensor_parallel(config, tensor=2, vision_split="tensor")
    with pytest.raises(
        ValueError, match=r"2 key-value heads .* tensor_model_parallel_size = 4; set it to one of \[1, 2\]"
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
    with pytest.raises(ValueError, match="3 layers are too few for 4 pipeline stages"):
        stage_layers(config, family=QWEN25_VL, pipeline=2, virtual_stages=2, pipeline_layers=None)
    config.text_config.num_hidden_layers = 8
    for given, expected in ((None, (2, 2, 2, 2)), ((1, 3, 2, 2), (1, 3, 2, 2))):
        split = stage_layers(config, family=QWEN25_VL, pipeline=2, virtual_stages=2, pipeline_layers=given)
        assert split == expected


def test_unsupported_architectures_are_refused() -> None:
    config = tiny_config(tied=False, vocab=301, use_sliding_window=True, max_window_layers=1)
    with pytest.raises(ValueError, match="sliding window"):
        family_of(config)
    config = tiny_config(tied=False, vocab=301, hidden_act="gelu")
    with pytest.raises(ValueError, match="'gelu'"):
        family_of(config)

    config = tiny_qwen3_config(tied=False, vocab=301, taps=(0, 2), attention_bias=True)
    with pytest.raises(ValueError, match="attention_bias"):
        family_of(config)
    for taps in ((2, 0), (1, 3)):
        with pytest.raises(ValueError, match=r"must rise and lie below the tower's 3 layers"):
            family_of(tiny_qwen3_config(tied=False, vocab=301, taps=taps))


@pytest.mark.parametrize("count, side", [(1, 6), (2, 6), (10, 6), (6, 6), (7, 48), (60, 48)])
def test_stretch_is_torchs_interpolation(count: int, side: int) -> None:
    points = torch.randn(1, 3, side, generator=torch.Generator().manual_seed(count))
    expected = torch.nn.functional.interpolate(points, size=count, mode="linear", align_corners=True)
    assert (points[0] @ stretch_weights(count, side=side).T - expected[0]).abs().max() < 1e-5


def test_deepstack_layers_have_to_lie_on_the_first_stage() -> None:
    config = tiny_qwen3_config(tied=False, vocab=301, taps=(0, 2))
    assert stage_layers(config, family=QWEN3_VL, pipeline=2, pipeline_layers=(2, 1)) == (2, 1)
    with pytest.raises(ValueError, match=r"first pipeline stage has 1 language layers, but the first 2 take features"):
        stage_layers(config, family=QWEN3_VL, pipeline=3, pipeline_layers=None)


def test_segments_of_the_qwen3_tower() -> None:
    for taps, lengths in {(): (3,), (0, 2): (1, 2), (1,): (2, 1), (0, 1): (1, 1, 1)}.items():
        assert segment_lengths(tiny_qwen3_config(tied=False, vocab=301, taps=taps).vision_config) == lengths


def test_inconsistent_batches_are_refused() -> None:
    ids, none = torch.arange(4), torch.zeros(0, dtype=torch.int64)
    positions = ids.expand(3, 4)
    with pytest.raises(ValueError, match="sum to the 4 tokens"):
        PackedBatch(ids, positions, Packing((3,)), none, none)
    with pytest.raises(ValueError, match=r"expected \(3, 4\)"):
        PackedBatch(ids, positions[:, :3], Packing((4,)), none, none)
    with pytest.raises(ValueError, match="1 image tokens but 0 features"):
        PackedBatch(ids, positions, Packing((4,)), torch.tensor([1]), none)
