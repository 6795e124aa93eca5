"""The table at the end of `make gpu-check`, from a report that pytest really wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
import torch
from bench import gpu_questions
from gpu_check import main, measure, read_report, run_tests, table

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


def test_every_gpu_test_belongs_to_one_part(repo_root: Path) -> None:
    files = [name for names in gpu_check.TESTS.values() for name in names]
    assert sorted(files) == sorted(path.name for path in (repo_root / "tests/gpu").glob("test_*.py"))


def test_a_part_without_a_report_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "PYTEST", ("json.tool",))
    (check,) = run_tests("layers", ["--no-such-option"])
    assert (check.file, check.outcome, check.reason) == ("layers", "failed", "it ended with status 2")


def test_a_selection_of_nothing_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "TESTS", {"numbers": ("../system/test_cudnn.py",)})
    (check,) = run_tests("numbers", ["-q", "-p", "no:cacheprovider", "-k", "no_such_test"])
    assert (check.outcome, check.reason) == ("failed", "no check was selected")


def test_figures_go_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = {
        "good": "print(1)",
        "bad": "raise SystemExit(3)",
        "half": """print('{"fp8": {"error": "no"}}')""",
        "slow": "while True: pass",
    }
    monkeypatch.setattr(gpu_check, "BENCHMARKS", {name: ("-c", code) for name, code in codes.items()})
    monkeypatch.setattr(gpu_check, "MEASURING_SECONDS", 2)
    checks = [measure(name, tmp_path / "out") for name in codes]
    assert [check.outcome for check in checks] == ["passed", "failed", "failed", "failed"]
    assert [check.reason for check in checks[1:]] == [
        "it ended with status 3", "a case of it failed", "it took longer than 2 s",
    ]  # fmt: skip
    assert (tmp_path / "out/good.json").read_text() == "1\n"
    assert f"figures  {tmp_path / 'out/good.json'}" in table(checks)


def test_small_questions_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_questions.main(["--small", "--seconds-per-case", "0"])
    report = json.loads(capsys.readouterr().out)
    assert list(report["tower_mlp_ms"]) == ["36", "40"] and report["windows_ms"]["batch, torch"]["forward"] > 0
    assert report["attention_host_ms"] == "it needs TransformerEngine"
