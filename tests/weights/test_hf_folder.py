"""A tensor in a safetensors file by rows, against the library's own reader and writer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vppo.weights.hf_folder import FileTensor, read_header

VALUES = torch.arange(30.0).reshape(10, 3)


@pytest.fixture
def tensor(tmp_path: Path) -> FileTensor:
    save_file({"first": torch.ones(7), "x": VALUES, "last": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "file")
    return next(tensor for tensor in read_header(tmp_path / "file") if tensor.name == "x")


def test_rows_and_columns_are_read(tensor: FileTensor) -> None:
    assert torch.equal(tensor[:], VALUES)
    assert torch.equal(tensor[4:6], VALUES[4:6])
    assert torch.equal(tensor[:, 1:3], VALUES[:, 1:3])
    assert tensor[6:6].shape == tensor[10:10].shape == (0, 3)


def test_rows_are_written_in_the_dtype_of_the_file(tensor: FileTensor) -> None:
    before = load_file(tensor.path)
    tensor.write_rows(8, torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int64))
    tensor.write_rows(0, -VALUES[:1])
    after = load_file(tensor.path)
    assert after["x"].tolist() == [[0, -1, -2], *VALUES[1:8].tolist(), [1, 2, 3], [4, 5, 6]]
    assert torch.equal(after["first"], before["first"]) and torch.equal(after["last"], before["last"])


@pytest.mark.parametrize(
    ("num_bytes", "low", "high", "expected"),
    [
        (1, 7, None, [(7, 8), (8, 9), (9, 10)]),
        (35, 0, 5, [(0, 2), (2, 4), (4, 5)]),
        (36, 0, 5, [(0, 3), (3, 5)]),
        (10**9, 2, 9, [(2, 9)]),
        (10**9, 3, 3, []),
    ],
)
def test_ranges_of_rows(
    num_bytes: int, low: int, high: int | None, expected: list[tuple[int, int]], tensor: FileTensor
) -> None:
    """A row has 12 bytes."""
    assert list(tensor.row_ranges(num_bytes, low, high)) == expected
