"""The released models without their weights, on the meta device: names, shapes, shards, marks and counts.

transformers' own classes, built from the same configurations, say which tensors a checkpoint has; the counts are the
published ones. Ranks are those of torch's fake process groups: sizes and ranks are real, nothing is sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForImageTextToText

from megatron_vppo.models.build import build_model
from megatron_vppo.models.families import family_of, weight_map
from megatron_vppo.models.hf_config import HfConfig, head_dim
from megatron_vppo.models.language.weight_map import HEAD
from megatron_vppo.models.megatron_config import check_tensor_parallel
from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.models.vision.image_parallel import VisionGroups
from megatron_vppo.parallel.cpu_support import enable_cpu
from megatron_vppo.planning.published import CONFIGS, PUBLISHED, published_config
from megatron_vppo.weights.entries import stage_entries, stream_entries
from megatron_vppo.weights.kinds import Shape

# (tensor, pipeline); the layers of all eight divide evenly.
LAYOUTS = {
    "qwen2.5-vl-3b": ((1, 1), (2, 2)),
    "qwen2.5-vl-7b": ((4, 1), (4, 2), (2, 4)),
    "qwen2.5-vl-32b": ((8, 1), (8, 2), (8, 4)),
    "qwen2.5-vl-72b": ((8, 4), (8, 8)),
    "qwen3-vl-2b": ((2, 1), (1, 2)),
    "qwen3-vl-4b": ((4, 1), (2, 2)),
    "qwen3-vl-8b": ((8, 1), (4, 2)),
    "qwen3-vl-32b": ((8, 1), (8, 2), (8, 4)),
}
CASES = [(name, *layout) for name, layouts in LAYOUTS.items() for layout in layouts]


@contextmanager
def rank_of(*, tensor: int, pipeline: int, rank: int) -> Iterator[tuple[ProcessGroupCollection, VisionGroups]]:
    enable_cpu()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tensor * pipeline)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            create_gloo_process_groups=False,
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        yield groups, VisionGroups(tower=groups, images=groups.cp, gradients=groups.cp)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build(name: str, *, tensor: int, pipeline: int, stage: int, tensor_rank: int) -> QwenVLModel:
    with rank_of(tensor=tensor, pipeline=pipeline, rank=stage * tensor + tensor_rank) as (groups, vision_groups):
        assert (groups.pp.rank(), groups.tp.rank()) == (stage, tensor_rank)
        return build_model(
            published_config(name),
            groups=groups,
            vision_groups=vision_groups,
            dtype=torch.bfloat16,
            device=torch.device("meta"),
        )


def test_every_configuration_has_a_size_and_a_layout() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(PUBLISHED) == set(LAYOUTS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_the_checkpoint_maps(name: str) -> None:
    config = published_config(name)
    family = family_of(config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    theirs = {family.to_released_name(key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del theirs[HEAD]  # not stored

    ours: dict[str, Shape] = {}
    for entry in stream_entries(weight_map(config, family=family)):
        for hf_name, shape in zip(entry.hf_names, entry.kind.hf_shapes(), strict=True):
            assert hf_name not in ours
            ours[hf_name] = shape
    assert ours == theirs
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == PUBLISHED[name].parameters
    released = ("visual.", "model.", HEAD) if config.model_type == "qwen2_5_vl" else ("model.visual.", "model.", HEAD)
    assert {next(p for p in released if key.startswith(p)) for key in ours} >= set(released[:2])


@pytest.mark.parametrize(("name", "tensor", "pipeline"), CASES)
def test_stages_and_ranks_hold_the_published_model(name: str, tensor: int, pipeline: int) -> None:
    """The modules of all stages, split parameters times their ranks, hold the published number of values."""
    total = 0
    for stage in range(pipeline):
        counts = set()
        for tensor_rank in {0, tensor - 1}:
            model = build(name, tensor=tensor, pipeline=pipeline, stage=stage, tensor_rank=tensor_rank)
            assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in model.parameters())
            check_against_map(model, tensor=tensor, stage=stage)
            counts.add(stored_values(model, tensor=tensor))
        total += counts.pop()
        assert not counts, "the first and the last tensor-parallel rank hold parts of different sizes"
    assert total == PUBLISHED[name].parameters


def check_against_map(model: QwenVLModel, *, tensor: int, stage: int) -> None:
    entries = stage_entries(model.weight_map, stage_layers=model.stage_layers, stage=stage)
    expected = {e.local_name(model.stage_layers): e.kind for e in entries}
    parameters = dict(model.named_parameters())
    assert expected.keys() == parameters.keys()
    for name, parameter in parameters.items():
        kind = expected[name]
        assert tuple(parameter.shape) == kind.local_shape(tensor), name
        assert getattr(parameter, "tensor_model_parallel", False) == (kind.partition_dim is not None), name
        if kind.partition_dim is not None:
            assert (parameter.partition_dim, parameter.partition_stride) == (kind.partition_dim, kind.partition_stride)


def stored_values(model: QwenVLModel, *, tensor: int) -> int:
    """Counts the values of the tensors that a checkpoint stores, without a tied output layer on a stage of its own."""
    entries = stage_entries(model.weight_map, stage_layers=model.stage_layers, stage=model.stage)
    kinds = {entry.local_name(model.stage_layers): entry.kind for entry in entries}
    total = 0
    for name, p in model.named_parameters():
        kind, shape = kinds[name], list(p.shape)
        if kind.partition_dim is not None:
            shape[kind.partition_dim] -= kind.padding(tensor) * kind.partition_stride
        copies = tensor if getattr(p, "tensor_model_parallel", False) else 1
        total += 0 if getattr(p, "shared", False) else math.prod(shape) * copies
    return total


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_matrix_has_widths_that_tensor_cores_read(name: str) -> None:
    """An operand's rows are as long as a matrix is wide or high: in bfloat16 a multiple of 16 bytes."""
    config = published_config(name)
    fitting = [size for size in range(1, 65) if tensor_parallel_is_possible(config, size)]
    for size in fitting:
        model = build(name, tensor=size, pipeline=1, stage=0, tensor_rank=size - 1)
        matrices = {n: tuple(p.shape) for n, p in model.named_parameters() if p.dim() == 2 and "position_grid" not in n}
        assert len(matrices) > 100
        assert {n: shape for n, shape in matrices.items() if any(width % 8 for width in shape)} == {}
        heads = {config.vision_config.hidden_size // config.vision_config.num_heads, head_dim(config.text_config)}
        assert not any(width % 8 for width in heads), "attention multiplies heads"
    assert len(fitting) >= 2


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline", "message"),
    [
        ("qwen2.5-vl-3b", 4, 1, "2 key-value heads cannot be split over parallel.tensor_model_parallel_size = 4"),
        ("qwen2.5-vl-7b", 8, 1, "28 attention heads cannot be split"),
        ("qwen3-vl-8b", 1, 8, "36 layers do not divide over 8"),
        ("qwen3-vl-2b", 1, 14, "first pipeline stage has 2 language layers, but the first 3"),
    ],
)
def test_layouts_that_the_real_sizes_do_not_allow(name: str, tensor: int, pipeline: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, tensor=tensor, pipeline=pipeline, stage=0, tensor_rank=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_documented_sizes(name: str, repo_root: Path) -> None:
    lines = (repo_root / "docs/plan.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in lines if line.startswith(f"| {name} |"))
    config = published_config(name)
    text, vision = config.text_config, config.vision_config
    largest = max(size for size in range(1, 65) if tensor_parallel_is_possible(config, size))
    assert [cell.strip() for cell in row.split("|")[2:7]] == [
        f"{PUBLISHED[name].parameters:,}",
        f"{text.num_hidden_layers}, {text.hidden_size}, {text.intermediate_size}",
        f"{text.num_attention_heads}, {text.num_key_value_heads}",
        f"{vision.depth}, {vision.hidden_size}, {vision.intermediate_size}",
        str(largest),
    ]


def tensor_parallel_is_possible(config: HfConfig, tensor: int) -> bool:
    try:
        check_tensor_parallel(config, tensor=tensor, vision_split="tensor")
    except ValueError:
        return False
    return True


def test_a_name_that_is_not_published() -> None:
    with pytest.raises(ValueError, match=r"no released model 'qwen2.5-vl-8b'; known are qwen2.5-vl-3b, "):
        published_config("qwen2.5-vl-8b")
