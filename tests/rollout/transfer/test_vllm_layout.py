"""vLLM's names and shards of a checkpoint, written out by hand. That vLLM agrees is shown in tests/proofs."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from megatron_vppo.rollout.records import LiveWeight
from megatron_vppo.rollout.transfer.vllm_layout import (
    ExpectedDigests,
    StreamCheck,
    canonical_name,
    checkpoint_names,
    parameters_of,
    worker_shard,
)

LAYER = "language_model.model.layers.3."


def rows(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, 2)


def live(parameter: str, *, kv_replicas: int = 1, scales: tuple[str, ...] = ()) -> LiveWeight:
    return LiveWeight(parameter, parameter=parameter, repacked=False, kv_replicas=kv_replicas, scales=scales)


@pytest.mark.parametrize(
    ("parameter", "names"),
    [
        (f"{LAYER}self_attn.qkv_proj.bias", [f"model.layers.3.self_attn.{p}_proj.bias" for p in "qkv"]),
        (f"{LAYER}mlp.gate_up_proj.weight", [f"model.layers.3.mlp.{p}_proj.weight" for p in ("gate", "up")]),
        (f"{LAYER}mlp.down_proj.weight", ["model.layers.3.mlp.down_proj.weight"]),
        ("language_model.lm_head.weight", ["lm_head.weight"]),
        ("visual.blocks.0.attn.qkv.weight", ["visual.blocks.0.attn.qkv.weight"]),
    ],
)
def test_names_that_a_parameter_is_stacked_from(parameter: str, names: list[str]) -> None:
    assert list(checkpoint_names(parameter)) == names


def test_names_of_newer_files_are_those_of_released_ones() -> None:
    assert canonical_name("model.language_model.norm.weight") == "model.norm.weight"
    assert canonical_name("model.visual.merger.norm.weight") == "visual.merger.norm.weight"
    assert canonical_name("model.norm.weight") == "model.norm.weight"
    with pytest.raises(ValueError, match=r"'audio.conv' belongs to no known part"):
        checkpoint_names("audio.conv")


@pytest.mark.parametrize(
    ("parameter", "part", "kv_replicas", "held"),
    [
        (f"{LAYER}self_attn.qkv_proj.weight", 0, 1, [[0, 1], [2, 3]]),
        (f"{LAYER}self_attn.qkv_proj.weight", 1, 2, [[0, 1, 2, 3], [0, 1, 2, 3]]),  # one key head, on both workers
        (f"{LAYER}mlp.gate_up_proj.weight", 1, 1, [[0, 1], [2, 3]]),
        (f"{LAYER}input_layernorm.weight", 0, 1, [[0, 1, 2, 3], [0, 1, 2, 3]]),
    ],
)
def test_rows_of_two_workers(parameter: str, part: int, kv_replicas: int, held: list[list[int]]) -> None:
    for rank in range(2):
        shard = worker_shard(
            rows(0, 1, 2, 3), parameter=parameter, part=part, rank=rank, world_size=2, kv_replicas=kv_replicas
        )
        assert shard[:, 0].tolist() == held[rank]


def test_the_towers_fused_projection_is_cut_within_queries_keys_and_values() -> None:
    qkv = rows(0, 1, 10, 11, 20, 21)
    shards = [
        worker_shard(qkv, parameter="visual.blocks.0.attn.qkv.weight", part=0, rank=rank, world_size=2)
        for rank in range(2)
    ]
    assert [shard[:, 0].tolist() for shard in shards] == [[0, 10, 20], [1, 11, 21]]


def test_columns_and_the_padded_vocabulary() -> None:
    weight = torch.arange(8.0).reshape(2, 4)
    down = worker_shard(weight, parameter=f"{LAYER}mlp.down_proj.weight", part=0, rank=1, world_size=2)
    assert down.tolist() == [[2, 3], [6, 7]]
    last = worker_shard(rows(*range(65)), parameter="language_model.lm_head.weight", part=0, rank=1, world_size=2)
    assert last[:, 0].tolist() == [64] + [0] * 63, "65 rows are padded to 128"


def test_a_stream_has_every_name_once() -> None:
    check = StreamCheck([[live(f"{LAYER}mlp.gate_up_proj.weight"), live("language_model.lm_head.weight")]])
    gate, up = (f"model.language_model.layers.3.mlp.{p}_proj.weight" for p in ("gate", "up"))
    assert check.take(up) == (f"{LAYER}mlp.gate_up_proj.weight", 1)
    with pytest.raises(ValueError, match="came twice"):
        check.take(up)
    with pytest.raises(ValueError, match=r"'model.norm.weight' is unknown"):
        check.take("model.norm.weight")
    assert check.take(gate) == (f"{LAYER}mlp.gate_up_proj.weight", 0)
    with pytest.raises(ValueError, match=r"1 of 3 weights did not come in the stream: lm_head.weight"):
        check.finish()


def test_parameters_of_tensors_to_keep_and_their_scales() -> None:
    workers = [[live(f"{LAYER}mlp.gate_up_proj.weight", scales=(f"{LAYER}mlp.gate_up_proj.weight_scale",))]]
    both = [f"model.layers.3.mlp.{p}_proj.weight" for p in ("gate", "up")]
    names = (f"{LAYER}mlp.gate_up_proj.weight", f"{LAYER}mlp.gate_up_proj.weight_scale")
    assert parameters_of(both, workers) == names
    with pytest.raises(ValueError, match=r"vLLM holds .* as one parameter, .* only .*gate_proj.weight would be kept"):
        parameters_of(both[:1], workers)


def test_digests_do_not_depend_on_the_order_of_parts() -> None:
    parameter = f"{LAYER}mlp.gate_up_proj.weight"
    gate, up = rows(0, 1), rows(2, 3)
    expected = hashlib.sha256(torch.cat([gate, up]).numpy().tobytes()).hexdigest()
    for order in ((0, 1), (1, 0)):
        digests = ExpectedDigests([[live(parameter)]], dtype=torch.float32)
        for part in order:
            digests.add((gate, up)[part], parameter=parameter, part=part)
        assert digests.compare([{parameter: expected}]) == 1
        with pytest.raises(RuntimeError, match=r"1 weights of the rollout engine differ .* \(from .*gate_proj.weight"):
            digests.compare([{parameter: "0" * 64}])
