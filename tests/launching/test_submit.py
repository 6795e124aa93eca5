"""A script on its way: never one that bash cannot read."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vppo.launching.submit import check_syntax, send_script, try_script


def test_a_script_that_bash_cannot_read(tmp_path: Path) -> None:
    check_syntax("echo 'fine'\n")
    with pytest.raises(ValueError, match=r"bash cannot read the script.*syntax error"):
        check_syntax("if true; then\n")


def test_the_answer_of_sbatch_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin/sbatch"
    program.parent.mkdir()
    program.write_text('#!/bin/bash\necho "asked: $*"\necho "invalid partition" >&2\nexit $(($# - 1))\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    path = tmp_path / "run.sbatch"
    assert try_script(path) == (False, f"asked: --test-only {path}\ninvalid partition")
    assert send_script(path) == (True, f"asked: {path}\ninvalid partition")
