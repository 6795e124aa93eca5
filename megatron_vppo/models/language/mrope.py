"""Multimodal rotary positions (M-RoPE): three coordinates per token, explicit angles for packed sequences.

Shape suffix legend: L = tokens of one packed sequence; C = tokens of this context-parallel rank; F = rotary angles of a
token, one per frequency (half of the head's values); E = values per attention head (2 F).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_vppo.models.family import PositionFn
from megatron_vppo.models.hf_config import HfConfig, head_dim


def mrope_position_fn(hf_config: HfConfig) -> PositionFn:
    """Binds `mrope_positions` to the sizes and the image token of a model's configuration."""
    merge_size = hf_config.vision_config.spatial_merge_size
    return partial(mrope_positions, image_token_id=hf_config.image_token_id, merge_size=merge_size)


def mrope_positions(
    token_ids: Sequence[int],
    grids_thw: Sequence[tuple[int, int, int]],
    *,
    image_token_id: int,
    merge_size: int,
) -> Tensor:
    """Returns (frame, row, column) of every token of one sequence; int64 [3, L].

    Text counts on along all three. The tokens of an image lie on its merged grid, from the position where it starts.
    What follows starts after the larger of the grid's sides. Two words, an image of 2 x 3 merged features, two words:

        tokens    a  b  i  i  i  i  i  i  c  d
        frame     0  1  2  2  2  2  2  2  5  6
        row       0  1  2  2  2  3  3  3  5  6
        column    0  1  2  3  4  2  3  4  5  6

    Args:
        token_ids: with one image token per merged feature.
        grids_thw: (frames, rows, columns) of each image in order, in patches, before they are merged.

    Raises:
        ValueError: the number of image tokens is not that of the grids.
    """
    is_image_L = np.asarray(token_ids) == image_token_id
    merged = [(t, h // merge_size, w // merge_size) for t, h, w in grids_thw]
    found, expected = int(is_image_L.sum()), sum(t * h * w for t, h, w in merged)
    if found != expected:
        raise ValueError(
            f"the sequence has {found} image tokens, its {len(merged)} image grids {list(grids_thw)} need {expected} "
            f"(merge size {merge_size})"
        )
    positions_3L = np.empty((3, len(is_image_L)), dtype=np.int64)
    index, position = 0, 0  # of the next token; of the next text token's rotary position
    for t, h, w in merged:
        start = index + int(is_image_L[index:].argmax())  # the next image token
        end = start + t * h * w
        if not is_image_L[start:end].all():
            raise ValueError(f"image tokens from {start} on are interrupted before the {t * h * w} of grid {(t, h, w)}")
        positions_3L[:, index:start] = np.arange(position, position + start - index)
        position += start - index
        positions_3L[:, start:end] = position + np.indices((t, h, w)).reshape(3, -1)
        position += max(h, w)
        index = end
    positions_3L[:, index:] = np.arange(position, position + len(is_image_L) - index)
    return torch.from_numpy(positions_3L)


def sectioned_mrope(text: Any) -> MRope:
    """Arranges angles as Qwen2.5-VL does: the first frequencies are the frame's, then the row's, then the column's.

    Args:
        text: the text configuration.
    """
    sections = _sections(text)
    coordinate_F = torch.repeat_interleave(torch.arange(3), torch.tensor(sections), output_size=sum(sections))
    return MRope(text, coordinate_F)


def interleaved_mrope(text: Any) -> MRope:
    """Arranges angles as Qwen3-VL does: row and column take every third frequency, from the second and the third on, as
    many as their sections have.

    All others are the frame's. Sections (4, 2, 2) give

        frame row column frame row column frame frame

    Args:
        text: the text configuration.
    """
    sections = _sections(text)
    coordinate_F = torch.zeros(sum(sections), dtype=torch.int64)
    for coordinate in (1, 2):
        coordinate_F[coordinate : 3 * sections[coordinate] : 3] = coordinate
    return MRope(text, coordinate_F)


def _sections(text: Any) -> list[int]:
    sections, frequencies = list(text.rope_parameters["mrope_section"]), head_dim(text) // 2
    if sum(sections) != frequencies or len(sections) != 3:
        raise ValueError(f"mrope_section {sections} must have 3 entries that sum to {frequencies}")
    return sections


class MRope(nn.Module):
    """The language model's rotary angles: each frequency turns with one of the three coordinates."""

    frequency_F: Tensor
    coordinate_F: Tensor

    def __init__(self, text: Any, coordinate_F: Tensor) -> None:
        """
        Args:
            text: the text configuration.
            coordinate_F: int64; 0, 1 or 2 for the frame, the row or the column.
        """
        super().__init__()
        values, theta = head_dim(text), text.rope_parameters["rope_theta"]
        frequency_F = 1.0 / (theta ** (torch.arange(0, values, 2, dtype=torch.float32) / values))
        self.register_buffer("frequency_F", frequency_F, persistent=False)
        self.register_buffer("coordinate_F", coordinate_F, persistent=False)

    def forward(self, positions_3C: Tensor) -> Tensor:
        """Returns fp32 radians [C, 1, 1, E]; both halves of E are alike."""
        # Indexing by coordinate makes [3, C] into [F, C]: row f holds the coordinate that frequency f turns with.
        angles_CF = positions_3C.to(torch.float32)[self.coordinate_F].T * self.frequency_F
        return torch.cat([angles_CF, angles_CF], dim=-1)[:, None, None, :]
