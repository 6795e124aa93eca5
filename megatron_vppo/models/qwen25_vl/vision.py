"""Vision tower: patches of pictures of any size -> one feature per merged block of patches.

Shape suffix legend: P = patches of all pictures; D = values per patch; M = merged blocks (merge x merge patches each);
h = width.

Patches are reordered once so that each attention window is a packed sequence of its own; the merged features are put
back into the pictures' order at the end.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.layers.parts import LayerParts, layer_spec
from megatron_vppo.models.layers.sequences import PackedSequences
from megatron_vppo.models.vision.tower import AxialRope, Grid, Merger, VisionFeatures, patch_positions


@dataclass(frozen=True)
class WindowOrder:
    """How the patches of one picture fall into windows."""

    block_order_M: Tensor
    """int64; the merged blocks, window after window, row by row within each."""
    window_lengths: tuple[int, ...]
    """Patches per window."""
    frame_lengths: tuple[int, ...]
    """Patches per frame, for layers with full attention."""


@functools.lru_cache(maxsize=256)
def window_order(grid: Grid, *, merge: int, window_blocks: int) -> WindowOrder:
    """Cuts a picture of (frames, rows, columns) patches into windows of `window_blocks` merged blocks a side.

    Windows at the right and lower edges hold what is left.
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


class VisionTower(MegatronModule):
    """All of its layers, split over the tensor-parallel ranks of `groups`; it lives on the first pipeline stage."""

    def __init__(
        self,
        config: TransformerConfig,
        hf_config: Qwen2_5_VLVisionConfig,
        *,
        parts: LayerParts,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.parts = parts
        self.merge = hf_config.spatial_merge_size
        self.num_taps = 0
        self.dtype = config.params_dtype
        self.window_blocks = hf_config.window_size // hf_config.spatial_merge_size // hf_config.patch_size
        patch_values = hf_config.in_channels * hf_config.temporal_patch_size * hf_config.patch_size**2
        # A convolution whose stride is its kernel is a linear layer on flattened patches.
        self.patch_embed = nn.Linear(patch_values, config.hidden_size, bias=False, dtype=config.params_dtype)
        layers = [
            layer_spec(parts, causal=False, windowed=layer not in hf_config.fullatt_block_indexes)
            for layer in range(hf_config.depth)
        ]
        self.blocks = TransformerBlock(
            config,
            TransformerBlockSubmodules(layer_specs=layers),
            post_layer_norm=False,
            pre_process=True,
            post_process=False,
            pg_collection=groups,
        )
        self.merger = Merger(
            config,
            merge=self.merge,
            out_width=hf_config.out_hidden_size,
            norm_over_block=False,
            groups=groups,
        )
        self.rope = AxialRope(
            head_dim=config.hidden_size // config.num_attention_heads, theta=hf_config.rope_parameters["rope_theta"]
        )

    def forward(self, pixels_PD: Tensor, grids_thw: tuple[Grid, ...]) -> VisionFeatures:
        device = pixels_PD.device
        orders = [window_order(grid, merge=self.merge, window_blocks=self.window_blocks) for grid in grids_thw]
        block_order_M = _concatenate_orders(orders).to(device)
        frames, windows = (
            Packing(tuple(length for lengths in each for length in lengths))
            for each in ([order.frame_lengths for order in orders], [order.window_lengths for order in orders])
        )
        sequences = PackedSequences(
            plan=self.parts.plan(frames, causal=False, device=device),
            window_plan=self.parts.plan(windows, causal=False, device=device),
        )
        positions_P2 = torch.cat([patch_positions(grid, merge=self.merge) for grid in grids_thw]).to(device)
        hidden_Ph = self.patch_embed(pixels_PD.to(self.config.params_dtype))
        hidden_P1h = self.blocks(
            hidden_states=self._reorder(hidden_Ph, block_order_M)[:, None, :],
            attention_mask=None,
            rotary_pos_emb=self.rope(self._reorder(positions_P2, block_order_M)),
            packed_seq_params=sequences,
        )
        return VisionFeatures(self.merger(hidden_P1h)[torch.argsort(block_order_M)])

    def _reorder(self, x_P: Tensor, block_order_M: Tensor) -> Tensor:
        blocks = x_P.view(-1, self.merge**2, x_P.shape[-1])
        return blocks[block_order_M].view_as(x_P)


def _concatenate_orders(orders: list[WindowOrder]) -> Tensor:
    offset, shifted = 0, []
    for order in orders:
        shifted.append(order.block_order_M + offset)
        offset += order.block_order_M.numel()
    return torch.cat(shifted)
