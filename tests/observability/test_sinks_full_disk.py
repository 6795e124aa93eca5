"""A disk that becomes full, or read-only, below a run: the error names the file, whichever writer meets it first."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.observability.rollouts import write_rollouts
from megatron_vppo.observability.sinks import JsonLinesSink, TensorBoardSink

LINE = {f"name_{number}": 0.1 for number in range(100)}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB of its own."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk needs root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def fill(disk: Path) -> None:
    with pytest.raises(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def test_metrics(disk: Path) -> None:
    sink = JsonLinesSink(disk, resume_step=None)
    sink.write(1, 0.0, LINE)
    fill(disk)
    with pytest.raises(OSError) as error:
        for step in range(2, 10):
            sink.write(step, 0.0, LINE)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(disk / "metrics.jsonl"))
    with pytest.raises(OSError) as error:
        sink.close()
    assert error.value.filename == str(disk / "metrics.jsonl")
    (disk / "filler").unlink()
    again = JsonLinesSink(disk, resume_step=1)
    again.write(2, 0.0, LINE)
    again.close()
    lines = (disk / "metrics.jsonl").read_text().splitlines()
    assert [line[:10] for line in lines] == ['{"step": 1', '{"step": 2'], "what was written by half is gone"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_tensorboard(disk: Path) -> None:
    sink = TensorBoardSink(disk, resume_step=None)
    fill(disk)
    with pytest.raises(OSError) as error:
        for step in range(1, 10):
            sink.write(step, 0.0, LINE)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(disk / "tensorboard"))
    with pytest.raises(OSError, match=str(disk)):
        sink.close()


def test_rollouts(disk: Path) -> None:
    fill(disk)
    record: Any = {"response": "x"}
    with pytest.raises(OSError) as error:
        write_rollouts(disk, 3, [record])
    assert error.value.filename == str(disk / "rollouts" / "step_3.jsonl.zst")


def test_a_disk_that_is_read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for begin in (JsonLinesSink, TensorBoardSink):
        with pytest.raises(OSError) as error:
            begin(disk, resume_step=None)
        assert error.value.errno == errno.EROFS and str(error.value.filename).startswith(str(disk))
