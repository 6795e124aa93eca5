"""The emulation's operands and products against TransformerEngine's own quantizers and linear layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vppo.config.choices import Fp8Recipe
from megatron_vppo.fidelity.formats import Operand, quantise_dequantise

RECIPES: tuple[Fp8Recipe, ...] = ("blockwise", "tensorwise", "delayed", "mxfp8")
SHAPES = ((256, 384), (160, 224))
"""The second leaves blocks of 128 that are not full."""
DELAYED_AMAX = 2.5
"""The amax of earlier forwards; some values are larger."""
RECIPROCAL = 2.0**-22
"""Relative; TransformerEngine may take 1 / scale with another last bit. Powers of two are exact."""
ACCUMULATION = 0.01
"""Tolerance, as a share of the largest output: bfloat16 rounding and the GPU's shorter accumulators."""

pytestmark = pytest.mark.gpu


def skip_without(recipe: Fp8Recipe) -> None:
    import transformer_engine.pytorch as te

    checks = {"blockwise": te.is_fp8_block_scaling_available, "mxfp8": te.is_mxfp8_available}
    available, reason = checks.get(recipe, te.is_fp8_available)(return_reason=True)
    if not available:
        pytest.skip(reason)


def quantizer(recipe: Fp8Recipe, operand: Operand) -> Any:
    import transformer_engine.pytorch as te
    import transformer_engine_torch as tex

    e4m3, rowwise = tex.DType.kFloat8E4M3, {"rowwise": True, "columnwise": False}
    if recipe == "blockwise":
        return te.Float8BlockQuantizer(e4m3, block_scaling_dim=1 if operand == "input" else 2, **rowwise)
    if recipe == "mxfp8":
        return te.MXFP8Quantizer(e4m3, **rowwise)
    if recipe == "tensorwise":
        return te.Float8CurrentScalingQuantizer(e4m3, torch.device("cuda"), **rowwise)
    scale = torch.full((1,), 448 / DELAYED_AMAX, device="cuda")
    return te.Float8Quantizer(scale, torch.zeros(1, device="cuda"), e4m3, **rowwise)


def make_operand(shape: tuple[int, int], dtype: torch.dtype, *, seed: int) -> Tensor:
    """Magnitudes over twelve binary orders, a block of zeros, one of tiny values."""
    generator = torch.Generator().manual_seed(seed)
    x_RK = torch.randn(shape, generator=generator) * torch.empty(shape).uniform_(-12, 0, generator=generator).exp2()
    x_RK[:128, :128] = 0
    x_RK[128:, :32] *= 1e-30
    return x_RK.to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operand", ["input", "weight"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_operands(recipe: Fp8Recipe, operand: Operand, shape: tuple[int, int], dtype: torch.dtype) -> None:
    skip_without(recipe)
    x_RK = make_operand(shape, dtype, seed=1)
    expected_RK = quantizer(recipe, operand)(x_RK).dequantize(dtype=torch.float32)
    before = torch.tensor(DELAYED_AMAX, device="cuda") if recipe == "delayed" else None
    got_RK = quantise_dequantise(x_RK, recipe=recipe, operand=operand, amax_before=before)
    if recipe in ("blockwise", "mxfp8"):
        assert torch.equal(got_RK, expected_RK)
    else:
        assert ((got_RK - expected_RK).abs() <= RECIPROCAL * expected_RK.abs()).all()
    assert not torch.equal(got_RK, x_RK.float())


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise", "mxfp8"])
def test_products(recipe: Fp8Recipe) -> None:
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    skip_without(recipe)
    made = {
        "blockwise": recipes.Float8BlockScaling,
        "tensorwise": recipes.Float8CurrentScaling,
        "mxfp8": recipes.MXFP8BlockScaling,
    }
    torch.manual_seed(2)
    linear = te.Linear(384, 256, bias=True, params_dtype=torch.bfloat16, device="cuda")
    x_TK = torch.randn(256, 384, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), te.autocast(enabled=True, recipe=made[recipe]()):
        got_TO = linear(x_TK).float()
    emulated_TO = (
        quantise_dequantise(x_TK, recipe=recipe, operand="input")
        @ quantise_dequantise(linear.weight.detach(), recipe=recipe, operand="weight").T
        + linear.bias.detach()
    )
    plain_TO = x_TK.float() @ linear.weight.detach().float().T + linear.bias.detach()
    largest = plain_TO.abs().max()
    assert (got_TO - emulated_TO).abs().max() < ACCUMULATION * largest
    assert (got_TO - emulated_TO).square().mean() < 0.05 * (got_TO - plain_TO).square().mean(), "the same errors"
