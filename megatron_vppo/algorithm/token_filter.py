"""Token gradient filtering (paper Eq. 4): the tokens of a response that depend most on the image carry the gradient.

Shape suffix legend: B = responses; T = response tokens, right-padded.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor


def kept_counts(length_B: Tensor, *, keep_fraction: float, integer_ceil: bool) -> Tensor:
    """Counts the tokens that each response keeps: ceil(keep_fraction * length).

    Args:
        length_B: [B] int64, response tokens.
        keep_fraction: in (0, 1].
        integer_ceil: exact; keep_fraction is read as the decimal number that was written. False: the authors' float32
            product, which is one off for 677 of the first 8192 lengths at 0.6.

    Returns:
        [B] int64.
    """
    if not 0 < keep_fraction <= 1:
        raise ValueError(f"keep_fraction is {keep_fraction}; set it in (0, 1]")
    if not integer_ceil:
        return torch.ceil(length_B.to(torch.float32) * keep_fraction).to(torch.int64)
    exact = Fraction(str(keep_fraction))
    # Python integers: the numerator of a fraction such as 0.1 + 0.2 overflows int64.
    counts = [-(-length * exact.numerator // exact.denominator) for length in length_B.tolist()]
    return torch.tensor(counts, dtype=torch.int64, device=length_B.device)


def top_token_mask(
    dependency_BT: Tensor, mask_BT: Tensor, *, keep_fraction: float, stable: bool, integer_ceil: bool
) -> Tensor:
    """Marks, in each response, the ceil(keep_fraction * length) tokens of largest dependency.

    Args:
        dependency_BT: [B, T] nats; the padding may hold anything.
        mask_BT: [B, T], 1 on response tokens.
        stable: among equal dependencies the earlier token ranks first. False: the authors' unstable sort, whose
            choice among equals is unspecified.
        integer_ceil: see kept_counts.

    Returns:
        [B, T] float32, 1.0 where kept, 0.0 elsewhere and in the padding.
    """
    valid_BT = mask_BT.bool()
    count_B = kept_counts(valid_BT.sum(1), keep_fraction=keep_fraction, integer_ceil=integer_ceil)
    order_BT = dependency_BT.masked_fill(~valid_BT, float("-inf")).argsort(dim=1, descending=True, stable=stable)
    first_BT = torch.arange(dependency_BT.shape[1], device=dependency_BT.device)[None, :] < count_B[:, None]
    kept_BT = torch.zeros_like(valid_BT).scatter(1, order_BT, first_BT)
    return (kept_BT & valid_BT).to(torch.float32)
