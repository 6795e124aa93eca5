"""Ranks of an attempt that have ended without a word, as the folder of their logs shows them."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from megatron_vppo.cli.silent_ranks import explain_silence, mark_reported

HERE = socket.gethostname()
BEGIN = "--- 2026-01-01 10:00:00 +0000: an attempt begins: vppo train (rank {} of 6, process {} on {})\nmore\n"


@pytest.fixture
def gone() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def log(folder: Path, rank: int, process: int, host: str = HERE) -> None:
    with open(folder / f"trainer_rank_{rank}.log", "a") as file:
        file.write(BEGIN.format(rank, process, host))


def test_a_rank_that_is_gone_is_named_before_those_that_may_hang(tmp_path: Path, gone: int) -> None:
    log(tmp_path, 0, os.getpid())
    log(tmp_path, 1, gone)
    log(tmp_path, 2, 4711, "n2")
    log(tmp_path, 3, os.getpid())
    mark_reported(tmp_path, 3)
    assert explain_silence(tmp_path, world_size=4) == (
        f"rank 1 (process {gone} on {HERE}) ended without an error: a signal, usually SIGKILL when memory runs out"
    )
    log(tmp_path, 1, os.getpid())
    assert explain_silence(tmp_path, world_size=4) == (
        f"rank 0 (process {os.getpid()} on {HERE}), rank 1 (process {os.getpid()} on {HERE}), "
        "rank 2 (process 4711 on n2) reported nothing so far: killed, cut off, or hanging"
    )


def test_who_has_reported_is_not_named(tmp_path: Path) -> None:
    log(tmp_path, 0, os.getpid())
    mark_reported(tmp_path, 0)
    assert explain_silence(tmp_path, world_size=2) is None, "rank 1 has no log, so nothing is known of it"


def test_a_mark_of_an_earlier_attempt_does_not_count(tmp_path: Path, gone: int) -> None:
    (tmp_path / ".reported_0").write_text("1")
    log(tmp_path, 0, gone)
    assert (explain_silence(tmp_path, world_size=1) or "").startswith(f"rank 0 (process {gone} on ")


def test_many_are_not_listed(tmp_path: Path, gone: int) -> None:
    """A machine that is cut off is named instead of its ranks."""
    for rank in range(6):
        log(tmp_path, rank, 1, f"n{2 + rank % 2}")
    expected = "6 ranks on n2, n3 reported nothing so far: killed, cut off, or hanging"
    assert explain_silence(tmp_path, world_size=6) == expected
    for rank in range(6):
        log(tmp_path, rank, 1, f"n{rank}")
    assert explain_silence(tmp_path, world_size=6) is None
    for rank in range(6):
        log(tmp_path, rank, gone)
    assert f"rank 3 (process {gone} on {HERE}) and 2 more ended" in (explain_silence(tmp_path, world_size=6) or "")
