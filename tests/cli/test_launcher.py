"""`vppo train` starts two real processes: what the user reads when one fails, the exit status, what the logs hold."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from megatron_vppo.cli.launcher import explain
from megatron_vppo.cli.rank_error import RankError, write_error
from tests.cli.ranks import environment, finish, logs_of, start, train, train_command
from tests.system.marked import wait_until_gone

LINE_OF_RANK_0 = "the line of rank 0\n"
TRACEBACK, LOG = "(traceback: {}/trainer_rank_1.log)\n", "(log: {}/trainer_rank_1.log)\n"
CASES = {
    "mistake": (2, f"rank 1: rollout.n=3 does not go with 4 rows; lower it {TRACEBACK}"),
    "defect": (1, f"rank 1: KeyError: 'mrope_section' {TRACEBACK}"),
    "CUDA memory": (1, f"rank 1: OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. {TRACEBACK}"),
    "engine": (
        1,
        "rank 1: the rollout engine (process 7) ended with signal SIGKILL; end of engine_0.log:\n  | one\n  | two\n"
        + TRACEBACK,
    ),
    "interrupt": (1, f"rank 1: KeyboardInterrupt {TRACEBACK}"),
    "full disk": (2, f"rank 1: /full/step_1.jsonl.zst: No space left on device {TRACEBACK}"),
    "one after the other": (2, f"rank 1: of rank 1 {TRACEBACK}"),
    "SIGKILL": (
        1,
        "rank 1 was ended by SIGKILL: usually the kernel's answer when the machine runs out of memory, see `dmesg` "
        + LOG,
    ),
    "exit": (1, f"rank 1 ended with exit status 3 and reported no exception {LOG}"),
}


ALIKE = ("defect", "CUDA memory", "engine", "interrupt", "exit", "full disk", "one after the other")
"""Cases that go the way of another one."""


@pytest.mark.distributed
@pytest.mark.parametrize(
    "failure", [pytest.param(case, marks=[pytest.mark.extended] if case in ALIKE else []) for case in CASES]
)
def test_one_message_says_which_rank_failed_and_why(failure: str, tmp_path: Path) -> None:
    status, message = CASES[failure]
    ranks = "0,1" if failure == "one after the other" else "1"
    expected = f"vppo: {message.format(logs_of(tmp_path))}"
    assert train(tmp_path, failure, VPPO_TEST_RANKS=ranks) == (status, LINE_OF_RANK_0, expected)
    log = (logs_of(tmp_path) / "trainer_rank_1.log").read_text()
    assert ("Traceback (most recent call last)" in log) == ("traceback:" in message)


@pytest.mark.distributed
@pytest.mark.extended
def test_native_text_goes_to_the_log(tmp_path: Path) -> None:
    status, _, err = train(tmp_path, "native text")
    assert (status, err.count("\n")) == (2, 1) and "rank 1: and an error" in err
    assert "text of a C library: " in (logs_of(tmp_path) / "trainer_rank_1.log").read_text()


@pytest.mark.distributed
def test_a_crash_leaves_its_stack_in_the_log(tmp_path: Path) -> None:
    status, _, err = train(tmp_path, "SIGSEGV")
    expected = "vppo: rank 1 was ended by SIGSEGV: a crash in native code " + LOG.format(logs_of(tmp_path))
    assert (status, err) == (1, expected)
    log = (logs_of(tmp_path) / "trainer_rank_1.log").read_text()
    assert "Segmentation fault" in log and "in string_at" in log


@pytest.mark.distributed
def test_a_rank_that_hangs_is_missed_by_the_other(tmp_path: Path) -> None:
    status, _, err = train(tmp_path, "hang")
    assert status == 1
    assert re.fullmatch(
        r"vppo: rank 0 lost contact with another rank: \[.*\] Timed out waiting 2000ms for .* "
        rf"\(traceback: {logs_of(tmp_path)}/trainer_rank_0\.log\)\n",
        err,
    )


@pytest.mark.distributed
def test_a_step_that_hangs_leaves_the_stacks_of_every_rank(tmp_path: Path) -> None:
    status, _, err = train(tmp_path, "hang under a watchdog", VPPO_TEST_RANKS="0,1")
    assert status == 1, "which is requeued"
    logs = [logs_of(tmp_path) / f"trainer_rank_{rank}.log" for rank in range(2)]
    what = r"step 4 takes longer than 1 seconds, and the median so far is \d \(trainer.watchdog\)"
    assert re.fullmatch(rf"vppo: rank \d: TookTooLong: {what} \(traceback: ({logs[0]}|{logs[1]})\)\n", err)
    for log in logs:
        shown = log.read_text()
        assert re.search(rf"^--- {what}; all threads of this process:$", shown, flags=re.MULTILINE)
        assert re.search(r'File ".*sitecustomize.py", line \d+ in hang_under_a_watchdog$', shown, flags=re.MULTILINE)
    assert "in barrier" in logs[0].read_text()


@pytest.mark.distributed
@pytest.mark.extended
def test_logs_keep_every_attempt(tmp_path: Path) -> None:
    (logs_of(tmp_path).parent).mkdir(parents=True)
    old = logs_of(tmp_path).parent / "trainer_rank_1.log"
    old.write_text("of a version that had no folder for each attempt")
    for attempt in ("attempt_1", "attempt_2"):
        assert train(tmp_path, "mistake", "rollout.n=4")[0] == 2
        log = (logs_of(tmp_path, attempt) / "trainer_rank_1.log").read_text()
        began = re.findall(
            r"^--- \d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}: an attempt begins: vppo train --config \S+ rollout.n=4 "
            r"\(rank 1 of 2, process \d+ on \S+\)$",
            log,
            flags=re.MULTILINE,
        )
        assert len(began) == log.count("Traceback") == 1
        assert logs_of(tmp_path, "latest").readlink() == Path(attempt)
    assert old.read_text() == "of a version that had no folder for each attempt"


@pytest.mark.distributed
@pytest.mark.extended
def test_warnings_of_ours_stay_on_the_terminal(tmp_path: Path) -> None:
    assert train(tmp_path, "warn") == (0, LINE_OF_RANK_0, "a warning of ours\n")
    assert "a warning of a library" in (logs_of(tmp_path) / "trainer_rank_1.log").read_text()


@pytest.mark.distributed
def test_a_run_without_an_error_prints_what_rank_0_prints(tmp_path: Path) -> None:
    assert train(tmp_path, "none") == (0, LINE_OF_RANK_0, "")
    names = sorted(path.name for path in logs_of(tmp_path).iterdir())
    assert names == ["trainer_rank_0.log", "trainer_rank_1.log"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "number, status, message",
    [
        pytest.param(signal.SIGINT, 130, "vppo: ended by SIGINT\n", marks=pytest.mark.extended),
        (signal.SIGTERM, 143, "vppo: ended by SIGTERM\n"),
        (signal.SIGKILL, -signal.SIGKILL, ""),
    ],
)
def test_a_signal_ends_every_rank(number: signal.Signals, status: int, message: str, tmp_path: Path) -> None:
    mark = f"mark of {tmp_path}"
    process = start(train_command(tmp_path), environment("wait", VPPO_TEST_MARK=mark))
    assert process.stdout is not None and process.stderr is not None
    while process.stdout.readline() != "waiting\n":
        assert process.poll() is None
    process.send_signal(number)
    # The pipes are closed when the ranks, which have inherited them, are gone as well.
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (status, "", message)
    wait_until_gone(mark)


@pytest.mark.distributed
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.extended), signal.SIGUSR2])
def test_a_run_with_work_to_save_is_asked_to_stop(number: signal.Signals, tmp_path: Path) -> None:
    process = start(train_command(tmp_path), environment("stop when asked"))
    assert process.stdout is not None
    for _ in range(3):  # of rank 0, and of both ranks
        assert process.stdout.readline()
    process.send_signal(number)
    assert finish(process) == (75, "", "")


@pytest.mark.distributed
@pytest.mark.extended
def test_a_reader_that_has_left_is_no_error(tmp_path: Path) -> None:
    process = start(train_command(tmp_path), environment("none"))
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert (process.wait(timeout=300), process.stderr.read()) == (141, "")


def test_a_folder_that_cannot_be_made_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "project").write_text("a file in its place")
    status, out, err = train(tmp_path, "none")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"vppo: {tmp_path}/project")


@pytest.mark.distributed
def test_a_log_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    log = logs_of(tmp_path) / "trainer_rank_1.log"
    log.mkdir(parents=True)
    found = train(tmp_path, "none", VPPO_ATTEMPT="attempt_1")
    assert found == (2, "", f"vppo: rank 1: {log}: Is a directory\n")


@pytest.mark.distributed
@pytest.mark.extended
@pytest.mark.parametrize("what", ["a folder in its place", "a full disk"])
def test_a_log_of_the_agent_that_cannot_be_written_hides_no_error(what: str, tmp_path: Path) -> None:
    log = logs_of(tmp_path) / "launcher.log"
    log.parent.mkdir(parents=True)
    if what == "a full disk":
        log.symlink_to("/dev/full")
    else:
        log.mkdir()
    status, message = CASES["mistake"]
    expected = (status, LINE_OF_RANK_0, f"vppo: {message.format(logs_of(tmp_path))}")
    assert train(tmp_path, "mistake", VPPO_ATTEMPT="attempt_1") == expected


@pytest.mark.distributed
@pytest.mark.extended
def test_an_error_of_the_launcher_itself(tmp_path: Path) -> None:
    """Here it cannot read what a rank has written for it; it may also find no room for its files, or no port."""
    status, out, err = train(tmp_path, "spoilt report")
    assert (status, out, err.count("\n")) == (1, LINE_OF_RANK_0, 1)
    log = logs_of(tmp_path) / "launcher.log"
    assert err.startswith("vppo: the launcher: TypeError: ") and err.endswith(f"(traceback: {log})\n")
    assert "Traceback (most recent call last)" in log.read_text()


@pytest.mark.distributed
@pytest.mark.extended
@pytest.mark.parametrize(("closed", "number"), [(">&-", 1), ("2>&-", 2)])
def test_a_stream_that_is_closed_at_start(closed: str, number: int, tmp_path: Path) -> None:
    command = ["bash", "-c", f'exec "$0" "$@" {closed}', sys.executable, *train_command(tmp_path)]
    found = subprocess.run(command, env=environment("mistake"), capture_output=True, text=True, check=False)
    status, message = CASES["mistake"]
    expected = [LINE_OF_RANK_0, f"vppo: {message.format(logs_of(tmp_path))}"]
    expected[number - 1] = ""
    assert [found.returncode, found.stdout, found.stderr] == [status, *expected]


# --- Which failure is the cause ---------------------------------------------------------------------------------------

OWN = RankError(rank=0, host=None, message="own", status=2, time=10.0, lost_contact=False, log="its.log")
LOST = replace(OWN, message="closed by peer", status=1, lost_contact=True)
KILLED = CASES["SIGKILL"][1].removesuffix("\n").format("logs")


class Ended:
    """Builds failures as torch's agent reports them: an exit code, and the file that the rank wrote, if any."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._monkeypatch = folder, monkeypatch

    def __call__(self, rank: int, exitcode: int, error: RankError | None = None) -> ProcessFailure:
        path = self._folder / f"error_{rank}.json"
        if error is not None:
            self._monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
            assert write_error(replace(error, rank=rank))
        return ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file=str(path))


