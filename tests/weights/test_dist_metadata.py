"""Whatever happened to the description of a checkpoint: it is refused with its name, or it is read."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from megatron_vppo.weights.dist_metadata import DamagedCheckpoint, place_of, read_metadata

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # it is not needed here
FLIPS = 1500


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tensors and an object, written by torch's own means."""
    folder = tmp_path_factory.mktemp("stored") / "dist_ckpt"
    tensors = {"a.weight": torch.zeros(4, 6), "b.weight": torch.ones(3), "rng/shard_0_1": [1, 2]}
    save(tensors, storage_writer=FileSystemWriter(folder), no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


def test_a_region_is_named_with_its_file(stored: Path) -> None:
    metadata = read_metadata(stored)
    assert place_of(stored, metadata, "a.weight", (1, 0), (1, 6), stacked=0) == f"a.weight in {stored}/__0_0.distcp"
    layer = place_of(stored, metadata, "a.weight", (1, 0), (1, 6), stacked=1)
    assert layer == f"a.weight (layer 1) in {stored}/__0_0.distcp"


def test_a_byte_anywhere_in_the_description(stored: Path, tmp_path: Path) -> None:
    """Some flips leave a description that is as good as the first, with another key or another number in it."""
    folder = shutil.copytree(stored, tmp_path / "dist_ckpt")
    path, draw = folder / ".metadata", random.Random(1)
    data = path.read_bytes()
    refused = 0
    for _ in range(FLIPS):
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(flipped)
        try:
            read_metadata(folder)
        except DamagedCheckpoint as error:
            refused += 1
            assert str(folder) in str(error) and "\n" not in str(error)
    assert refused > FLIPS / 3
