"""The formulas of activations.py, against the bytes that autograd keeps of real models on CPU.

Counted are the storages that saved_tensors_hooks see, each once, parameters and buffers left out. CPU's flash attention
keeps what CUDA's does; its RMSNorm keeps more, which the formulas are told (`fused_rms_norm`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen3VLConfig

from megatron_vppo.config.choices import ModelPart, Recompute
from megatron_vppo.models.build import build_model
from megatron_vppo.models.language.mrope import mrope_positions
from megatron_vppo.models.layers.packed import PackedBatch
from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.options import ModelOptions
from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.models.vision.tower_run import TowerRun
from megatron_vppo.parallel.layout import Layout, init_layout
from megatron_vppo.planning.activations import (
    Kernels,
    LanguageSizes,
    LayerSizes,
    LayerSplit,
    MicroBatch,
    VisionSizes,
    head_bytes,
    language_saved,
    layer_saved,
    norm_saved,
    score_activations,
    update_activations,
    vision_saved,
)
from megatron_vppo.planning.sizes import language_sizes, vision_sizes
from tests.gloo import run_gloo
from tests.models.tiny import IMAGE, MEDIA_TOKENS, MERGE, PATCH_VALUES, tiny_config

ROWS, ROW_TOKENS, GRID = 2, 256, (1, 16, 24)
PATCHES = GRID[1] * GRID[2]
TEXT = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
VISION = {"depth": 4, "hidden_size": 160, "intermediate_size": 448, "num_heads": 4, "out_hidden_size": 256}
CONTEXT_TOLERANCE = {"none": 0.025, "selective": 0.05, "full": 0.1}
"""CPU keeps a mask for each length of chunks, and copies of queries in the place of projections."""
TOLERANCE = {"none": 0.005, "selective": 0.005, "full": 0.05}
"""Left out: norm statistics, index tensors. With 'full' hooks do not see the deepstack features, which exist too."""


def small_config(family: str) -> Any:
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
        vision = {**VISION, "fullatt_block_indexes": [3], "window_size": 112}
        return Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **MEDIA_TOKENS)
    rope = {"rope_type": "default", "mrope_section": [12, 6, 6], "mrope_interleaved": True, "rope_theta": 1e4}
    vision = {**VISION, "patch_size": 14, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2]}
    return Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 48, "rope_parameters": rope}, vision_config=vision, **MEDIA_TOKENS
    )


@dataclass(frozen=True)
class Case:
    family: str
    dtype: torch.dtype
    recompute: Recompute


CASES = [
    Case(family, dtype, recompute)
    for family in ("qwen2_5_vl", "qwen3_vl")
    for dtype in (torch.bfloat16, torch.float32)
    for recompute in ("none", "selective", "full")
]


def measure_ranks(
    rank: int, world_size: int, cases: list[Case], context: int, sequence_parallel: bool
) -> list[tuple[int, int]]:
    """(measured, by formula) of each case on one rank."""
    layout = init_layout(tensor=world_size // context, context=context, pipeline=1, timeout_seconds=60)
    return [
        (_measure(case, layout, sequence_parallel=sequence_parallel), _by_formula(case, layout, sequence_parallel))
        for case in cases
    ]


def _measure(case: Case, layout: Layout, *, sequence_parallel: bool) -> int:
    model = build_model(
        small_config(case.family),
        groups=layout.groups,
        vision_groups=layout.vision_groups,
        dtype=case.dtype,
        device=layout.device,
        options=ModelOptions(recompute=case.recompute, sequence_parallel=sequence_parallel),
    )
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    not_counted = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}  # holds the storages, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pixels_PD = torch.zeros(PATCHES if layout.context_rank == 0 else 0, PATCH_VALUES)
        output = model(model.plan(two_rows_of_one_image(ranks=layout.context)), pixels_PD)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def two_rows_of_one_image(*, ranks: int) -> PackedBatch:
    """One micro-batch; the first context-parallel rank runs the tower on its image."""
    image_tokens = PATCHES // MERGE**2
    row = [MEDIA_TOKENS["vision_start_token_id"], *[IMAGE] * image_tokens, *[5] * (ROW_TOKENS - image_tokens - 1)]
    positions = mrope_positions(row, [GRID], image_token_id=IMAGE, merge_size=MERGE)
    ids = torch.tensor(row * ROWS)
    return PackedBatch(
        token_ids_K=ids,
        positions_3K=torch.cat([positions] * ROWS, dim=1),
        packing=Packing((ROW_TOKENS,) * ROWS),
        image_token_index_I=(ids == IMAGE).nonzero()[:, 0],
        image_feature_index_I=torch.arange(image_tokens).repeat(ROWS),
        runs=(TowerRun((GRID,), ((0,), *((),) * (ranks - 1))),),
    )


def _by_formula(case: Case, layout: Layout, sequence_parallel: bool) -> int:
    config = small_config(case.family)
    kernels = Kernels(dtype_bytes=case.dtype.itemsize, fused_rms_norm=False)
    language, vision = language_sizes(config), vision_sizes(config)
    image_tokens = ROWS * PATCHES // MERGE**2
    patches = PATCHES if layout.context_rank == 0 else 0
    batch = MicroBatch(ROWS * ROW_TOKENS, response_tokens=0, image_tokens=image_tokens, patches=patches)
    return language_saved(
        language,
        batch,
        layers=language.layers,
        taps=vision.taps,
        is_first=True,
        is_last=True,
        split=LayerSplit(layout.tensor, layout.context, sequence_parallel),
        kernels=kernels,
        recompute=case.recompute,
    ) + vision_saved(vision, patches, tensor=layout.tensor, kernels=kernels, recompute=case.recompute)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("tensor", "context", "sequence_parallel"), [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False)]
)
def test_formulas_equal_what_autograd_keeps(tensor: int, context: int, sequence_parallel: bool) -> None:
    cases = CASES if tensor * context == 1 else [case for case in CASES if case.dtype == torch.bfloat16]
    for of_rank in run_gloo(measure_ranks, tensor * context, cases, context, sequence_parallel):
        for case, (measured, formula) in zip(cases, of_rank, strict=True):
            tolerance = (TOLERANCE if context == 1 else CONTEXT_TOLERANCE)[case.recompute]
            assert formula == pytest.approx(measured, rel=tolerance), case


def in_flight(rank: int, world_size: int, micro_batches: int) -> int:
    """The most micro-batches that this stage has run forward and not yet backward."""
    layout = init_layout(tensor=1, pipeline=world_size, timeout_seconds=60)
    config = tiny_config(tied=False, vocab=299)
    model = build_model(
        config,
        groups=layout.groups,
        vision_groups=layout.vision_groups,
        dtype=torch.float32,
        device=layout.device,
    )
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    running, most = 0, 0

    def finished(grad: Tensor) -> None:
        nonlocal running
        running -= 1

    def step(data: Iterator[int], stage: QwenVLModel) -> Any:
        nonlocal running, most
        next(data)
        ids = torch.arange(5)
        nothing = torch.zeros(0, dtype=torch.int64)
        output = stage(stage.plan(PackedBatch(ids, ids.expand(3, 5), Packing((5,)), nothing, nothing)))
        running += 1
        most = max(most, running)
        output.register_hook(finished)
        return output, lambda hidden: (hidden.sum(), {})

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(range(micro_batches)),
        model=[model],
        num_microbatches=micro_batches,
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    assert running == 0
    return most


@pytest.mark.distributed
def test_stage_s_of_p_holds_p_minus_s_micro_batches() -> None:
    assert run_gloo(in_flight, 3, 6) == [3, 2, 1]


# --- By hand: what no CPU run shows, and how the parts are put together -----------------------------------------------

LAYER = LayerSizes(hidden=64, ffn=128, heads=8, kv_heads=4, head_dim=16, gated=True, rms_norm=True, qk_norm=True)
CUDA = Kernels(dtype_bytes=2, fused_rms_norm=True)
WHOLE = LayerSplit(tensor=1, context=1, sequence_parallel=False)


def test_a_layer_on_cuda_by_hand() -> None:
    """In bfloat16 values of a token: two norms and two linear layers see the width; query, key and value together and
    rotated; cos and sin twice; the result; gate and up twice over and a half; the copy that the query norm reads.
    """
    values = 4 * 64 + (128 + 2 * 64) + (128 + 64) + 4 * 16 + 128 + 5 * 128 + 128
    assert layer_saved(LAYER, 10, split=WHOLE, kernels=CUDA, recompute="none") == 10 * (2 * values + 4 * 8)
    assert layer_saved(LAYER, 10, split=WHOLE, kernels=CUDA, recompute="selective") == 10 * 2 * values
    assert layer_saved(LAYER, 10, split=WHOLE, kernels=CUDA, recompute="full") == 10 * 2 * 64
    without = replace(LAYER, qk_norm=False, gated=False)
    one_kv_head = replace(LAYER, kv_heads=1)  # its query is no copy; one key and value instead of four
    fewer = values - 128 - 3 * 3 * 16
    assert layer_saved(one_kv_head, 10, split=WHOLE, kernels=CUDA, recompute="selective") == 10 * 2 * fewer
    fewer = values - 128 - 3 * 128
    assert layer_saved(without, 10, split=WHOLE, kernels=CUDA, recompute="selective") == 10 * 2 * fewer


def test_tensor_and_sequence_parallel_by_hand() -> None:
    """Tensor parallelism leaves width and angles whole; sequence parallelism splits the width too."""
    split_2 = (128 + 2 * 64) + (128 + 64) + 128 + 5 * 128 + 128
    tensor = layer_saved(LAYER, 10, split=LayerSplit(2, 1, False), kernels=CUDA, recompute="selective")
    assert tensor == 10 * 2 * (4 * 64 + 4 * 16 + split_2 // 2)
    sequence = layer_saved(LAYER, 10, split=LayerSplit(2, 1, True), kernels=CUDA, recompute="selective")
    assert sequence == 10 * 2 * (4 * 64 // 2 + 4 * 16 + split_2 // 2)
    assert layer_saved(LAYER, 10, split=LayerSplit(2, 1, True), kernels=CUDA, recompute="full") == 10 * 2 * 32


@pytest.mark.parametrize(("context", "chunks"), [(2, 5), (4, 9)])
def test_context_parallel_by_hand(context: int, chunks: int) -> None:
    """Ten tokens of a rank are two chunks of five: of c and of 2 * context + 1 - c chunks it keeps keys and values."""
    alone, shared = (
        layer_saved(LAYER, 10, split=LayerSplit(1, ranks, False), kernels=CUDA, recompute="selective")
        for ranks in (1, context)
    )
    assert shared - alone == chunks * 5 * 2 * (4 * 16) * 2


@pytest.mark.parametrize(("dtype_bytes", "of_keys"), [(2, 4 + 4), (4, 4)])
def test_norms_of_queries_and_keys_on_cpu_by_hand(dtype_bytes: int, of_keys: int) -> None:
    """Two fp32 tensors each; in fp32 the first of them is the output of the projection for keys, as a view."""
    kernels = Kernels(dtype_bytes, fused_rms_norm=False)
    normed, plain = (
        layer_saved(replace(LAYER, qk_norm=qk_norm), 10, split=WHOLE, kernels=kernels, recompute="selective")
        for qk_norm in (True, False)
    )
    assert normed - plain == 10 * (8 * 16 * (4 + 4) + 4 * 16 * of_keys)


def test_norms_by_hand() -> None:
    cpu_bf16, cpu_fp32 = Kernels(2, False), Kernels(4, False)
    assert norm_saved(100, rms_norm=True, kernels=CUDA) == norm_saved(100, rms_norm=False, kernels=cpu_bf16) == 200
    assert norm_saved(100, rms_norm=True, kernels=CUDA, held=True) == 0
    assert norm_saved(100, rms_norm=True, kernels=cpu_bf16, held=True) == 800, "an fp32 copy is another tensor"
    assert norm_saved(100, rms_norm=True, kernels=cpu_fp32, held=True) == 400


LANGUAGE = LanguageSizes(layer=LAYER, layers=4, vocabulary=1001)
IMAGE_LAYER = replace(LAYER, hidden=32, heads=2, kv_heads=2, qk_norm=False, gated=False, rms_norm=False)
TOWER = VisionSizes(layer=IMAGE_LAYER, layers=3, patch_values=24, taps=1)
BATCH = MicroBatch(tokens=40, response_tokens=12, image_tokens=8, patches=32)


def test_head_by_hand() -> None:
    rows = 501  # of 1001 on two ranks
    whole = head_bytes(LANGUAGE, BATCH, chunk=100, tensor=2, dtype_bytes=2)
    assert whole == 5 * 4 * 12 * rows + rows * 64 * (4 + 2) + 2 * 12 * 64 * 2
    chunked = head_bytes(LANGUAGE, BATCH, chunk=5, tensor=2, dtype_bytes=2)
    assert whole - chunked == 5 * 4 * 7 * rows


def test_stages_of_a_pipeline_by_hand() -> None:
    layer = layer_saved(LAYER, 20, split=LayerSplit(1, 2, False), kernels=CUDA, recompute="none")
    out = 20 * 64 * 2
    tower = vision_saved(TOWER, 32, tensor=1, kernels=CUDA, recompute="none")
    image_layer = layer_saved(IMAGE_LAYER, 32, split=WHOLE, kernels=CUDA, recompute="none")
    features = 2 * 4 * 64 * 2  # embeddings and one deepstack feature of this context rank's half
    stages = [
        update_activations(
            LANGUAGE,
            TOWER,
            BATCH,
            stage=stage,
            stage_layers=(1, 2, 1),
            split=LayerSplit(1, 2, False),
            kernels=CUDA,
            recompute="none",
            chunk=5,
        )
        for stage in range(3)
    ]
    assert stages[0].layers == 3 * (layer + features + out + tower) + max(layer, image_layer)
    assert stages[1].layers == 2 * (2 * layer + out) + layer
    assert stages[2].layers == (layer + 20 * 64 * 2 + out) + layer  # with the final norm's input
    assert [s.head for s in stages] == [0, 0, head_bytes(LANGUAGE, BATCH, chunk=5, tensor=1, dtype_bytes=2)]


def test_tower_by_hand() -> None:
    width = 32 * 32 * 2  # bytes
    layer = layer_saved(IMAGE_LAYER, 32, split=WHOLE, kernels=CUDA, recompute="none")
    # The main merger's norm keeps its input; the tapped one's is kept by the next layer. Each: norm, gelu in, gelu out.
    expected = 32 * 24 * 2 + 3 * layer + width + 2 * 3 * width
    assert vision_saved(TOWER, 32, tensor=1, kernels=CUDA, recompute="none") == expected
    tower: frozenset[ModelPart] = frozenset({"vision_tower"})
    mergers = vision_saved(TOWER, 32, tensor=1, kernels=CUDA, recompute="none", frozen=tower)
    assert mergers == width + 2 * 3 * width
    assert (
        vision_saved(
            TOWER, 32, tensor=1, kernels=CUDA, recompute="none", frozen=frozenset({"vision_tower", "projector"})
        )
        == 0
    )


def test_scoring_keeps_one_layer() -> None:
    shared = {"split": WHOLE, "kernels": CUDA, "chunk": 5, "stages": 2}
    layer = layer_saved(LAYER, 40, split=WHOLE, kernels=CUDA, recompute="none")
    first, last = (score_activations(LANGUAGE, TOWER, BATCH, stage=stage, **shared) for stage in range(2))
    assert first.layers == last.layers == layer + 2 * 40 * 64 * 2
    assert (first.head, last.head) == (0, 3 * 4 * 5 * 1001)
    many = replace(BATCH, patches=1000)
    image_layer = layer_saved(IMAGE_LAYER, 1000, split=WHOLE, kernels=CUDA, recompute="none")
    shown = score_activations(LANGUAGE, TOWER, many, stage=0, **shared)
    assert shown.layers == image_layer + 2 * 40 * 64 * 2


def test_scoring_on_a_part_of_the_ranks() -> None:
    """Two context-parallel ranks share 40 tokens, two tensor-parallel ones 1001 rows; the tower is no sequence."""
    split = LayerSplit(tensor=2, context=2, sequence_parallel=True)
    shared = {"split": split, "kernels": CUDA, "chunk": 5, "stages": 1}
    layer = layer_saved(LAYER, 20, split=split, kernels=CUDA, recompute="none")
    few = score_activations(LANGUAGE, TOWER, BATCH, stage=0, **shared)
    assert (few.layers, few.head) == (layer + 2 * 20 * 64 * 2, 3 * 4 * 5 * 501)
    tower_split = LayerSplit(tensor=2, context=1, sequence_parallel=False)
    image_layer = layer_saved(IMAGE_LAYER, 1000, split=tower_split, kernels=CUDA, recompute="none")
    many = score_activations(LANGUAGE, TOWER, replace(BATCH, patches=1000), stage=0, **shared)
    assert many.layers == image_layer + 2 * 20 * 64 * 2
