"""The FP8 numbers of every recipe against blocks worked out by hand.

E4M3 has three bits after the leading one: steps of 32 from 256 to 448, of 16 from 128 to 256, and so on down to steps
of 1/512 below 1/64. Every expected value below is the nearest such number, divided by the block's scale. Where scales
are powers of two nothing is rounded twice, and equality is exact.
"""

from __future__ import annotations

import bisect
import itertools
import math

import pytest
import torch

from megatron_vppo.config.choices import Fp8Recipe
from megatron_vppo.fidelity.formats import block_amax, mx_scale, quantise_dequantise, quotient_scale, to_e4m3

FLOAT32_ROUNDING = 1e-6
"""Relative; of a quotient, its reciprocal and two products."""


def dequantised(values: list[float], recipe: Fp8Recipe, **options: torch.Tensor) -> list[float]:
    return quantise_dequantise(torch.tensor([values]), recipe=recipe, operand="input", **options)[0].tolist()


def e4m3_grid() -> list[float]:
    """The non-negative E4M3 values by their definition: bias 7, subnormals, no infinity."""
    normal = [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)]
    return [mantissa * 2.0**-9 for mantissa in range(8)] + normal[:-1]  # the last code is NaN


def test_every_e4m3_value_and_every_tie() -> None:
    grid = e4m3_grid()
    assert grid[-1] == 448.0 and len(grid) == 127
    assert to_e4m3(torch.tensor(grid)).tolist() == grid
    middles = [(low + high) / 2 for low, high in itertools.pairwise(grid)]
    even = [grid[code + code % 2] for code in range(126)]
    assert to_e4m3(torch.tensor(middles)).tolist() == even
    assert to_e4m3(-torch.tensor(middles)).tolist() == [-value for value in even]


def test_random_values_go_to_the_nearest() -> None:
    grid = e4m3_grid()
    exponents = torch.empty(2000).uniform_(-10, 3, generator=torch.Generator().manual_seed(1))
    values = exponents.exp2()
    for value, rounded in zip(values.tolist(), to_e4m3(values).tolist(), strict=True):
        above = bisect.bisect_left(grid, value)
        assert rounded == min(grid[max(above - 1, 0) : above + 1], key=lambda code: abs(code - value))


def test_beyond_the_largest_saturates() -> None:
    large = torch.tensor([448.0, 449.0, 464.0, 480.0, 1e30, math.inf, -math.inf])
    assert to_e4m3(large).tolist() == [448.0] * 6 + [-448.0]
    assert to_e4m3(torch.tensor([math.nan])).isnan().all()


def test_tensorwise_by_hand() -> None:
    # amax 7, scale 64: 448, 64, -211.2 -> -208, 6.4 -> 6.5
    assert dequantised([7.0, 1.0, -3.3, 0.1], "tensorwise") == [7.0, 1.0, -3.25, 6.5 / 64]
    # amax 6, scale 448/6, not a power of two: 1 becomes 74.67 -> 72, and 72 * 6/448 = 27/28
    assert dequantised([6.0, 1.0], "tensorwise") == pytest.approx([6.0, 27 / 28], rel=FLOAT32_ROUNDING)


def test_tensorwise_has_one_scale_for_all_rows() -> None:
    x_RK = torch.tensor([[448.0, 1.0], [0.0011, 0.003]])
    # scale 1: 0.0011 and 0.003 are 0.56 and 1.54 steps of 1/512
    expected = [[448.0, 1.0], [1 / 512, 2 / 512]]
    assert quantise_dequantise(x_RK, recipe="tensorwise", operand="weight").tolist() == expected


def test_delayed_takes_an_earlier_amax_and_saturates() -> None:
    # amax 1 before, scale 448: 2 -> 896 -> 448; 0.5 -> 224; 0.3 -> 134.4 -> 128 (steps of 16 from 128)
    before = torch.tensor(1.0)
    expected = [1.0, 0.5, 128 / 448, -1.0]
    assert dequantised([2.0, 0.5, 0.3, -9.0], "delayed", amax_before=before) == pytest.approx(
        expected, rel=FLOAT32_ROUNDING
    )
    assert dequantised([7.0, 0.1], "delayed") == [7.0, 6.5 / 64], "without an earlier one: its own"


def test_blockwise_input_tiles_by_hand() -> None:
    # Tile 0 (128 values): amax 100, 448/100 = 4.48, scale 4. 400 lies between 384 and 416 -> 384 (even). 0.0007 becomes
    # 0.0028: 1.43 steps of 1/512 -> 1 step.
    # Tile 1 (the 2 values left): amax 0.011, 448/0.011 = 40727, scale 32768. 0.0007 becomes 22.94 -> 22 (steps of
    # 2), 0.011 becomes 360.4 -> 352 (steps of 32).
    row = [100.0, 0.0007] + [0.0] * 126 + [0.0007, 0.011]
    # A row of its own scale: amax 6, 448/6 = 74.7, scale 64. 5.3 becomes 339.2 -> 352; 1 becomes 64.
    other = [6.0, 5.3] + [1.0] * 126 + [0.0, 0.0]
    got_RK = quantise_dequantise(torch.tensor([row, other]), recipe="blockwise", operand="input")
    assert got_RK[0].tolist() == [96.0, 1 / 512 / 4] + [0.0] * 126 + [22 / 32768, 352 / 32768]
    assert got_RK[1].tolist() == [6.0, 5.5] + [1.0] * 126 + [0.0, 0.0]


