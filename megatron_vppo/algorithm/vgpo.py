"""VGPO (arXiv 2604.09349): weights of tokens and scales of responses from their attention to the image.

A score of each token says how much it has to do with the image; VGPO's own is `dependency: visual_focus`. The equations
are numbered as the method's published code numbers them. docs/algorithm.md says where it differs.

Shape suffix legend: B = responses; T = response tokens, right-padded.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from megatron_vppo.algorithm.relative_scores import relative_in_response

LEAST_TOKEN_WEIGHT = 0.1
LEAST_SCALE = 0.9
"""Bounds of the published code; the largest weights and scales lie below its upper bound of 2 in any case."""


def visual_accumulation(score_BT: Tensor, mask_BT: Tensor, *, strength: float, tail: float, top: float) -> Tensor:
    """Raises the scores of a response's last tokens (Eq. 5, 6) and maps them to [0, 1] in the response (Eq. 7).

    Token t of n in the last part of a response (from floor((1 - tail) n) on) is raised if it is among the share `top`
    of that part with the largest scores: to score (1 + strength t / n), with t from 1 to n. Of k tokens of the part
    max(1, floor(top k)) are raised, and those that equal the smallest of them.

    Args:
        score_BT: [B, T], not negative.
        mask_BT: [B, T], 1 on response tokens, which come first.
        strength: at least 0.
        tail, top: in (0, 1]; read as the decimal numbers that they were written as.

    Returns:
        [B, T] float64; 0.0 where padded.
    """
    raised_BT = score_BT.double().clone()
    for score_T, count in zip(raised_BT, mask_BT.sum(1).long().tolist(), strict=True):
        first = int((1 - Fraction(str(tail))) * count)
        if first == count:
            continue
        part_T = score_T[first:count]
        smallest = part_T.sort(descending=True).values[max(1, int(Fraction(str(top)) * len(part_T))) - 1]
        place_T = torch.arange(first + 1, count + 1, device=score_T.device, dtype=score_T.dtype) / count
        part_T *= 1.0 + torch.where(part_T >= smallest, strength * place_T, 0.0)
    return relative_in_response(raised_BT, mask_BT)


def vgpo_token_weights(accumulation_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Computes the weight of each token, 1 + its value - the mean of its response (Eq. 8), and no less than 0.1.

    Args:
        accumulation_BT: [B, T], of visual_accumulation.

    Returns:
        [B, T] float32; 0.0 where padded.
    """
    mean_B1 = accumulation_BT.sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)
    weight_BT = (1.0 + accumulation_BT - mean_B1).clamp(min=LEAST_TOKEN_WEIGHT)
    return torch.where(mask_BT.bool(), weight_BT, 0.0).float()


def vgpo_scales(accumulation_BT: Tensor, counted_B: Tensor, group_B: Tensor) -> Tensor:
    """Computes the scale of each response's advantage, among the responses to its prompt (Eq. 9 to 11).

    The sum over a response, from 0 for the smallest of its group to 1 for the largest, less the mean of that over the
    group, plus 1, and no less than 0.9. Where all sums are equal the scales are one.

    Args:
        accumulation_BT: [B, T], of visual_accumulation.
        counted_B: [B] bool; the others get scale one and enter no statistic.
        group_B: [B] int64; equal numbers mark the responses to one prompt.

    Returns:
        [B] float32.
    """
    sum_B, scale_B = accumulation_BT.sum(1), torch.ones_like(accumulation_BT[:, 0])
    for group in sorted(set(group_B.tolist())):
        rows_B = counted_B & (group_B == group)
        if bool(rows_B.any()):
            sums = sum_B[rows_B]
            relative = relative_in_response(sums[None], torch.ones_like(sums[None]))[0]
            scale_B[rows_B] = (1.0 + relative - relative.mean()).clamp(min=LEAST_SCALE)
    return scale_B.float()
