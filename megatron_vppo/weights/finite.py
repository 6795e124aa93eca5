"""The refusal of weights that are no numbers: one of them makes every log-prob NaN, far from where it came from."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor


def check_finite(values: Tensor, *, name: str, where: Path) -> None:
    """Checks that a tensor of weights, read from the file or folder `where`, holds neither NaN nor infinity.

    One pass at the speed of memory: aminmax hands on a NaN, and needs no memory of its own as isfinite does.

    Raises:
        ValueError: it does.
    """
    if values.numel() == 0:
        return
    least, largest = (float(value) for value in torch.aminmax(values))
    if not (math.isfinite(least) and math.isfinite(largest)):
        kind = "NaN" if math.isnan(least) else "an infinite value"
        raise ValueError(f"{name} in {where} holds {kind}; take a checkpoint whose weights are numbers")


def cast_weights(values: Tensor, dtype: torch.dtype, *, name: str) -> Tensor:
    """Casts finite weights. Raises ValueError where one is beyond the range of the dtype, as above 65504 in float16."""
    cast = values.to(dtype)
    if dtype == torch.float16 and values.dtype != dtype and values.numel():
        least, largest = (float(value) for value in torch.aminmax(cast))
        if not (math.isfinite(least) and math.isfinite(largest)):
            raise ValueError(f"{name} has values beyond the range of float16; convert to bfloat16 or float32")
    return cast
