"""The parts that the vision towers of all families share: patch grids, rotary angles, merged features, and the tower's
frame.

Shape suffix legend: P = patches of all images; D = values of one patch; F = rotary angles, one per frequency of an
axis; M = merged vision features (merge x merge patches each); h = hidden size; E = values per attention head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor, nn

from megatron_vppo.models.layers.norm import PlainNorm
from megatron_vppo.models.layers.parts import LayerParts, for_plain_linear
from megatron_vppo.models.layers.sequences import AttentionPlan

Grid = tuple[int, int, int]
"""(frames, rows, columns) of an image, in patches."""


@dataclass(frozen=True)
class TowerPlan:
    """The facts about some images that a tower's forward pass needs, worked out on the host. Families add their own."""

    grids_thw: tuple[Grid, ...]
    blocks_M2: Tensor
    """int64; (row, column) of the first patch of each merged block, in the order in which the layers take the blocks;
    see `patch_positions`."""
    frames: AttentionPlan
    """The plan of attention over whole frames."""


@dataclass(frozen=True)
class VisionFeatures:
    """The features of images, image by image, each row by row of its merged grid."""

    merged_Mh: Tensor
    """They replace the embeddings of the image tokens."""
    deepstack_Mh: tuple[Tensor, ...] = ()
    """They are added after the first language layers, one after each."""


def join_features(parts: Sequence[VisionFeatures]) -> VisionFeatures:
    """Puts the features of several runs of the tower one after the other."""
    if len(parts) == 1:
        return parts[0]
    taps = zip(*(part.deepstack_Mh for part in parts), strict=True)
    return VisionFeatures(torch.cat([part.merged_Mh for part in parts]), tuple(torch.cat(tap) for tap in taps))


class VisionTower(MegatronModule):
    """The frame of a family's tower. It lies on the first pipeline stage, all of its layers, split over the
    tensor-parallel ranks of `groups`. A family adds the layers, the merger and the forward pass.
    """

    num_taps = 0
    """Deepstack features that it gives."""

    def __init__(self, config: TransformerConfig, hf_config: Any, *, parts: LayerParts, patch_bias: bool) -> None:
        """
        Args:
            hf_config: the vision configuration.
        """
        super().__init__(config)
        self.parts = parts
        self.merge = hf_config.spatial_merge_size
        """Patches along each side of a merged feature."""
        self.dtype = config.params_dtype
        patch_values = hf_config.in_channels * hf_config.temporal_patch_size * hf_config.patch_size**2
        # A convolution whose stride is its kernel is a linear layer on flattened patches.
        self.patch_embed = nn.Linear(patch_values, config.hidden_size, bias=patch_bias, dtype=config.params_dtype)
        self.rope = AxialRope(
            head_dim=config.hidden_size // config.num_attention_heads, theta=hf_config.rope_parameters["rope_theta"]
        )

    def plan(self, grids_thw: tuple[Grid, ...]) -> TowerPlan:
        raise NotImplementedError

    def forward(self, pixels_PD: Tensor, plan: Any) -> VisionFeatures:
        """Maps the patches of images, in the processor's order, to features. `plan` is what `plan` made of them."""
        raise NotImplementedError


def vision_layers(
    config: TransformerConfig, specs: list[ModuleSpec], *, groups: ProcessGroupCollection
) -> TransformerBlock:
    """Chains layers, without a norm at the end: the mergers have their own."""
    return TransformerBlock(
        config,
        TransformerBlockSubmodules(layer_specs=specs),
        post_layer_norm=False,
        pre_process=True,
        post_process=False,
        pg_collection=groups,
    )


@functools.lru_cache(maxsize=256)
def block_positions(grid: Grid, *, merge: int) -> Tensor:
    """Returns int64 [M, 2]: (row, column) of the first patch of each merged block of one image, row by row."""
    frames, rows, columns = grid
    row, column = torch.meshgrid(torch.arange(0, rows, merge), torch.arange(0, columns, merge), indexing="ij")
    return torch.stack([row.flatten(), column.flatten()], dim=1).repeat(frames, 1)


def patch_positions(blocks_M2: Tensor, *, merge: int) -> Tensor:
    """Returns int64 [P, 2]: (row, column) of each patch, merged block by merged block, from those of the blocks."""
    step = torch.arange(merge, device=blocks_M2.device)
    within = torch.stack([step.repeat_interleave(merge, output_size=merge**2), step.repeat(merge)], dim=1)
    return (blocks_M2[:, None] + within).flatten(0, 1)


def by_block(x: Tensor, *, merge: int) -> Tensor:
    """Reorders a frame, [rows, columns, ...] -> [rows * columns, ...]: patches of a merge block become neighbours."""
    rows, columns = x.shape[:2]
    blocks = x.view(rows // merge, merge, columns // merge, merge, *x.shape[2:])
    return blocks.transpose(1, 2).reshape(rows * columns, *x.shape[2:])


class AxialRope(nn.Module):
    """Rotary angles of patches: half of a head's frequencies turn with the row, half with the column."""

    frequency_F: Tensor

    def __init__(self, *, head_dim: int, theta: float) -> None:
        super().__init__()
        axis_values = head_dim // 2
        frequency_F = 1.0 / (theta ** (torch.arange(0, axis_values, 2, dtype=torch.float32) / axis_values))
        self.register_buffer("frequency_F", frequency_F, persistent=False)

    def forward(self, positions_P2: Tensor) -> Tensor:
        """Returns fp32 radians [P, 1, 1, E]; both halves of E are alike."""
        row_and_column = (positions_P2[:, :, None].to(torch.float32) * self.frequency_F).flatten(1)
        return torch.cat([row_and_column, row_and_column], dim=-1)[:, None, None, :]


class Merger(MegatronModule):
    """A two-layer MLP that makes one feature of the language model's width from the patches of each merged block.

    The norm comes first: over each patch, or over the whole block.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        merge: int,
        out_width: int,
        norm_over_block: bool,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.width = config.hidden_size * merge**2
        self.norm_over_block = norm_over_block
        normed = self.width if norm_over_block else config.hidden_size
        self.norm = PlainNorm(config, normed, eps=config.layernorm_epsilon)
        shared = {
            "config": for_plain_linear(config),
            "init_method": config.init_method,
            "bias": True,
            "tp_group": groups.tp,
        }
        self.linear_fc1 = ColumnParallelLinear(self.width, self.width, gather_output=False, **shared)
        self.linear_fc2 = RowParallelLinear(
            self.width, out_width, input_is_parallel=True, skip_bias_add=False, **shared
        )

    def forward(self, hidden_P1h: Tensor) -> Tensor:
        """Maps [P, 1, h] to [M, out_width]."""
        before = hidden_P1h.view(-1, 1, self.width) if self.norm_over_block else hidden_P1h
        blocks = self.norm(before).view(-1, 1, self.width)
        return self.linear_fc2(F.gelu(self.linear_fc1(blocks)[0]))[0].squeeze(1)
