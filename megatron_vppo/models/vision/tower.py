"""What vision towers have in common: pictures as grids of patches, merged blocks, and the features they give.

Shape suffix legend: P = patches of all pictures; M = merged blocks (merge x merge patches each); h = width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_vppo.models.layers.norm import PlainNorm
from megatron_vppo.models.layers.parts import for_plain_linear

Grid = tuple[int, int, int]
"""(frames, rows, columns) of a picture, in patches."""


@dataclass(frozen=True)
class VisionFeatures:
    """Picture by picture, each row by row of its merged grid."""

    merged_Mh: Tensor
    """In the place of the image tokens' embeddings."""
    deepstack_Mh: tuple[Tensor, ...] = ()
    """Added after the first language layers, one after each."""


class VisionTower(Protocol):
    merge: int
    """Side of a merged block, in patches."""
    num_taps: int
    """Deepstack features."""
    dtype: torch.dtype

    def __call__(self, pixels_PD: Tensor, grids_thw: tuple[Grid, ...]) -> VisionFeatures: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@functools.lru_cache(maxsize=256)
def patch_positions(grid: Grid, *, merge: int) -> Tensor:
    """int64 [P, 2]: (row, column) of each patch of one picture, in the processor's order, block by block."""
    frames, rows, columns = grid
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    positions_P2 = torch.stack([by_block(row, merge=merge), by_block(column, merge=merge)], dim=1)
    return positions_P2.repeat(frames, 1)


def by_block(x: Tensor, *, merge: int) -> Tensor:
    """[rows, columns, ...] of one frame -> [rows * columns, ...], the patches of a merged block side by side."""
    rows, columns = x.shape[:2]
    blocks = x.view(rows // merge, merge, columns // merge, merge, *x.shape[2:])
    return blocks.transpose(1, 2).reshape(rows * columns, *x.shape[2:])


class AxialRope(nn.Module):
    """Half of a head's frequencies turn with a patch's row, half with its column."""

    frequency_F: Tensor

    def __init__(self, *, head_dim: int, theta: float) -> None:
        super().__init__()
        axis_values = head_dim // 2
        frequency_F = 1.0 / (theta ** (torch.arange(0, axis_values, 2, dtype=torch.float32) / axis_values))
        self.register_buffer("frequency_F", frequency_F, persistent=False)

    def forward(self, positions_P2: Tensor) -> Tensor:
        """fp32 radians [P, 1, 1, values per head], both halves alike."""
        row_and_column = (positions_P2[:, :, None].to(torch.float32) * self.frequency_F).flatten(1)
        return torch.cat([row_and_column, row_and_column], dim=-1)[:, None, None, :]


class Merger(MegatronModule):
    """The patches of a block side by side through a two-layer MLP to the language model's width.

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
        """[P, 1, h] -> [M, out_width]."""
        before = hidden_P1h.view(-1, 1, self.width) if self.norm_over_block else hidden_P1h
        blocks = self.norm(before).view(-1, 1, self.width)
        return self.linear_fc2(F.gelu(self.linear_fc1(blocks)[0]))[0].squeeze(1)
