"""The mutation tool finds the changes of a toy module, and says which of them the toy's tests notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from mutate.mutants import mutants_of, sample

RUN = Path(__file__).parents[2] / "tools" / "mutate" / "run.py"

SOURCE = b'''"""A module with -1 in its docstring."""

LIMIT: tuple[int, ...] = (3,)


@cache(maxsize=4)
def grade(points: int, *, bonus: bool = False) -> str:
    """Returns 1 of 2 grades."""
    if points < 0:
        raise ValueError(f"points are {points - 1}" + str(5))
    print("grading", 7)
    best = max(points, (
        points  # and - in a comment
        + 1)
    )
    return "good" if best >= LIMIT[0] and not bonus else "bad"
'''


def test_the_mutants_of_a_source() -> None:
    found = [(m.line, m.function, m.kind, m.before, m.after) for m in mutants_of("toy.py", SOURCE)]
    assert found == [
        (3, "", "constant", "3", "4"),
        (7, "", "constant", "False", "True"),
        (9, "grade", "guard", "points < 0", "False"),
        (9, "grade", "comparison", "<", "<="),
        (9, "grade", "constant", "0", "1"),
        (12, "grade", "function", "max", "min"),
        (14, "grade", "arithmetic", "+", "-"),
        (14, "grade", "constant", "1", "2"),
        (16, "grade", "branch", "best >= LIMIT[0] and not bonus", "(not (best >= LIMIT[0] and not bonus))"),
        (16, "grade", "comparison", ">=", ">"),
        (16, "grade", "constant", "0", "1"),
        (16, "grade", "boolean", "and", "or"),
        (16, "grade", "sign", "not bonus", "(bonus)"),
    ]


def test_a_mutant_changes_its_place_alone() -> None:
    text = "größe = 1  # 1 größe\nx.a = abs(größe - 2).clamp(min=0)\n".encode()
    changed = {mutant.apply(text).decode() for mutant in mutants_of("toy.py", text)}
    assert changed == {
        "größe = 2  # 1 größe\nx.a = abs(größe - 2).clamp(min=0)\n",
        "größe = 1  # 1 größe\npass\n",
        "größe = 1  # 1 größe\nx.a = (größe - 2).clamp(min=0)\n",
        "größe = 1  # 1 größe\nx.a = abs(größe + 2).clamp(min=0)\n",
        "größe = 1  # 1 größe\nx.a = abs(größe - 3).clamp(min=0)\n",
        "größe = 1  # 1 größe\nx.a = abs(größe - 2)\n",
        "größe = 1  # 1 größe\nx.a = abs(größe - 2).clamp(min=1)\n",
    }


def test_a_draw_is_even_over_functions_and_repeats() -> None:
    text = b"def a(x):\n    return x + 1 + 2 + 3 + 4 + 5\ndef b(x):\n    return x + 1\n"
    mutants = mutants_of("toy.py", text)
    drawn = sample(mutants, 4, seed=0)
    assert [mutant.function for mutant in drawn] == ["a", "a", "b", "b"]
    assert drawn == sample(mutants, 4, seed=0) != sample(mutants, 4, seed=1)


# --- The whole tool, on a toy -----------------------------------------------------------------------------------------

TOY = """BASE = 10


def is_adult(age):
    return age >= 18


def halves(number):
    count = 0
    while number > 1:
        number //= 2
        count += 1
    return count


def add(number):
    return BASE + number


def unused(number):
    return number * 3
"""

TOY_TESTS = """import subprocess
import sys

import pytest

from toy.numbers import halves, is_adult


def test_is_adult():
    assert is_adult(40) and not is_adult(3)


def test_halves():
    assert halves(8) == 3


@pytest.fixture(scope="module")
def sum_of_a_child():
    code = "from toy.numbers import add; print(add(1))"
    return int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)


def test_nothing(sum_of_a_child):
    pass


