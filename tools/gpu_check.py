"""Checks what only a GPU can prove: parity, FP8, weight transfer, placement. `make gpu-check` calls it.

    python tools/gpu_check.py [pytest options]

Runs `vppo doctor`, then every test under tests/gpu in this interpreter's environment, and ends with one table. A check
that hangs ends the run and shows where it hangs. Exit status 1: a check failed; 2: there is no GPU.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GPU_TESTS = "tests/gpu"
HANGING_SECONDS = 240
"""A check that takes longer counts as hanging. The slowest part of a check is the start of an engine."""
PYTEST = (
    "pytest", "-v", "--tb=short", "-o", f"faulthandler_timeout={HANGING_SECONDS}",
    "-o", "faulthandler_exit_on_timeout=true",
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    file: str
    name: str
    outcome: str
    """'passed', 'failed' or 'skipped'."""
    reason: str
    seconds: float


def main(options: list[str]) -> int:
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU; nothing was checked", file=sys.stderr)
        return 2
    subprocess.run([sys.executable, "-m", "megatron_vppo.cli.main", "doctor"], cwd=ROOT, check=False)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", *PYTEST, f"--junitxml={report}", GPU_TESTS, *options]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if not report.exists():
            return status or 1
        checks = read_report(report)
    print(table(checks))
    return int(status != 0)


def read_report(path: Path) -> list[Check]:
    """Reads the test cases of a JUnit report."""
    checks = []
    for case in ET.parse(path).getroot().iter("testcase"):
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                reason = (child.get("message") or "").partition("\n")[0]
        file = case.get("classname", "").rpartition(".")[2]
        checks.append(Check(file, case.get("name", ""), outcome, reason, float(case.get("time", 0.0))))
    return checks


def table(checks: list[Check]) -> str:
    """Writes one line per test file, then the failed and the skipped tests with their reasons."""
    lines = ["", f"{'checks':<24}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}"]
    for file in dict.fromkeys(check.file for check in checks):
        mine = [check for check in checks if check.file == file]
        count = Counter(check.outcome for check in mine)
        seconds = sum(check.seconds for check in mine)
        lines.append(f"{file:<24}{count['passed']:>8}{count['failed']:>8}{count['skipped']:>9}{seconds:>9.1f}")
    lines += [f"failed   {check.file}::{check.name}: {check.reason}" for check in checks if check.outcome == "failed"]
    skipped = Counter(check.reason for check in checks if check.outcome == "skipped")
    lines += [f"skipped  {count} x {reason}" for reason, count in skipped.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
