"""FP8 linear layers on hardware that has none: quantised and dequantised operands, multiplied in float32.

The values of FP8 operands are emulated, in the recipes' own formats and block shapes (formats.py). Two things are not
emulated: the order in which a GPU adds up their products, and the backward pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vppo.config.choices import Fp8Recipe
from megatron_vppo.fidelity.formats import quantise_dequantise
from megatron_vppo.models.options import Fp8Options
from megatron_vppo.models.precision import AMAX_HISTORY, check_ends
from megatron_vppo.models.qwen_vl import QwenVLModel


@contextmanager
def emulated_fp8(stages: Sequence[QwenVLModel], options: Fp8Options) -> Iterator[None]:
    """Makes the linear layers of the language model's transformer layers (QKV, projection, both of the MLP) compute as
    with FP8 operands, while it is open.

    Everything else stays as it is: vision tower, projector, embedding, norms, attention scores, head, and the first and
    last `bf16_layers_at_ends` layers of the whole model.

    Forward passes only. On opening, each rank makes quantised copies of the weights that it holds, of 4 bytes per
    weight. On closing, the weights are back bit for bit. Outputs have the model's dtype.

    The scale of 'delayed' comes from the largest amax of the forward passes since opening; the first one uses the
    operand's own amax. TransformerEngine starts from scale 1, but the steady state is what we want to measure.

    Args:
        stages: the stages of the model that this rank holds.

    Raises:
        ValueError: the layers are of another backend, or the recipe does not allow layers in 16 bits at the ends.
        RuntimeError: from a forward pass with gradients.
    """
    linears = fp8_linears(stages, options)
    with ExitStack() as stack:
        for linear in linears:
            stack.enter_context(_emulated(linear, options.recipe))
        yield


def fp8_linears(stages: Sequence[QwenVLModel], options: Fp8Options) -> list[nn.Module]:
    """Returns the linear layers of these stages that compute in FP8, in the order of the model."""
    layers, ends = stages[0].config.num_layers, options.bf16_layers_at_ends
    check_ends(options, layers=layers)
    if stages[0].parts.name != "torch":  # TransformerEngine's linear layers hold a norm as well
        raise ValueError(
            f"FP8 is emulated in layers of model.backend=torch, but they are {stages[0].parts.name}; "
            "set model.backend=torch"
        )
    return [
        linear
        for stage in stages
        for layer in stage.language.decoder.layers
        if ends < layer.layer_number <= layers - ends  # counted from 1, over all stages
        for linear in (
            layer.self_attention.linear_qkv,
            layer.self_attention.linear_proj,
            layer.mlp.linear_fc1,
            layer.mlp.linear_fc2,
        )
    ]


@contextmanager
def _emulated(linear: nn.Module, recipe: Fp8Recipe) -> Iterator[None]:
    weight: nn.Parameter = linear.weight  # type: ignore[assignment]
    kept = weight.data
    amaxes: deque[Tensor] = deque(maxlen=AMAX_HISTORY)

    def quantise_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("emulated FP8 has a forward pass only; run it under torch.no_grad()")
        hidden, *others = args
        rows = hidden.flatten(0, -2)  # [tokens, input width of the layer]
        before = torch.stack([*amaxes]).amax() if amaxes else None
        if recipe == "delayed":
            amaxes.append(rows.float().abs().amax())
        quantised = quantise_dequantise(rows, recipe=recipe, operand="input", amax_before=before)
        return (quantised.view(hidden.shape), *others)

    def round_output(
        module: nn.Module, args: Any, output: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        product, bias = output
        return product.to(kept.dtype), bias

    hooks = [linear.register_forward_pre_hook(quantise_input), linear.register_forward_hook(round_output)]
    try:
        weight.data = quantise_dequantise(kept, recipe=recipe, operand="weight")
        yield
    finally:
        weight.data = kept
        for hook in hooks:
            hook.remove()