@pytest.fixture
def ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ended:
    return Ended(tmp_path, monkeypatch)


def cause(*failures: ProcessFailure) -> tuple[int, str | None]:
    """Exit status and message; failures in the order in which ranks ended."""
    return explain({failure.local_rank: failure for failure in failures}, Path("logs"))


def test_the_earliest_exception_is_the_cause(ended: Ended) -> None:
    early, late = replace(OWN, message="early", status=1, time=9.0), replace(OWN, message="late", time=11.0)
    assert cause(ended(0, 2, late), ended(1, 1, early), ended(2, 2, OWN)) == (1, "rank 1: early (traceback: its.log)")


def test_a_lost_contact_follows_from_an_exception(ended: Ended) -> None:
    found = cause(ended(0, 1, replace(LOST, time=9.0)), ended(1, 2, OWN))
    assert found == (2, "rank 1: own (traceback: its.log)")


def test_a_lost_contact_follows_from_a_signal(ended: Ended) -> None:
    assert cause(ended(0, 1, LOST), ended(1, -9)) == (1, KILLED)


def test_an_abort_of_nccl_follows_from_an_exception(ended: Ended) -> None:
    assert cause(ended(1, -6), ended(0, 2, OWN)) == (2, "rank 0: own (traceback: its.log)")


def test_ranks_that_the_launcher_ended_are_not_the_cause(ended: Ended) -> None:
    assert cause(ended(1, -9), ended(0, -15), ended(2, -15)) == (1, KILLED)
    lost = "rank 0 lost contact with another rank: closed by peer (traceback: its.log)"
    assert cause(ended(0, 1, LOST), ended(1, -15)) == (1, lost)


def test_a_rank_that_somebody_ended_is_the_cause(ended: Ended) -> None:
    expected = (1, "rank 1 was ended by SIGTERM (log: logs/trainer_rank_1.log)")
    assert cause(ended(1, -15), ended(0, 1, LOST)) == expected


def test_a_signal_without_a_name(ended: Ended) -> None:
    assert cause(ended(1, -40)) == (1, "rank 1 was ended by signal 40 (log: logs/trainer_rank_1.log)")
