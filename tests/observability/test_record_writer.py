"""The process that writes records: while the caller goes on, in order, and with every end of either side."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vppo.observability.record_writer import RecordWriter
from megatron_vppo.observability.rollouts import cut_rollouts_after, read_rollouts, rollout_path, rollout_steps
from megatron_vppo.observability.step_records import StepRecords
from megatron_vppo.system.processes import child_environment

ROWS = 30
pytestmark = pytest.mark.distributed


def step_records(name: str, *, tokens: int = 3) -> StepRecords:
    count = ROWS * tokens
    return StepRecords(
        heads=[{"split": name, "row": row, "response": "x"} for row in range(ROWS)],
        lengths=[tokens] * ROWS,
        token_texts={4: "four"},
        token_ids_N=np.full(count, 4, np.int32),
        floats_N={"old_logps": -np.random.default_rng(0).random(count)},
        kept_N=np.ones(count, np.int8),
    )


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[RecordWriter]:
    ours = RecordWriter(tmp_path)
    yield ours
    ours.close()


def test_steps_are_written_one_after_the_other(tmp_path: Path, writer: RecordWriter) -> None:
    for step in (1, 2, 3):
        writer.write(step, step_records(f"split {step}"))
        assert rollout_steps(tmp_path)[: step - 1] == list(range(1, step)), "the step before is whole"
    writer.wait()
    writer.wait()
    for step in (1, 2, 3):
        found = [(record["split"], record["row"]) for record in read_rollouts(rollout_path(tmp_path, step))]
        assert found == [(f"split {step}", row) for row in range(ROWS)]


def test_the_caller_goes_on_while_a_step_is_written(tmp_path: Path, writer: RecordWriter) -> None:
    writer.write(1, step_records("a"))
    writer.wait()  # it has started
    os.kill(writer.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        writer.write(2, step_records("b"))  # fits the pipe
        assert time.monotonic() - began < 5 and rollout_steps(tmp_path) == [1]
    finally:
        os.kill(writer.pid, signal.SIGCONT)
    writer.wait()
    assert rollout_steps(tmp_path) == [1, 2]


def test_close_waits(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path)
    writer.write(1, step_records("a", tokens=3000))
    writer.close()
    writer.close()
    assert len(list(read_rollouts(rollout_path(tmp_path, 1)))) == ROWS
    assert not Path(f"/proc/{writer.pid}").exists()


def test_a_full_disk_is_told_with_the_file_at_the_next_step(tmp_path: Path) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        writer = RecordWriter(tmp_path)
        writer.write(1, step_records("a", tokens=3000))
        with pytest.raises(OSError) as error:
            writer.write(2, step_records("b"))
        assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(rollout_path(tmp_path, 1)))
        assert rollout_steps(tmp_path) == [] and list((tmp_path / "rollouts").iterdir()) == []
        writer.write(2, step_records("b", tokens=3000))
        with pytest.raises(OSError, match=r"step_2\.jsonl\.zst"):
            writer.close()
        assert not Path(f"/proc/{writer.pid}").exists()
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_our_own_mistake_is_told_with_its_lines(writer: RecordWriter) -> None:
    wrong: Any = step_records("a")
    wrong.heads[0]["split"] = {1, 2}  # no JSON
    writer.write(4, wrong)
    with pytest.raises(RuntimeError, match=r"step_4\.jsonl\.zst was not written:\n(.*\n)+TypeError"):
        writer.wait()
    writer.write(5, step_records("b"))
    writer.wait()


def test_a_killed_process_is_told(tmp_path: Path, writer: RecordWriter) -> None:
    os.kill(writer.pid, signal.SIGKILL)
    writer.write(1, step_records("a"))
    with pytest.raises(RuntimeError, match=r"step_1\.jsonl\.zst was not written: its process ended \(exit code -9\)"):
        writer.wait()


KILLED_TRAINER = """
import os, pickle, signal, sys
from pathlib import Path
from megatron_vppo.observability.record_writer import RecordWriter
writer = RecordWriter(Path(sys.argv[1]))
writer.write(1, pickle.load(sys.stdin.buffer))
print(writer.pid, flush=True)
while not list(Path(sys.argv[1]).glob("rollouts/.step_1*")):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_trainer_leaves_no_process_and_no_half_file(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", KILLED_TRAINER, str(tmp_path)],
        input=pickle.dumps(step_records("a", tokens=30_000)),
        env=child_environment(),
        capture_output=True,
        timeout=60,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    until = time.monotonic() + 10
    while Path(f"/proc/{int(ended.stdout)}").exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert not Path(f"/proc/{int(ended.stdout)}").exists()
    assert rollout_steps(tmp_path) == []
    cut_rollouts_after(tmp_path, 0)
    assert list((tmp_path / "rollouts").iterdir()) == []
