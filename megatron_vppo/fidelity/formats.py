"""The FP8 numbers that TransformerEngine's recipes make of an operand of a matrix product, in plain torch.

The formulas, and the places in TransformerEngine 2.20 that they were read from:

- E4M3, largest 448, round to nearest even, saturating: `cvt.rn.satfinite` in common/CuTeDSL/utils_fp8.py.
- Scale of a tensor or tile, 448 / amax, a power of two for 'blockwise': `compute_scale_from_amax` in
  common/recipe/recipe_common.cuh; defaults of `Float8CurrentScaling` and `Float8BlockScaling` in
  common/recipe/__init__.py.
- Scale of an MX block: `cvt_f32_to_fp8e8m0fnu` in common/CuTeDSL/utils_fp8.py, `exp2f_rcp` in common/CuTeDSL/utils.py.

Operands are [rows, columns]: the product sums over columns, and rows are tokens, or outputs of the layer.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vppo.config.choices import Fp8Recipe

Operand = Literal["input", "weight"]

E4M3_MAX = 448.0
BLOCKS: dict[tuple[Fp8Recipe, Operand], tuple[int, int]] = {
    ("blockwise", "input"): (1, 128),
    ("blockwise", "weight"): (128, 128),
    ("mxfp8", "input"): (1, 32),
    ("mxfp8", "weight"): (1, 32),
}
"""The rows and columns that share a scale. The other recipes have one scale per tensor."""

_EXPONENT_BITS = 0x7F800000
_MANTISSA_BITS = 0x007FFFFF
_MANTISSA_SIZE = 23
_LARGEST_E8M0 = 254


def quantise_dequantise(x: Tensor, *, recipe: Fp8Recipe, operand: Operand, amax_before: Tensor | None = None) -> Tensor:
    """Computes the operand as an FP8 product sees it. The amax of a last block that is not full is that of its values.

    Args:
        x: [rows, columns] float32 or bfloat16.
        amax_before: float32 scalar, for 'delayed' only: the amax that its scale is made of. None: the operand's own.

    Returns:
        [rows, columns] float32, which holds a product of E4M3 and a scale exactly; bfloat16 could not. NaN stays NaN.
    """
    x = x.float()
    if recipe == "mxfp8":
        scale = mx_scale(block_amax(x, *BLOCKS[recipe, operand]))
    elif recipe == "blockwise":
        scale = quotient_scale(block_amax(x, *BLOCKS[recipe, operand]), power_of_two=True)
    else:
        amax = x.abs().amax() if amax_before is None else amax_before
        scale = quotient_scale(amax, power_of_two=False)
    return to_e4m3(x * scale) * (1.0 / scale)


def to_e4m3(x: Tensor) -> Tensor:
    """Returns the nearest E4M3 value, as float32. Ties go to even; values beyond 448 become 448."""
    # Older versions of torch do not saturate; they turn values that are too large into NaN.
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def quotient_scale(amax: Tensor, *, power_of_two: bool) -> Tensor:
    """Returns 448 / amax; 1 where amax is zero, infinite or NaN, the largest float32 where the quotient is infinite.

    Args:
        amax: float32, any shape.
        power_of_two: cut off the mantissa of the scale.
    """
    # Not E4M3_MAX / amax: with a number on the left torch multiplies by a reciprocal, which rounds twice.
    scale = torch.div(torch.full_like(amax, E4M3_MAX), amax).clamp(max=torch.finfo(torch.float32).max)
    if power_of_two:
        scale = (scale.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    return torch.where(amax.isfinite() & (amax != 0), scale, 1.0)


def mx_scale(amax: Tensor) -> Tensor:
    """Returns the scale of a block: 2^-e with the smallest e such that amax / 448 <= 2^e, e from -127 to 127.

    Args:
        amax: float32, any shape; zero has e = -127.
    """
    bits = (amax * (1.0 / E4M3_MAX)).view(torch.int32)
    exponent, mantissa = bits >> _MANTISSA_SIZE, bits & _MANTISSA_BITS
    half_of_smallest = 0x400000  # 2^-127 as a subnormal float32
    rounds_up = (mantissa > 0) & ~((exponent == 0) & (mantissa <= half_of_smallest))
    biased = (exponent + rounds_up).clamp(max=_LARGEST_E8M0)
    return torch.ldexp(torch.ones_like(amax), 127 - biased)


def block_amax(x: Tensor, rows: int, columns: int) -> Tensor:
    """Returns the largest magnitude in the block that each value belongs to, in the shape of x.

    Args:
        x: [height, width] float32.
        rows, columns: the size of a block.
    """
    height, width = x.shape
    padded = F.pad(x.abs(), (0, -width % columns, 0, -height % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # [blocks down, rows, blocks across, columns]
    amax = blocks.amax((1, 3), keepdim=True).expand_as(blocks).flatten(2, 3).flatten(0, 1)
    return amax[:height, :width]
