"""Shapes and splits of the parts of vision towers, for sizes that tell every number from the others."""

from __future__ import annotations

from types import SimpleNamespace

from megatron_vppo.models.vision.weight_map import attention_entries, merger_entries
from megatron_vppo.weights.kinds import Split, whole
from megatron_vppo.weights.qkv import FusedQKV

VISION = SimpleNamespace(hidden_size=12, num_heads=4, spatial_merge_size=3, out_hidden_size=7)


def test_a_merger_by_hand() -> None:
    """Nine patches of 12 values become one of 108. The first layer is split by rows, the second by columns."""
    entries = merger_entries(VISION, ours="ours.", fc1="one", fc2="two")
    assert [(entry.template, entry.hf_names, entry.kind) for entry in entries] == [
        ("ours.linear_fc1.weight", ("one.weight",), Split((108, 108), 0)),
        ("ours.linear_fc1.bias", ("one.bias",), Split((108,), 0)),
        ("ours.linear_fc2.weight", ("two.weight",), Split((7, 108), 1)),
        ("ours.linear_fc2.bias", ("two.bias",), whole(7)),
    ]
    assert {entry.part for entry in entries} == {"projector"}


def test_attention_by_hand() -> None:
    entries = attention_entries(VISION, ours="", hf="")
    assert [entry.kind for entry in entries] == [
        FusedQKV(heads=4, head_dim=3, tail=(12,)),
        FusedQKV(heads=4, head_dim=3, tail=()),
        Split((12, 12), 1),
        whole(12),
    ]