def test_in_a_child(sum_of_a_child):
    assert sum_of_a_child == 11
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    for folder in ("toy", "tests"):
        (root / folder).mkdir(parents=True)
    (root / "toy" / "numbers.py").write_text(TOY)
    (root / "tests" / "test_numbers.py").write_text(TOY_TESTS)
    return root


def run_tool(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUN), "toy", "--root", str(root), "--limit", "10", *arguments]
    return subprocess.run(command, text=True, capture_output=True, check=False)


def results(out: Path) -> dict[str, Any]:
    """Returns what became of each mutant, by its line and change."""
    records = [json.loads(line) for line in out.read_text().splitlines()]
    return {f"{r['line']}: {r['before']} -> {r['after']}": (r["status"], r.get("killed_by")) for r in records}


@pytest.mark.extended
def test_mutants_of_a_toy(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    before = {path: path.read_bytes() for path in toy.rglob("*") if path.is_file()}
    done = run_tool(toy, "--out", str(out))
    assert done.returncode == 0, done.stderr
    name = "tests/test_numbers.py::test_"
    assert results(out) == {
        "1: 10 -> 11": ("killed", f"{name}in_a_child"),
        "5: >= -> >": ("survived", None),
        "5: 18 -> 19": ("survived", None),
        "9: 0 -> 1": ("killed", f"{name}halves"),
        "10: number > 1 -> (not (number > 1))": ("killed", f"{name}halves"),
        "10: > -> >=": ("killed", f"{name}halves"),
        "10: 1 -> 2": ("killed", f"{name}halves"),
        "11: // -> *": ("timeout", None),
        "11: 2 -> 3": ("killed", f"{name}halves"),
        "12: + -> -": ("killed", f"{name}halves"),
        "12: 1 -> 2": ("killed", f"{name}halves"),
        "17: + -> -": ("killed", f"{name}in_a_child"),
        "21: * -> /": ("not covered", None),
        "21: 3 -> 4": ("not covered", None),
    }
    assert done.stdout.splitlines()[-5:] == [
        "toy/numbers.py: 14 mutants, 9 killed, 2 survived, 1 timeout, 2 not covered",
        "survived: toy/numbers.py:5 | >= -> >",
        "survived: toy/numbers.py:5 | 18 -> 19",
        "not covered: toy/numbers.py:21 | * -> /",
        "not covered: toy/numbers.py:21 | 3 -> 4",
    ]
    assert {path: path.read_bytes() for path in toy.rglob("*") if path.is_file()} == before


def test_it_goes_on_where_it_stopped(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run_tool(toy, "--out", str(out), "--number", "2")
    first = out.read_text().splitlines()
    assert len(first) == 2
    done = run_tool(toy, "--out", str(out), "--number", "4", "--workers", "2")
    assert "4 mutants, 2 to try" in done.stdout
    lines = out.read_text().splitlines()
    assert lines[:2] == first and len(set(lines)) == len(lines) == 4


def test_a_tool_that_is_ended_ends_its_processes(toy: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(RUN), "toy", "--root", str(toy), "--out", str(tmp_path / "out.jsonl")]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as tool:
        assert tool.stdout is not None
        while "toy/numbers.py:10 | 1 -> 2" not in tool.stdout.readline():  # the next one runs for ever
            pass
        while not (processes := [p for p in psutil.Process(tool.pid).children() if os.getsid(p.pid) == p.pid]):
            pass  # it has a session of its own as soon as it runs tests
        tool.terminate()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []


def test_tests_that_fail_as_they_are_are_refused(toy: Path, tmp_path: Path) -> None:
    (toy / "tests" / "test_numbers.py").write_text(TOY_TESTS.replace("== 3", "== 4"))
    done = run_tool(toy, "--out", str(tmp_path / "out.jsonl"))
    assert done.returncode == 1 and "the tests fail as they are" in done.stderr and "test_halves" in done.stderr
