"""The parts of a transformer layer, and the layer built from them."""

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

from megatron_vppo.models.layers.sequences import Plan
from megatron_vppo.models.options import Backend
from megatron_vppo.weights.kinds import Entry


@dataclass(frozen=True)
class LayerParts:
    """What layers are built from, whichever model they belong to."""

    name: Backend
    norm: type
    """Called with (config, hidden_size, eps); RMSNorm or LayerNorm by `config.normalization`."""
    column_linear: type
    """Behind a norm: with a norm of its own, where `fused_norms` says so."""
    row_linear: type
    attention: type
    window_attention: type
    """Reads `PackedSequences.window_plan`."""
    plan: Callable[..., Plan]
    """(Packing, causal, device, rank, size of the context-parallel group) -> what attention wants to know of packed
    sequences."""
    fused_norms: tuple[tuple[str, str], ...] = ()
    """Of a layer's parameters: (prefix as in the weight map, prefix within the linear layer that holds the norm)."""

    def own_names(self, entries: Iterable[Entry]) -> tuple[Entry, ...]:
        """The weight map with the names that parameters have in layers of these parts. Checkpoints keep the others."""

        def own(template: str) -> str:
            for name, fused in self.fused_norms:
                template = template.replace(f".{name}", f".{fused}")
            return template

        return tuple(replace(entry, template=own(entry.template)) for entry in entries)


def layer_spec(
    parts: LayerParts,
    *,
    causal: bool,
    qk_norm: bool = False,
    windowed: bool = False,
    layer: type[TransformerLayer] = TransformerLayer,
) -> ModuleSpec:
    """A pre-norm layer: norm, self-attention, norm, MLP (gated or not, as the configuration says).

    Args:
        qk_norm: queries and keys are normalised head by head before they are rotated.
        windowed: attention stays within windows.
        layer: what holds the modules together; a subclass may do more.
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
    """For Megatron's own linear layers outside of transformer layers: TransformerEngine's add gradients up in fp32 by
    themselves, these would want Apex.
    """
    own = copy.copy(config)
    own.gradient_accumulation_fusion = False
    return own


def _mlp_spec(submodules: MLPSubmodules) -> Any:
    # Megatron 0.17 made the MLP of a layer a callable; 0.16 takes a ModuleSpec only (it hands over no process group
    # otherwise).
    as_submodule = getattr(MLP, "as_mlp_submodule", None)
    if as_submodule is None:
        return ModuleSpec(module=MLP, submodules=submodules)
    return functools.partial(as_submodule, submodules=submodules)
