"""The weight map against a checkpoint that transformers saved: every tensor once, bit-equal there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_vppo.models.families import family_of, weight_map
from megatron_vppo.weights.entries import Entry, stage_entries, stream_entries
from megatron_vppo.weights.kinds import Gated, Split, Vocabulary, merge
from megatron_vppo.weights.qkv import FusedQKV, GroupedQKV
from tests.models.tiny import save_tiny_model, tiny_config, tiny_qwen3_config

LAYOUTS = [(3,), (2, 1), (1, 1, 1)]


QWEN25_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
CONFIGS = {
    f"{family} {'tied' if tied else 'untied'}": make(tied=tied, vocab=301, **HEADS, **options)
    for tied in (True, False)
    for family, make, options in (
        ("qwen25", tiny_config, {"rope_parameters": QWEN25_ROPE}),
        ("qwen3", tiny_qwen3_config, {"taps": (0, 1)}),
    )
}


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("saved")
    config = CONFIGS[request.param]
    model = save_tiny_model(folder, config)
    memory = {family_of(config).to_released_name(name) for name, _ in model.named_parameters()}
    assert memory == set(load_file(folder / "model.safetensors"))
    return config, folder


def table_of(config: Any) -> tuple[Entry, ...]:
    return weight_map(config, family=family_of(config))


def test_every_saved_tensor_is_used_exactly_once(saved: tuple[Any, Path]) -> None:
    config, folder = saved
    tensors = load_file(folder / "model.safetensors")
    names = [name for entry in stream_entries(table_of(config)) for name in entry.hf_names]
    assert sorted(names) == sorted(tensors)
    for entry in table_of(config):
        shapes = tuple(tuple(tensors[name].shape) for name in entry.hf_names)
        assert shapes == entry.kind.hf_shapes(), entry.hf_names


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_merge_to_the_same_bits(saved: tuple[Any, Path], size: int) -> None:
    config, folder = saved
    tensors = load_file(folder / "model.safetensors")
    for entry in table_of(config):
        originals = [tensors[name] for name in entry.hf_names]
        shards = [entry.kind.shard(originals, rank=rank, size=size) for rank in range(size)]
        assert all(tuple(shard.shape) == entry.kind.local_shape(size) for shard in shards), entry.template
        merged = merge(entry.kind, torch.stack(shards))
        assert all(torch.equal(a, b) for a, b in zip(merged, originals, strict=True)), entry.template


@pytest.mark.parametrize("stage_layers", LAYOUTS, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_parameter_lies_on_one_stage(config: Any, stage_layers: tuple[int, ...]) -> None:
    table = table_of(config)
    stages = [stage_entries(table, stage_layers=stage_layers, stage=s) for s in range(len(stage_layers))]
    for entries in stages:
        local = [entry.local_name(stage_layers) for entry in entries]
        assert len(set(local)) == len(local)
    held = [entry for entries in stages for entry in entries]
    copies = int(config.tie_word_embeddings and len(stage_layers) > 1)
    assert len(held) == len(stream_entries(table)) + copies
    if stage_layers == (2, 1):
        (third,) = [e for e in stages[1] if e.hf_names[0].endswith("layers.2.mlp.down_proj.weight")]
        assert third.local_name(stage_layers) == "language.decoder.layers.0.mlp.linear_fc2.weight"


def rows(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_kinds_by_hand() -> None:
    """The rows that each of two ranks holds, written out."""
    grouped = GroupedQKV(heads=4, kv_heads=2, head_dim=1, tail=())
    q, k, v = rows(0, 1, 2, 3), rows(10, 11), rows(20, 21)
    assert grouped.shard([q, k, v], rank=0, size=2).tolist() == [0, 1, 10, 20]
    assert grouped.shard([q, k, v], rank=1, size=2).tolist() == [2, 3, 11, 21]
    fused = FusedQKV(heads=2, head_dim=2, tail=())
    assert fused.shard([torch.arange(12)], rank=1, size=2).tolist() == [2, 3, 6, 7, 10, 11]
    gated = Gated(4, ())
    assert gated.shard([rows(0, 1, 2, 3), rows(10, 11, 12, 13)], rank=1, size=2).tolist() == [2, 3, 12, 13]
    assert Split((2, 4), 1).shard([torch.arange(8).view(2, 4)], rank=1, size=2).tolist() == [[2, 3], [6, 7]]
    words = Vocabulary(5, 1)
    assert words.shard([rows(1, 2, 3, 4, 5)[:, None]], rank=2, size=4).flatten().tolist() == [5, 0]
    assert words.shard([rows(1, 2, 3, 4, 5)[:, None]], rank=3, size=4).flatten().tolist() == [0, 0]


def test_indivisible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 key-value heads cannot be split over 4"):
        GroupedQKV(heads=4, kv_heads=2, head_dim=1, tail=()).shard([rows(0)] * 3, rank=0, size=4)
