"""Which modules a transformer layer is made of.

Only `plain_layer_spec` exists: Megatron's own parallel linear layers, and norm and attention in plain torch, which run
on every device. A specification with TransformerEngine's modules belongs here too, beside it.
"""

from __future__ import annotations

import functools

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_vppo.models.attention import PackedAttention
from megatron_vppo.models.norm import Norm, RMSNorm


def plain_layer_spec(
    *,
    causal: bool,
    norm: Norm = RMSNorm,
    qk_norm: bool = False,
    core_attention: type[PackedAttention] = PackedAttention,
    layer: type[TransformerLayer] = TransformerLayer,
) -> ModuleSpec:
    """A pre-norm layer: norm, self-attention, norm, MLP (gated or not, as the configuration says).

    Args:
        qk_norm: queries and keys are normalised head by head before they are rotated.
        layer: what holds the modules together; a subclass may do more.
    """
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=core_attention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=RMSNorm if qk_norm else None,
                    k_layernorm=RMSNorm if qk_norm else None,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=_mlp_spec(mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mlp_spec(submodules: MLPSubmodules) -> ModuleSpec | functools.partial:
    # Megatron 0.17 made the MLP of a layer a callable; 0.16 takes a ModuleSpec only (it hands over no process group
    # otherwise).
    as_submodule = getattr(MLP, "as_mlp_submodule", None)
    if as_submodule is None:
        return ModuleSpec(module=MLP, submodules=submodules)
    return functools.partial(as_submodule, submodules=submodules)
