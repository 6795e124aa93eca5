"""The folder that a run exports: written by one rank, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_vppo.weights.stream import save_hf


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("the weights that training started from")
    return folder


def weights(*, value: float, ends: bool = False) -> Iterator[tuple[str, Tensor]]:
    for name in "abc":
        yield name, torch.full((3,), value, dtype=torch.float32)
    if ends:
        raise RuntimeError("another rank is gone")


def test_files_of_the_size_asked_for_and_their_index(source: Path, tmp_path: Path) -> None:
    save_hf(weights(value=1), tmp_path / "out", source=source, is_writer=True, shard_bytes=24)
    names = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, "model.safetensors.index.json"]
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 36},
        "weight_map": {"a": names[1], "b": names[1], "c": names[2]},
    }
    assert load_file(tmp_path / "out" / names[2])["c"].tolist() == [1, 1, 1]


def test_an_export_that_fails_leaves_the_older_one(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    save_hf(weights(value=1), target, source=source, is_writer=True)
    with pytest.raises(RuntimeError, match="another rank is gone"):
        save_hf(weights(value=2, ends=True), target, source=source, is_writer=True, shard_bytes=12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert {path.name for path in target.iterdir()} == {"config.json", "model.safetensors"}
    assert load_file(target / "model.safetensors")["a"].tolist() == [1, 1, 1]
    save_hf(weights(value=3), target, source=source, is_writer=True)
    assert load_file(target / "model.safetensors")["a"].tolist() == [3, 3, 3]


def test_a_rank_that_does_not_write_iterates_all_of_it(source: Path, tmp_path: Path) -> None:
    stream = weights(value=1)
    save_hf(stream, tmp_path / "out", source=source, is_writer=False)
    assert next(stream, None) is None
    assert not (tmp_path / "out").exists()
