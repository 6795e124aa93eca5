"""The bytes of a checkpoint against one that is written, and a disk that is too small for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.models.read_config import read_hf_config
from megatron_vppo.setup import disk_space
from megatron_vppo.setup.disk_space import check_disk, checkpoint_bytes
from megatron_vppo.weights.hf_folder import read_header
from tests.models.whole import save_whole_folder


def config_of(folder: Path, **model: object) -> RunConfig:
    sections = {"data": {"train_files": "x"}, "trainer": {"runs_dir": str(folder / "runs")}}
    return RunConfig.model_validate({**sections, "model": {"path": str(folder / "model"), **model}})


def test_bytes_by_the_stored_weights(tmp_path: Path) -> None:
    save_whole_folder(tmp_path / "model")
    tensors = read_header(tmp_path / "model" / "model.safetensors")
    values = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in tensors)
    vision = sum(t.nbytes // t.dtype.itemsize for t in tensors if "visual" in t.name and "merger" not in t.name)
    assert 0 < vision < values
    hf_config = read_hf_config(tmp_path / "model")
    assert checkpoint_bytes(config_of(tmp_path, dtype="bfloat16"), hf_config) == 14 * values
    assert checkpoint_bytes(config_of(tmp_path, dtype="float32"), hf_config) == 12 * values
    frozen = config_of(tmp_path, dtype="bfloat16", freeze=["vision_tower"])
    assert checkpoint_bytes(frozen, hf_config) == 14 * (values - vision) + 2 * vision


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_whole_folder(tmp_path / "model")
    hf_config, config = read_hf_config(tmp_path / "model"), config_of(tmp_path, dtype="float32")
    needed = checkpoint_bytes(config, hf_config) + (64 << 20)
    monkeypatch.setattr(disk_space, "_free_bytes", lambda folder: needed)
    check_disk(config, hf_config)
    monkeypatch.setattr(disk_space, "_free_bytes", lambda folder: needed - 1)
    with pytest.raises(ValueError, match=rf"{tmp_path}/runs/.*: a checkpoint needs {needed / 1e9:.2f} GB, .* are free"):
        check_disk(config, hf_config)
