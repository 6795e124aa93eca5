"""Vision tower: full attention per frame, learned positions resampled to each picture, features tapped on the way.

Shape suffix legend: P = patches of all pictures; D = values per patch; M = merged blocks (merge x merge patches each);
h = width; G = side of the learned grid of positions.

The tower is cut behind every layer that is tapped, into segments that are transformer blocks of their own: what a
segment gives is an ordinary tensor, whether its layers run again in the backward pass (recompute) or not.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor, nn
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.layers.parts import LayerParts, layer_spec
from megatron_vppo.models.layers.sequences import PackedSequences
from megatron_vppo.models.vision.tower import AxialRope, Grid, Merger, VisionFeatures, by_block, patch_positions


def segment_lengths(hf_config: Qwen3VLVisionConfig) -> tuple[int, ...]:
    """Layers up to and with each tapped one, then those behind the last, if there are any."""
    ends = [tap + 1 for tap in hf_config.deepstack_visual_indexes]
    if not ends or ends[-1] < hf_config.depth:
        ends.append(hf_config.depth)
    return tuple(end - start for start, end in itertools.pairwise([0, *ends]))


@functools.lru_cache(maxsize=256)
def stretch_weights(count: int, *, side: int) -> Tensor:
    """fp32 [count, side]: how much of each of `side` points makes each of `count` points that span the same line.

    Linear interpolation between neighbours, end on end; one point lies at the start.
    """
    place = torch.arange(count, dtype=torch.float32) * ((side - 1) / max(1, count - 1))
    distance = (place[:, None] - torch.arange(side, dtype=torch.float32)).abs()
    return (1.0 - distance).clamp(min=0.0)


class VisionTower(MegatronModule):
    """All of its layers, split over the tensor-parallel ranks of `groups`; it lives on the first pipeline stage."""

    def __init__(
        self,
        config: TransformerConfig,
        hf_config: Qwen3VLVisionConfig,
        *,
        parts: LayerParts,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.parts = parts
        self.merge = hf_config.spatial_merge_size
        self.dtype = config.params_dtype
        patch_values = hf_config.in_channels * hf_config.temporal_patch_size * hf_config.patch_size**2
        # A convolution whose stride is its kernel is a linear layer on flattened patches.
        self.patch_embed = nn.Linear(patch_values, config.hidden_size, bias=True, dtype=config.params_dtype)
        self.position_grid = nn.Parameter(
            torch.zeros(hf_config.num_position_embeddings, config.hidden_size, dtype=config.params_dtype)
        )
        shared = {"merge": self.merge, "out_width": hf_config.out_hidden_size, "groups": groups}
        self.num_taps = len(hf_config.deepstack_visual_indexes)
        self.num_segments = len(segment_lengths(hf_config))
        # Not in a ModuleList: Megatron's checkpoints take all parameters of one for whole, on every rank.
        for number, layers in enumerate(segment_lengths(hf_config)):
            own_config = copy.copy(config)
            own_config.num_layers = layers  # the size of the stack of layers in checkpoints
            segment = TransformerBlock(
                own_config,
                TransformerBlockSubmodules(layer_specs=[layer_spec(parts, causal=False)] * layers),
                post_layer_norm=False,
                pre_process=True,
                post_process=False,
                pg_collection=groups,
            )
            self.add_module(f"segment_{number}", segment)
        for number in range(self.num_taps):
            self.add_module(f"deepstack_merger_{number}", Merger(config, norm_over_block=True, **shared))
        self.merger = Merger(config, norm_over_block=False, **shared)
        self.rope = AxialRope(
            head_dim=config.hidden_size // config.num_attention_heads, theta=hf_config.rope_parameters["rope_theta"]
        )

    def forward(self, pixels_PD: Tensor, grids_thw: tuple[Grid, ...]) -> VisionFeatures:
        device = pixels_PD.device
        positions_P2 = torch.cat([patch_positions(grid, merge=self.merge) for grid in grids_thw]).to(device)
        frames = Packing(tuple(rows * columns for count, rows, columns in grids_thw for _ in range(count)))
        shared = {
            "attention_mask": None,
            "rotary_pos_emb": self.rope(positions_P2),
            "packed_seq_params": PackedSequences(plan=self.parts.plan(frames, causal=False, device=device)),
        }
        embedded_Ph = self.patch_embed(pixels_PD.to(self.config.params_dtype)) + self._positions(grids_thw)
        hidden_P1h = embedded_Ph[:, None, :]
        tapped = []
        for number in range(self.num_segments):
            hidden_P1h = self.get_submodule(f"segment_{number}")(hidden_states=hidden_P1h, **shared)
            if number < self.num_taps:
                tapped.append(self.get_submodule(f"deepstack_merger_{number}")(hidden_P1h))
        return VisionFeatures(self.merger(hidden_P1h), tuple(tapped))

    def _positions(self, grids_thw: tuple[Grid, ...]) -> Tensor:
        """The learned grid, stretched over each picture corner to corner; [P, h].

        As products of matrices: torch's own interpolation adds gradients up in any order on CUDA, and the copies of the
        grid on tensor-parallel ranks would drift apart.
        """
        side = math.isqrt(self.position_grid.shape[0])
        grid_GGh = self.position_grid.to(torch.float32).view(side, side, -1)
        stretched = {}
        for rows, columns in {(rows, columns) for _, rows, columns in grids_thw}:
            down, across = (stretch_weights(n, side=side).to(grid_GGh.device) for n in (rows, columns))
            positions_RCh = torch.einsum("rg,ghx,ch->rcx", down, grid_GGh, across)
            stretched[rows, columns] = by_block(positions_RCh, merge=self.merge)
        positions_Ph = torch.cat([stretched[rows, columns].repeat(count, 1) for count, rows, columns in grids_thw])
        return positions_Ph.to(self.config.params_dtype)
