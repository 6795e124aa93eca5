"""Vision tower of Qwen3-VL: full attention per frame, learned positions resampled to each image, deepstack features.

Shape suffix legend: M = merged blocks of patches; P = patches of all images; D = values of one patch; Y, X = rows,
columns of an image's patch grid; h = hidden size.

Deepstack features come out of inner ("tapped") layers. The tower is cut after every tapped layer into segments, each a
transformer block of its own. So the output of a tapped layer is an ordinary tensor, also where layers run again in the
backward pass (recompute).
"""

from __future__ import annotations

import copy
import functools
import itertools
import math

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.layers.parts import LayerParts, layer_spec
from megatron_vppo.models.layers.sequences import PackedSequences
from megatron_vppo.models.vision.tower import (
    Grid,
    Merger,
    TowerPlan,
    VisionFeatures,
    VisionTower,
    block_positions,
    by_block,
    patch_positions,
    vision_layers,
)


def segment_lengths(hf_config: Qwen3VLVisionConfig) -> tuple[int, ...]:
    """Counts the layers of each segment: up to and including each tapped layer, then the rest, if there is any."""
    ends = [tap + 1 for tap in hf_config.deepstack_visual_indexes]
    if not ends or ends[-1] < hf_config.depth:
        ends.append(hf_config.depth)
    return tuple(end - start for start, end in itertools.pairwise([0, *ends]))


@functools.lru_cache(maxsize=256)
def stretch_weights(count: int, *, side: int, device: torch.device) -> Tensor:
    """Returns fp32 [count, side]: the weights that interpolate `count` points from `side` points on the same line.

    They are made on the device, which costs less than sending them.

    Linear interpolation between neighbours, end on end. For side 3 and count 5:

        1.0  0.0  0.0
        0.5  0.5  0.0
        0.0  1.0  0.0
        0.0  0.5  0.5
        0.0  0.0  1.0

    A single point lies at the start.
    """
    place = torch.arange(count, dtype=torch.float32, device=device) * ((side - 1) / max(1, count - 1))
    distance = (place[:, None] - torch.arange(side, dtype=torch.float32, device=device)).abs()
    return (1.0 - distance).clamp(min=0.0)


class Qwen3VisionTower(VisionTower):
    """Segments of layers, with a merger after each tapped layer and one at the end."""

    def __init__(
        self,
        config: TransformerConfig,
        hf_config: Qwen3VLVisionConfig,
        *,
        parts: LayerParts,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, hf_config, parts=parts, patch_bias=True)
        self.position_grid = nn.Parameter(
            torch.zeros(hf_config.num_position_embeddings, config.hidden_size, dtype=config.params_dtype)
        )
        self.num_taps = len(hf_config.deepstack_visual_indexes)
        self.num_segments = len(segment_lengths(hf_config))
        # Not in a ModuleList: Megatron's checkpoints would take all parameters in it for unsplit, on every rank.
        for number, layers in enumerate(segment_lengths(hf_config)):
            own_config = copy.copy(config)
            own_config.num_layers = layers  # the size of the stack of layers in checkpoints
            specs = [layer_spec(parts, causal=False)] * layers
            self.add_module(f"segment_{number}", vision_layers(own_config, specs, groups=groups))
        shared = {"merge": self.merge, "out_width": hf_config.out_hidden_size, "groups": groups}
        for number in range(self.num_taps):
            self.add_module(f"deepstack_merger_{number}", Merger(config, norm_over_block=True, **shared))
        self.merger = Merger(config, norm_over_block=False, **shared)

    def plan(self, grids_thw: tuple[Grid, ...]) -> TowerPlan:
        frames = Packing(tuple(rows * columns for count, rows, columns in grids_thw for _ in range(count)))
        return TowerPlan(
            grids_thw,
            blocks_M2=torch.cat([block_positions(grid, merge=self.merge) for grid in grids_thw]),
            frames=self.parts.plan(frames, causal=False),
        )

    def forward(self, pixels_PD: Tensor, plan: TowerPlan) -> VisionFeatures:
        shared = {
            "attention_mask": None,
            "rotary_pos_emb": self.rope(patch_positions(plan.blocks_M2, merge=self.merge)),
            "packed_seq_params": PackedSequences(plan=plan.frames),
        }
        embedded_Ph = self.patch_embed(pixels_PD.to(self.config.params_dtype)) + self._positions(plan.grids_thw)
        hidden_P1h = embedded_Ph[:, None, :]
        tapped = []
        for number in range(self.num_segments):
            hidden_P1h = self.get_submodule(f"segment_{number}")(hidden_states=hidden_P1h, **shared)
            if number < self.num_taps:
                tapped.append(self.get_submodule(f"deepstack_merger_{number}")(hidden_P1h))
        return VisionFeatures(self.merger(hidden_P1h), tuple(tapped))

    def _positions(self, grids_thw: tuple[Grid, ...]) -> Tensor:
        """Takes the learned grid of positions, stretched over each image corner to corner; [P, h].

        The interpolation is two products of matrices. torch's own adds gradients up in any order on CUDA, and the
        copies of the grid on tensor-parallel ranks would drift apart.
        """
        side = math.isqrt(self.position_grid.shape[0])
        learned = self.position_grid.to(torch.float32).view(side, side, -1)  # [side, side, h]
        stretched = {}
        for rows, columns in {(rows, columns) for _, rows, columns in grids_thw}:
            down, across = (stretch_weights(n, side=side, device=learned.device) for n in (rows, columns))
            positions_YXh = torch.einsum("rg,ghx,ch->rcx", down, learned, across)
            stretched[rows, columns] = by_block(positions_YXh, merge=self.merge)
        positions_Ph = torch.cat([stretched[rows, columns].repeat(count, 1) for count, rows, columns in grids_thw])
        return positions_Ph.to(self.config.params_dtype)
