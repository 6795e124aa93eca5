"""The devices and micro-batches that the authors' code would split rows into.

Shape suffix legend: B = responses.
"""

from __future__ import annotations

import torch
from torch import Tensor


def emulated_split(num_rows: int, *, devices: int, micro_batch_size: int) -> tuple[Tensor, Tensor]:
    """Numbers the device and the micro-batch of each row of a mini-batch, for the authors' shaping scopes.

    Rows stay in the given order. Each device takes a contiguous block; if the rows do not divide evenly, block sizes
    differ by at most one. Within a device each micro-batch takes micro_batch_size rows, and the last one what is left.
    The authors first balance rows over devices by length. That is not reproduced: a device gets as many rows as theirs,
    but not the same ones.

    Returns:
        device_B, micro_batch_B: [B] int64; micro-batch numbers are unique over devices.
    """
    if devices < 1 or micro_batch_size < 1:
        raise ValueError(f"devices is {devices} and micro_batch_size {micro_batch_size}; set both to at least 1")
    row_B = torch.arange(num_rows)
    device_B = row_B * devices // num_rows
    first_row_B = -(-device_B * num_rows // devices)
    return device_B, device_B * num_rows + (row_B - first_row_B) // micro_batch_size
