"""The norms of the mergers, and how the layers of the tower are split."""

from __future__ import annotations

from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from megatron_vppo.models.qwen3_vl.weight_map import vision_entries
from megatron_vppo.weights.kinds import Split, whole

VISION = Qwen3VLVisionConfig(
    depth=2,
    hidden_size=12,
    intermediate_size=20,
    num_heads=2,
    spatial_merge_size=3,
    out_hidden_size=7,
    num_position_embeddings=16,
    deepstack_visual_indexes=[0],
)


def test_kinds_by_hand() -> None:
    """A merger of deepstack features norms nine merged patches of 12 values, the last merger each patch."""
    kinds = {entry.template: entry.kind for entry in vision_entries(VISION)}
    for parameter in ("weight", "bias"):
        assert kinds[f"vision.deepstack_merger_0.norm.{parameter}"] == whole(9 * 12)
        assert kinds[f"vision.merger.norm.{parameter}"] == whole(12)
    assert kinds["vision.position_grid"] == whole(16, 12)
    layer = "vision.segment_0.layers.0.mlp."
    assert kinds[f"{layer}linear_fc1.weight"] == Split((20, 12), 0, padded=True)
    assert kinds[f"{layer}linear_fc1.bias"] == Split((20,), 0, padded=True)
    assert kinds[f"{layer}linear_fc2.weight"] == Split((12, 20), 1, padded=True)
    assert kinds[f"{layer}linear_fc2.bias"] == whole(12)
