"""Vision tower of Qwen2.5-VL: patches of images of any size -> one feature per merged block of patches.

Shape suffix legend: P = patches of all images; D = values of one patch; M = merged vision features (merge x merge
patches each), or the blocks that they come from; h = hidden size.

Most layers attend within windows. Patches are reordered once so that each window is a packed sequence of its own; the
merged features are put back into the images' order at the end.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.layers.parts import LayerParts, layer_spec
from megatron_vppo.models.layers.sequences import AttentionPlan, PackedSequences
from megatron_vppo.models.vision.tower import (
    Grid,
    Merger,
    TowerPlan,
    VisionFeatures,
    VisionTower,
    block_positions,
    patch_positions,
    vision_layers,
)


@dataclass(frozen=True)
class WindowOrder:
    """The windows of one image."""

    block_order_M: Tensor
    """int64; the numbers of the merged blocks, window after window, row by row within each."""
    window_lengths: tuple[int, ...]
    """Patches per window."""
    frame_lengths: tuple[int, ...]
    """Patches per frame, for layers with full attention."""


@functools.lru_cache(maxsize=256)
def window_order(grid: Grid, *, merge: int, window_blocks: int) -> WindowOrder:
    """Cuts an image of (frames, rows, columns) patches into windows of `window_blocks` merged blocks a side.

    Windows at the right and lower edges hold what is left. A frame of 4 x 6 blocks in windows of 2:

        blocks   0  1 |  2  3 |  4  5        block_order_M: 0 1 6 7, then 2 3 8 9, then 4 5 10 11,
                 6  7 |  8  9 | 10 11                       then the second row of windows
                ------+-------+------
                12 13 | 14 15 | 16 17
                18 19 | 20 21 | 22 23
    """
    frames, rows, columns = grid
    block_rows, block_columns = rows // merge, columns // merge
    frame_M, row_M, column_M = (
        axis.flatten()
        for axis in torch.meshgrid(
            torch.arange(frames), torch.arange(block_rows), torch.arange(block_columns), indexing="ij"
        )
    )
    windows_down, windows_across = -(-block_rows // window_blocks), -(-block_columns // window_blocks)
    window_M = (frame_M * windows_down + row_M // window_blocks) * windows_across + column_M // window_blocks
    return WindowOrder(
        block_order_M=torch.argsort(window_M, stable=True),
        window_lengths=tuple((torch.bincount(window_M) * merge**2).tolist()),
        frame_lengths=(rows * columns,) * frames,
    )


@dataclass(frozen=True)
class WindowedTowerPlan(TowerPlan):
    """The plan of a tower whose layers take the patches window by window."""

    windows: AttentionPlan
    """The plan of attention within windows."""
    block_order_M: Tensor
    """int64; the numbers of the merged blocks of all images, window after window."""


class Qwen25VisionTower(VisionTower):
    """Layers with attention in windows, and some with attention over whole frames."""

    def __init__(
        self,
        config: TransformerConfig,
        hf_config: Qwen2_5_VLVisionConfig,
        *,
        parts: LayerParts,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, hf_config, parts=parts, patch_bias=False)
        self.window_blocks = hf_config.window_size // hf_config.spatial_merge_size // hf_config.patch_size
        specs = [
            layer_spec(parts, causal=False, windowed=layer not in hf_config.fullatt_block_indexes)
            for layer in range(hf_config.depth)
        ]
        self.blocks = vision_layers(config, specs, groups=groups)
        self.merger = Merger(
            config,
            merge=self.merge,
            out_width=hf_config.out_hidden_size,
            norm_over_block=False,
            groups=groups,
        )

    def plan(self, grids_thw: tuple[Grid, ...]) -> WindowedTowerPlan:
        orders = [window_order(grid, merge=self.merge, window_blocks=self.window_blocks) for grid in grids_thw]
        block_order_M = _concatenate_orders(orders)
        frames = Packing(tuple(itertools.chain.from_iterable(order.frame_lengths for order in orders)))
        windows = Packing(tuple(itertools.chain.from_iterable(order.window_lengths for order in orders)))
        blocks_M2 = torch.cat([block_positions(grid, merge=self.merge) for grid in grids_thw])
        return WindowedTowerPlan(
            grids_thw,
            blocks_M2=blocks_M2[block_order_M],
            frames=self.parts.plan(frames, causal=False),
            windows=self.parts.plan(windows, causal=False),
            block_order_M=block_order_M,
        )

    def forward(self, pixels_PD: Tensor, plan: WindowedTowerPlan) -> VisionFeatures:
        hidden_Ph = self.patch_embed(pixels_PD.to(self.config.params_dtype))
        hidden_P1h = self.blocks(
            hidden_states=self._into_windows(hidden_Ph, plan.block_order_M)[:, None, :],
            attention_mask=None,
            rotary_pos_emb=self.rope(patch_positions(plan.blocks_M2, merge=self.merge)),
            packed_seq_params=PackedSequences(plan=plan.frames, window_plan=plan.windows),
        )
        return VisionFeatures(self.merger(hidden_P1h)[torch.argsort(plan.block_order_M)])

    def _into_windows(self, patches: Tensor, block_order_M: Tensor) -> Tensor:
        """Reorders the rows of [P, ...] block by block, the merge x merge patches of each staying together."""
        blocks = patches.view(-1, self.merge**2, patches.shape[-1])
        return blocks[block_order_M].view_as(patches)


def _concatenate_orders(orders: list[WindowOrder]) -> Tensor:
    """Makes one order over the blocks of all images: each image's numbers go on after those of the image before."""
    offset, shifted = 0, []
    for order in orders:
        shifted.append(order.block_order_M + offset)
        offset += order.block_order_M.numel()
    return torch.cat(shifted)
