"""A command whose reader has left, as in `vppo plan ... | head`, ends without a word and with the status of SIGPIPE."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vppo.cli import main as cli

SIGPIPE_STATUS = 141
"""The status that a shell reports for a program that SIGPIPE ended: 128 + 13."""
COMMANDS = {
    "plan": ["plan", "--model", "qwen3-vl-2b", "--gpus", "8", "--gpu-memory", "80"],
    "report": ["report", "RUN"],
    "summary": ["summary", "RUN"],
    "help": ["convert", "verify", "--help"],
}


def run_without_reader(arguments: list[str], *, with_stderr: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs `vppo ARGUMENTS` with a standard output (and error, if asked) that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, "-m", "megatron_vppo.cli.main", *arguments],
            stdout=writer,
            stderr=writer if with_stderr else subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": ""},  # argparse ignores it if --help cannot be written at once
        )
    finally:
        os.close(writer)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "timing_s/step": 2.0}) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, id=name, marks=[pytest.mark.extended] if name == "plan" else [])
        for name, command in COMMANDS.items()
    ],
)
def test_a_reader_that_has_left_is_no_error(command: list[str], run_dir: Path) -> None:
    ended = run_without_reader([str(run_dir) if word == "RUN" else word for word in command])
    assert (ended.returncode, ended.stderr) == (SIGPIPE_STATUS, "")


def test_standard_error_may_go_to_the_same_reader(tmp_path: Path) -> None:
    """`vppo ... 2>&1 | head`, and the one line to write is an error."""
    assert run_without_reader(["report", str(tmp_path / "none")], with_stderr=True).returncode == SIGPIPE_STATUS


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets to engines and pipes to workers break with the same exception."""

    def fail() -> int:
        raise BrokenPipeError("an engine has ended")

    monkeypatch.setattr("megatron_vppo.cli.doctor.run_doctor", fail)
    with pytest.raises(BrokenPipeError, match="an engine has ended"):
        cli.main(["doctor"])