def test_blockwise_weight_blocks_by_hand() -> None:
    w_RK = torch.zeros(130, 131)
    w_RK[0, 0], w_RK[127, 127] = 100.0, 0.0007  # one block, scale 4
    w_RK[5, 128], w_RK[127, 130] = 0.011, 0.0007  # the block to its right: 3 columns, scale 32768
    w_RK[128, 3], w_RK[129, 127] = 6.0, 5.3  # the block below: 2 rows, scale 64
    w_RK[129, 130] = -3.3  # alone: 448/3.3 = 135.8, scale 128, -422.4 -> -416
    got_RK = quantise_dequantise(w_RK, recipe="blockwise", operand="weight")
    places = [(0, 0), (127, 127), (5, 128), (127, 130), (128, 3), (129, 127), (129, 130)]
    expected = [96.0, 1 / 512 / 4, 352 / 32768, 22 / 32768, 6.0, 5.5, -416 / 128]
    assert [got_RK[place].item() for place in places] == expected
    assert got_RK.count_nonzero() == len(places)


@pytest.mark.parametrize("operand", ["input", "weight"])
def test_mxfp8_blocks_by_hand(operand: str) -> None:
    # Block 0 (32 values): amax 450 > 448, so 2^1: 225 -> 224, 50 lies between 48 and 52 -> 48 (even), 0.0007 becomes
    # 0.18 steps of 1/512 -> 0.
    # Block 1 (3 values): amax 6, 6/448 = 0.0134 <= 2^-6: 384, 339.2 -> 352, -64.
    row = [450.0, 100.0, 0.0007] + [0.0] * 29 + [6.0, 5.3, -1.0]
    # Exactly 448 needs no more than 2^0. The second block is zero.
    other = [448.0, 0.3] + [0.0] * 33
    got_RK = quantise_dequantise(torch.tensor([row, other]), recipe="mxfp8", operand=operand)  # type: ignore[arg-type]
    assert got_RK[0].tolist() == [448.0, 96.0] + [0.0] * 30 + [6.0, 5.5, -1.0]
    assert got_RK[1].tolist() == [448.0, 0.3125] + [0.0] * 33


def test_mx_scale_rounds_the_exponent_up() -> None:
    above = torch.nextafter(torch.tensor(448.0), torch.tensor(500.0)).item()
    amax = torch.tensor([448.0, above, 447.0, 224.0, 2.0**-140, 0.0, 3e38, math.inf])
    # 3e38 / 448 = 6.70e35 is more than 2^119 = 6.65e35; infinity takes the largest exponent, 127
    expected = [1.0, 0.5, 1.0, 2.0, 2.0**127, 2.0**127, 2.0**-120, 2.0**-127]
    assert mx_scale(amax).tolist() == expected


def test_quotient_scale_is_rounded_once() -> None:
    amax = torch.cat([torch.tensor([3.75]), torch.rand(1000, generator=torch.Generator().manual_seed(2)) * 10])
    assert torch.equal(quotient_scale(amax, power_of_two=False), (448.0 / amax.double()).float())


def test_quotient_scale_at_its_limits() -> None:
    amax = torch.tensor([0.0, math.inf, math.nan, 1e-39, 7.0, 6.0])
    largest = torch.finfo(torch.float32).max
    assert quotient_scale(amax, power_of_two=False).tolist() == pytest.approx(
        [1.0, 1.0, 1.0, largest, 64.0, 448 / 6], rel=FLOAT32_ROUNDING
    )
    assert quotient_scale(amax, power_of_two=True).tolist() == [1.0, 1.0, 1.0, 2.0**127, 64.0, 64.0]


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_zeros_stay_zero_and_infinity_saturates(recipe: Fp8Recipe) -> None:
    assert dequantised([0.0, -0.0, 0.0], recipe) == [0.0, 0.0, 0.0]
    if recipe != "mxfp8":  # scale 1
        assert dequantised([math.inf, 3.3], recipe) == [448.0, 3.25]


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_bfloat16_operands_are_not_rounded_again(recipe: Fp8Recipe) -> None:
    x_RK = torch.randn(5, 200, generator=torch.Generator().manual_seed(2)).bfloat16()
    got_RK = quantise_dequantise(x_RK, recipe=recipe, operand="input")
    assert got_RK.dtype == torch.float32
    assert torch.equal(got_RK, quantise_dequantise(x_RK.float(), recipe=recipe, operand="input"))


def test_block_amax_of_uneven_shapes() -> None:
    x_RK = torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    got_RK = block_amax(x_RK, 2, 3)
    for row in range(5):
        for column in range(7):
            top, left = row // 2 * 2, column // 3 * 3
            assert got_RK[row, column] == x_RK[top : top + 2, left : left + 3].abs().max()
