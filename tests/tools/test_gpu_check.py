"""The table at the end of `make gpu-check`, from a report that pytest really wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_check import main, read_report, table

TESTS = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="no such chip")
@pytest.mark.parametrize("n", [1, 2])
def test_left_out(n): pass
"""


def test_table(tmp_path: Path) -> None:
    (tmp_path / "test_chip.py").write_text(TESTS)
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "test_chip.py"]
    subprocess.run(command, cwd=tmp_path, check=False, capture_output=True)
    lines = table(read_report(report)).splitlines()
    assert lines[2].split()[:4] == ["test_chip", "1", "1", "2"]
    assert lines[3].startswith("failed   test_chip::test_bad: AssertionError: one is not two")
    assert lines[4] == "skipped  2 x no such chip"


def test_without_a_gpu_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
