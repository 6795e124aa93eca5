"""Multimodal rotary positions: three coordinates per token, explicit angles for packed sequences.

Shape suffix legend: T = tokens; F = rotary frequencies (half the head's values); D = values per head (2 F).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mrope_positions(
    token_ids: Sequence[int] | Tensor,
    grids_thw: Sequence[tuple[int, int, int]],
    *,
    image_token_id: int,
    merge_size: int,
) -> Tensor:
    """(frame, row, column) of every token of one sequence; int64 [3, T].

    Text counts on along all three. The tokens of an image lie on its merged grid, from the position where it starts;
    what follows starts after the larger of its sides.

    Args:
        token_ids: with one image token per merged patch.
        grids_thw: per image, in order: (frames, rows, columns) in patches, before the merge.

    Raises:
        ValueError: the number of image tokens is not that of the grids.
    """
    tokens_T = torch.as_tensor(token_ids, dtype=torch.int64)
    is_image_T = (tokens_T == image_token_id).tolist()
    merged = [(t, h // merge_size, w // merge_size) for t, h, w in grids_thw]
    expected = sum(t * h * w for t, h, w in merged)
    if sum(is_image_T) != expected:
        raise ValueError(
            f"the sequence has {sum(is_image_T)} image tokens, its {len(merged)} image grids {list(grids_thw)} need "
            f"{expected} (merge size {merge_size})"
        )
    blocks: list[Tensor] = []
    index, position = 0, 0
    for t, h, w in merged:
        start = is_image_T.index(True, index)
        blocks.append(_text_block(position, start - index))
        position += start - index
        if not all(is_image_T[start : start + t * h * w]):
            raise ValueError(f"image tokens from {start} on are interrupted before the {t * h * w} of grid {(t, h, w)}")
        frame, row, column = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        blocks.append(position + torch.stack([frame.flatten(), row.flatten(), column.flatten()]))
        position += max(h, w)
        index = start + t * h * w
    blocks.append(_text_block(position, len(is_image_T) - index))
    return torch.cat(blocks, dim=1)


def _text_block(position: int, length: int) -> Tensor:
    return torch.arange(position, position + length).expand(3, length)


class MRope(nn.Module):
    """Angles of the language model: which of the three coordinates each frequency turns with.

    In consecutive sections (Qwen2.5-VL), or interleaved (Qwen3-VL): row and column take every third frequency, from the
    second and third on, as many as their section has; all others are the frame's.
    """

    frequency_F: Tensor
    coordinate_F: Tensor

    def __init__(self, *, head_dim: int, theta: float, sections: Sequence[int], interleaved: bool) -> None:
        super().__init__()
        if sum(sections) != head_dim // 2 or len(sections) != 3:
            raise ValueError(f"mrope_section {list(sections)} must have 3 entries that sum to {head_dim // 2}")
        frequency_F = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        if interleaved:
            coordinate_F = torch.zeros(head_dim // 2, dtype=torch.int64)
            for coordinate in (1, 2):
                coordinate_F[coordinate : 3 * sections[coordinate] : 3] = coordinate
        else:
            coordinate_F = torch.repeat_interleave(
                torch.arange(3), torch.tensor(list(sections)), output_size=head_dim // 2
            )
        self.register_buffer("frequency_F", frequency_F, persistent=False)
        self.register_buffer("coordinate_F", coordinate_F, persistent=False)

    def forward(self, positions_3T: Tensor) -> Tensor:
        """fp32 radians [T, 1, 1, D], both halves of D alike."""
        angles_TF = positions_3T.to(torch.float32)[self.coordinate_F].T * self.frequency_F
        return torch.cat([angles_TF, angles_TF], dim=-1)[:, None, None, :]
