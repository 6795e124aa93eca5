"""Widths that are rounded up with zeros, so that matrix products are fast (docs/adr/0024-padded-widths.md)."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH_MULTIPLE = 8
"""The multiple to which padded widths are rounded up. 8 values in bfloat16 are the 16 bytes by which tensor cores read
the rows of a matrix; libraries of matrix products take slower kernels for rows of other lengths."""


def padded_share(width: int, size: int) -> int:
    """Returns each rank's share of a width, rounded up to WIDTH_MULTIPLE; `size` divides the width."""
    return width // size + share_padding(width, size)


def share_padding(width: int, size: int) -> int:
    """Returns the rows or columns of zeros that this adds."""
    return -(width // size) % WIDTH_MULTIPLE


def pad_end(tensor: Tensor, zeros: int, *, dim: int) -> Tensor:
    """Appends rows or columns of zeros along `dim`; returns the tensor itself if there are none."""
    if not zeros:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(*tensor.shape[:dim], zeros, *tensor.shape[dim + 1 :])], dim=dim)
