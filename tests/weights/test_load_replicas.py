"""Replicas of a model get the weights from the one of them that reads the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vppo.models.build import build_model
from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.models.read_config import read_hf_config
from megatron_vppo.parallel.layout import Layout, init_layout
from megatron_vppo.weights.hf_folder import FileTensor
from megatron_vppo.weights.load import load_weights
from megatron_vppo.weights.load_hf import load_hf_weights
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config

pytestmark = pytest.mark.distributed


def build(folder: Path, layout: Layout, dtype: torch.dtype) -> QwenVLModel:
    return build_model(
        read_hf_config(folder), groups=layout.groups, vision_groups=layout.vision_groups, dtype=dtype,
        device=layout.device,
    )  # fmt: skip


def _load(rank: int, world_size: int, folder: str) -> tuple[int, list[bool]]:
    """Bytes that this rank reads, and whether each parameter is what reading gives, in two dtypes."""
    layout = init_layout(tensor=1, pipeline=1, timeout_seconds=60)
    read = 0
    real = FileTensor._read_rows

    def counted(self: FileTensor, low: int, high: int) -> torch.Tensor:
        nonlocal read
        block = real(self, low, high)
        read += block.nbytes
        return block

    equal = []
    FileTensor._read_rows = counted  # type: ignore[method-assign]
    for dtype in (torch.float32, torch.bfloat16):
        ours = build(Path(folder), layout, dtype)
        load_weights(ours, folder, replicas=layout.groups.dp_cp)
        during = read
        expected = build(Path(folder), layout, dtype)
        load_hf_weights(expected, folder)
        read = during
        equal += [torch.equal(a, b) for a, b in zip(ours.parameters(), expected.parameters(), strict=True)]
    return read, equal


def test_one_replica_reads_for_all(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, tiny_config(tied=False, vocab=299))
    results = run_gloo(_load, 2, str(tmp_path))
    assert all(all(equal) and len(equal) > 20 for _, equal in results)
    read = [bytes_read for bytes_read, _ in results]
    size = (tmp_path / "model.safetensors").stat().st_size
    assert read[1] == 0 and read[0] > size, "once for each of the two models"


def _refuse(rank: int, world_size: int, folder: str) -> str:
    layout = init_layout(tensor=1, pipeline=1, timeout_seconds=60)
    model = build(Path(folder), layout, torch.float32)
    with pytest.raises(ValueError) as refused:
        load_weights(model, folder, replicas=layout.groups.dp_cp)
    return str(refused.value)


def test_what_the_reader_cannot_read_ends_every_replica(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, tiny_config(tied=False, vocab=299))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    first, second = run_gloo(_refuse, 2, str(tmp_path))
    assert first == second and "download it again" in first
