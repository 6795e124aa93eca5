"""The refusal of weights that are no numbers: one of them makes every log-prob NaN, far from where it came from."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor


def non_finite(values: Tensor) -> str | None:
    """Returns 'NaN' or 'infinity' if a floating-point tensor holds one, else None.

    `aminmax` goes through the values once and makes no copy of them: NaN comes out as both bounds. `isfinite` would
    take several times the tensor's memory, and on a CPU 30 times as long.
    """
    if values.numel() == 0:
        return None
    low, high = (float(bound) for bound in values.detach().aminmax())
    if math.isnan(low):
        return "NaN"
    return "infinity" if math.inf in (-low, high) else None


def check_finite(values: Tensor, *, name: str, where: Path) -> None:
    """Raises ValueError if a tensor of weights, read from the file or folder `where`, holds NaN or infinity."""
    if found := non_finite(values):
        raise ValueError(f"{name} in {where} holds {found}; take a checkpoint whose weights are numbers")


def cast_weights(values: Tensor, dtype: torch.dtype, *, name: str) -> Tensor:
    """Casts finite weights. Raises ValueError where one is beyond the range of the dtype, as above 65504 in float16."""
    cast = values.to(dtype)
    if dtype == torch.float16 and values.dtype != dtype and non_finite(cast):
        raise ValueError(f"{name} has values beyond the range of float16; convert to bfloat16 or float32")
    return cast
