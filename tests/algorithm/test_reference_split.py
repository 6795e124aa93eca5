"""The authors' split of rows into devices and micro-batches, by hand."""

from __future__ import annotations

import pytest

from megatron_vppo.algorithm.reference_split import emulated_split


@pytest.mark.parametrize(
    ("rows", "devices", "size", "device_B", "micro_B"),
    [
        (8, 2, 2, [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 8, 8, 9, 9]),
        (8, 1, 3, [0] * 8, [0, 0, 0, 1, 1, 1, 2, 2]),
        (7, 2, 2, [0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 7, 7, 8]),
        (3, 5, 4, [0, 1, 3], [0, 3, 9]),
    ],
)
def test_emulated_split(rows: int, devices: int, size: int, device_B: list[int], micro_B: list[int]) -> None:
    actual_device_B, actual_micro_B = emulated_split(rows, devices=devices, micro_batch_size=size)
    assert actual_device_B.tolist() == device_B
    assert actual_micro_B.tolist() == micro_B


def test_emulated_split_refuses_nothing_to_split_into() -> None:
    with pytest.raises(ValueError, match="devices is 0"):
        emulated_split(4, devices=0, micro_batch_size=1)
    with pytest.raises(ValueError, match="micro_batch_size 0"):
        emulated_split(4, devices=1, micro_batch_size=0)
