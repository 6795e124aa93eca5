"""Checks what only a GPU can prove, in parts that can run alone, most telling first. `make gpu-check` calls it.

    python tools/gpu_check.py [--parts layers numbers memory engine speed questions] [--out FOLDER] [pytest options]

Runs `vppo doctor` and the parts in this interpreter's environment, and ends with one table. A check that hangs ends its
part and shows where it hangs. Exit status 1: a check failed; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HANGING_SECONDS = 240
"""A check that takes longer counts as hanging. The slowest part of a check is the start of an engine."""
MEASURING_SECONDS = 900
"""A benchmark that takes longer is ended."""
PASSED, FAILED, NONE_SELECTED = 0, 1, 5
"""Exit statuses of pytest."""
PYTEST = (
    "pytest", "-v", "--tb=short", "-o", f"faulthandler_timeout={HANGING_SECONDS}",
    "-o", "faulthandler_exit_on_timeout=true",
)  # fmt: skip
TESTS: Mapping[str, tuple[str, ...]] = {
    "layers": ("test_attention.py", "test_parity.py"),
    "numbers": ("test_head.py", "test_fp8_emulation_against_te.py"),
    "memory": ("test_gpu_offload.py", "test_gpu_ipc.py"),
    "engine": ("test_gpu_engine.py",),
}
"""The files under tests/gpu of each part that proves something. The first takes about four minutes on an H200."""
BENCHMARKS: Mapping[str, tuple[str, ...]] = {
    "speed": ("tools/bench/gpu_step.py", "--layers", "8", "--seconds-per-case", "3"),
    "questions": ("tools/bench/gpu_questions.py",),
}
"""The command of each part that measures; it prints one JSON object."""


@dataclass(frozen=True)
class Check:
    file: str
    name: str
    outcome: str
    """'passed', 'failed' or 'skipped'."""
    reason: str
    seconds: float


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = (*TESTS, *BENCHMARKS)
    parser.add_argument("--parts", nargs="+", choices=every, default=every, help="default: all, in this order")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check"), help="where figures go, as JSON")
    options, of_pytest = parser.parse_known_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU; nothing was checked", file=sys.stderr)
        return 2
    subprocess.run([sys.executable, "-m", "megatron_vppo.cli.main", "doctor"], cwd=ROOT, check=False)
    checks = []
    for part in options.parts:
        print(f"gpu-check: {part}", flush=True)
        checks += run_tests(part, of_pytest) if part in TESTS else [measure(part, options.out)]
    print(table(checks))
    return int(any(check.outcome == "failed" for check in checks))


def run_tests(part: str, options: Sequence[str]) -> list[Check]:
    """Runs the test files of a part. A part that ends without a report is one failed check."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [f"tests/gpu/{name}" for name in TESTS[part]]
        command = [sys.executable, "-m", *PYTEST, f"--junitxml={report}", *files, *options]
        began = time.monotonic()
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        checks = read_report(report) if report.exists() else []
    if status in (PASSED, FAILED) and checks:
        return checks
    reason = "no check was selected" if status == NONE_SELECTED else f"it ended with status {status}"
    return [*checks, Check(part, "pytest", "failed", reason, time.monotonic() - began)]


def measure(part: str, out: Path) -> Check:
    """Runs a benchmark, and writes its figures to a file of the folder `out`. A case that failed says so in there."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{part}.json"
    command, reason = [sys.executable, *BENCHMARKS[part]], ""
    began = time.monotonic()
    with file.open("w", encoding="utf-8") as figures:
        try:
            status = subprocess.run(command, cwd=ROOT, stdout=figures, check=False, timeout=MEASURING_SECONDS)
            reason = f"it ended with status {status.returncode}" if status.returncode else ""
        except subprocess.TimeoutExpired:
            reason = f"it took longer than {MEASURING_SECONDS} s"
    if not reason and '"error":' in file.read_text(encoding="utf-8"):
        reason = "a case of it failed"
    return Check(part, str(file), "failed" if reason else "passed", reason, time.monotonic() - began)


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


def table(checks: Sequence[Check]) -> str:
    """Writes one line per test file or benchmark, then what failed and what was skipped, with the reasons."""
    lines = ["", f"{'checks':<32}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}"]
    for file in dict.fromkeys(check.file for check in checks):
        mine = [check for check in checks if check.file == file]
        count = Counter(check.outcome for check in mine)
        seconds = sum(check.seconds for check in mine)
        lines.append(f"{file:<32}{count['passed']:>8}{count['failed']:>8}{count['skipped']:>9}{seconds:>9.1f}")
    lines += [f"failed   {check.file}::{check.name}: {check.reason}" for check in checks if check.outcome == "failed"]
    skipped = Counter(check.reason for check in checks if check.outcome == "skipped")
    lines += [f"skipped  {count} x {reason}" for reason, count in skipped.items()]
    lines += [f"figures  {check.name}" for check in checks if check.file in BENCHMARKS and check.outcome == "passed"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
