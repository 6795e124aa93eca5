"""Ranks that the user's own torchrun or srun has started: the first to fail says so, the others are silent."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from tests.cli.ranks import TORCHRUN, environment, finish, logs_of, start, train_command, train_under_srun

pytestmark = pytest.mark.distributed
MISTAKE = "vppo: rank 1: rollout.n=3 does not go with 4 rows; lower it (traceback: {}/trainer_rank_1.log)\n"


def test_under_srun_the_rank_that_fails_speaks_in_every_attempt(tmp_path: Path) -> None:
    for restarts in ("", "1"):
        first, second = train_under_srun(tmp_path, "mistake", SLURM_RESTART_COUNT=restarts)
        logs = logs_of(tmp_path, f"job_7_{restarts or 0}")
        assert first[1:] == ("the line of rank 0\n", ""), restarts
        assert second == (93, "", MISTAKE.format(logs)), restarts
        assert first[0] == 1
        assert (logs.parent / "latest").readlink() == Path(logs.name)
        log = (logs / "trainer_rank_0.log").read_text()
        assert log.count("an attempt begins") == 1
        assert "/gloo/" in log, "rank 0 lost contact, in words of gloo's that vary"


@pytest.mark.extended
def test_a_step_that_appends_to_the_logs_of_an_earlier_one_speaks_as_well(tmp_path: Path) -> None:
    """A user may have set VPPO_ATTEMPT for several starts."""
    for _ in range(2):
        _, second = train_under_srun(tmp_path, "mistake", VPPO_ATTEMPT="a")
        assert second == (93, "", MISTAKE.format(logs_of(tmp_path, "a")))
    assert (logs_of(tmp_path, "a") / "trainer_rank_1.log").read_text().count("an attempt begins") == 2


@pytest.mark.extended
def test_under_srun_a_second_error_is_only_in_its_log(tmp_path: Path) -> None:
    first, second = train_under_srun(tmp_path, "one after the other", VPPO_TEST_RANKS="0,1")
    assert first == (93, "the line of rank 0\n", "")
    logs = logs_of(tmp_path, "job_7_0")
    assert second == (93, "", f"vppo: rank 1: of rank 1 (traceback: {logs}/trainer_rank_1.log)\n")
    assert "ValueError: of rank 0" in (logs / "trainer_rank_0.log").read_text()


def test_under_srun_a_rank_that_was_killed_is_named_once(tmp_path: Path) -> None:
    first, second = train_under_srun(tmp_path, "SIGKILL")
    assert second == (-9, "", "")
    assert first[0] == 1
    assert re.fullmatch(
        rf"vppo: rank 0 lost contact with another rank: rank 1 \(process \d+ on {socket.gethostname()}\) ended without "
        r"an error: a signal, usually SIGKILL when memory runs out; \[.*/gloo/.*\n",
        first[2],
    )


@pytest.mark.extended
def test_the_cause_is_told_even_where_it_comes_last(tmp_path: Path) -> None:
    """Rank 0 loses contact at once; rank 1, which has closed its connections, raises its error a second later."""
    first, second = train_under_srun(tmp_path, "late cause")
    assert first[1:] == ("the line of rank 0\n", "")
    assert second[2] == f"vppo: rank 1: the cause (traceback: {logs_of(tmp_path, 'job_7_0')}/trainer_rank_1.log)\n"


@pytest.mark.extended
def test_the_machine_is_named_where_there_are_several(tmp_path: Path) -> None:
    _, second = train_under_srun(tmp_path, "mistake", SLURM_NNODES="2", SLURM_STEP_ID="0", MASTER_ADDR="127.0.0.1")
    assert second[2].startswith(f"vppo: rank 1 on {socket.gethostname()}: rollout.n=3 does not")


def test_what_every_rank_of_a_machine_finds_wrong_is_said_once(tmp_path: Path) -> None:
    """Settings, which are read before there is a folder for logs."""
    first, second = train_under_srun(tmp_path, "none", "rollout.temperatur=3")
    assert first[0] == second[0] == 93
    assert first[2].count("vppo: ") == 1 and "did you mean rollout.temperature?" in first[2]
    assert second[1:] == ("", "")


def test_under_torchrun_the_first_rank_to_fail_speaks(tmp_path: Path) -> None:
    """torchrun's own table follows, with the message in it."""
    for run in ("first", "second"):
        command = [*TORCHRUN, f"--rdzv-id={run}", "--rdzv-backend=c10d", "--nproc-per-node=2", *train_command(tmp_path)]
        logs = logs_of(tmp_path, f"torchrun_{run}_0")
        status, out, err = finish(start(command, environment("one after the other", VPPO_TEST_RANKS="0,1")))
        lines = [line for line in err.splitlines() if line.startswith("vppo: ")]
        assert lines == [f"vppo: rank 1: of rank 1 (traceback: {logs}/trainer_rank_1.log)"]
        assert "  traceback : of rank 1\n" in err
        assert (status, out) == (1, "the line of rank 0\n")
