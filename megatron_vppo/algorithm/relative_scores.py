"""Scores of tokens in relation to the others of their response.

Shape suffix legend: B = responses; T = response tokens, right-padded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_in_response(score_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Maps the scores of each response linearly to [0, 1]: [B, T] float64; 0.0 where all are equal or where padded."""
    valid_BT, score_BT = mask_BT.bool(), score_BT.double()
    low_B1 = score_BT.masked_fill(~valid_BT, torch.inf).amin(1, keepdim=True)
    spread_B1 = score_BT.masked_fill(~valid_BT, -torch.inf).amax(1, keepdim=True) - low_B1
    relative_BT = (score_BT - low_B1) / torch.where(spread_B1 > 0, spread_B1, 1.0)
    return torch.where(valid_BT & (spread_B1 > 0), relative_BT, 0.0)
