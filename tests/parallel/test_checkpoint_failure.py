"""A checkpoint for which the disk has no room, or whose writers fail: every rank says so, and the older one stays."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_vppo.parallel.checkpoint_failure import naming_failed_writes
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config
from tests.parallel.test_checkpoint import make_ranks, save

MEBIBYTE = 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _no_room_for_a_second(rank: int, world: int, model: Path, folder: Path) -> str:
    layout, policy = make_ranks(model)
    save(folder, layout, policy, step=1, state="old")
    if rank == 0:
        free, size = shutil.disk_usage(folder).free, shutil.disk_usage(folder).used
        (folder / "filler").write_bytes(bytes(free - size // 3))
    dist.barrier()
    with pytest.raises(ValueError) as error:
        save(folder, layout, policy, step=2, state="new")
    return str(error.value)


@pytest.mark.extended
@pytest.mark.distributed
def test_a_disk_without_room(disk: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", tiny_config(tied=False, vocab=61))
    for message in run_gloo(_no_room_for_a_second, 2, tmp_path / "model", disk):
        assert message.startswith(f"{disk}/global_step_2: No space left on device; 0.0")
        assert f" GB are free in {disk}. Make room and start again: the run goes on from the checkpoint" in message
    assert sorted(path.name for path in disk.glob("*global_step*")) == ["global_step_1"]


def _writer_fails(rank: int, world: int, reason: str) -> str:
    failures: Any = {1: (RuntimeError(reason), None)} if rank == 1 else {}
    try:
        with naming_failed_writes(Path("/runs/global_step_3")):
            raise CheckpointException("", failures)
    except RuntimeError as error:
        return str(error)


@pytest.mark.distributed
def test_another_failure_is_told_by_every_rank() -> None:
    expected = "/runs/global_step_3 could not be written: rank 1: Worker failure: Input/output error"
    assert run_gloo(_writer_fails, 2, "Worker failure: Input/output error") == [expected] * 2
