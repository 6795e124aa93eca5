"""The modules that a transformer layer is made of, and the spec of the layer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_vppo.models.layers.sequences import AttentionPlan
from megatron_vppo.models.options import Backend
from megatron_vppo.weights.entries import Entry


@dataclass(frozen=True)
class LayerParts:
    """The modules that layers are built from, the same for every model."""

    name: Backend
    norm: type
    """Called with (config, hidden_size, eps); RMSNorm or LayerNorm by `config.normalization`."""
    column_linear: type
    """The linear layer after a norm. It contains the norm if `fused_norms` says so."""
    row_linear: type
    attention: type
    window_attention: type
    """Attention that reads `PackedSequences.window_plan`."""
    plan: Callable[..., AttentionPlan]
    """(Packing, causal, rank and size of the context-parallel group) -> the plan that `attention` reads, on the
    host."""
    fused_norms: tuple[tuple[str, str], ...] = ()
    """Norms that lie inside a linear layer: (prefix of their parameters in the weight map, prefix in the module)."""

    def rename_entries(self, entries: Iterable[Entry]) -> tuple[Entry, ...]:
        """Returns the weight map with parameter names as they are in layers of these parts. Checkpoints keep the map's
        names."""

        def renamed(template: str) -> str:
            for name, fused in self.fused_norms:
                template = template.replace(f".{name}", f".{fused}")
            return template

        return tuple(replace(entry, template=renamed(entry.template)) for entry in entries)


def layer_spec(
    parts: LayerParts,
    *,
    causal: bool,
    qk_norm: bool = False,
    windowed: bool = False,
    layer: type[TransformerLayer] = TransformerLayer,
) -> ModuleSpec:
    """Makes the spec of a pre-norm layer: norm, self-attention, norm, MLP. `config.gated_linear_unit` makes the MLP
    gated.

    Args:
        qk_norm: normalise queries and keys head by head before they are rotated.
        windowed: attend within windows.
        layer: the class of the layer.
    """
    norm = IdentityOp if parts.fused_norms else parts.norm
    mlp = MLPSubmodules(linear_fc1=parts.column_linear, linear_fc2=parts.row_linear)
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.column_linear,
                    core_attention=parts.window_attention if windowed else parts.attention,
                    linear_proj=parts.row_linear,
                    q_layernorm=parts.norm if qk_norm else None,
                    k_layernorm=parts.norm if qk_norm else None,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=_mlp_spec(mlp),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={fused: name for name, fused in parts.fused_norms},
        ),
    )


def for_plain_linear(config: TransformerConfig) -> TransformerConfig:
    """Returns the configuration for Megatron's own linear layers, which we use outside of transformer layers.

    Fused gradient accumulation is off: TransformerEngine's layers have it built in, Megatron's would need Apex.
    """
    plain = copy.copy(config)
    plain.gradient_accumulation_fusion = False
    return plain


def _mlp_spec(submodules: MLPSubmodules) -> Any:
    # Megatron 0.17 builds a layer's MLP by a callable. 0.16 needs a ModuleSpec: it passes no process group to others.
    as_submodule = getattr(MLP, "as_mlp_submodule", None)
    if as_submodule is None:
        return ModuleSpec(module=MLP, submodules=submodules)
    return functools.partial(as_submodule, submodules=submodules)
