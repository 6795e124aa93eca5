"""Ragged rows to right-padded tensors.

Shape suffix legend: B = responses, or other ragged rows; T = response tokens, right-padded.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor


def length_mask(lengths: Sequence[int], *, width: int | None = None) -> Tensor:
    """Returns a float32 mask [B, T]: 1.0 at the first lengths[b] positions of row b, else 0.0.

    T is width or the longest.
    """
    width = _checked_width(lengths, width)
    return (torch.arange(width)[None, :] < torch.tensor(lengths, dtype=torch.int64)[:, None]).to(torch.float32)


def pad_rows(
    rows: Sequence[Sequence[float]], *, dtype: torch.dtype, width: int | None = None, fill: float = 0.0
) -> Tensor:
    """Makes one tensor of the rows [B, T]: each row at the left, `fill` behind it. T is width or the longest row.

    Raises:
        ValueError: a row is longer than width.
    """
    lengths = [len(row) for row in rows]
    width = _checked_width(lengths, width)
    padded_BT = torch.full((len(rows), width), fill, dtype=dtype)
    flat = array("d")
    for row in rows:
        flat.extend(row)
    if flat:
        padded_BT[length_mask(lengths, width=width).bool()] = torch.frombuffer(flat, dtype=torch.float64).to(dtype)
    return padded_BT


def _checked_width(lengths: Sequence[int], width: int | None) -> int:
    longest = max(lengths, default=0)
    if width is None:
        return longest
    if longest > width:
        raise ValueError(f"the longest of {len(lengths)} rows has {longest} entries, more than the width of {width}")
    return width
