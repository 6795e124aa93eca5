"""Parts of transformer layers that run on every device: Megatron's linear layers, attention and norm in plain torch."""

from __future__ import annotations

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_vppo.models.layers.attention import PackedAttention, WindowAttention, plan_packed
from megatron_vppo.models.layers.norm import PlainNorm
from megatron_vppo.models.layers.parts import LayerParts

TORCH_PARTS = LayerParts(
    name="torch",
    norm=PlainNorm,
    column_linear=ColumnParallelLinear,
    row_linear=RowParallelLinear,
    attention=PackedAttention,
    window_attention=WindowAttention,
    plan=plan_packed,
)
"""Layer modules that need no TransformerEngine."""
