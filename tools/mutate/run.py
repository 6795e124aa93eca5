"""Tries changes of sources, runs the tests that cover each changed line, and lists the changes that no test noticed.

    python tools/mutate/run.py megatron_vppo/algorithm --number 100 --out /tmp/algorithm.jsonl
    python tools/mutate/run.py megatron_vppo/algorithm/loss.py --tests tests/algorithm --out /tmp/loss.jsonl

The sources are changed in a copy of the checkout. First all tests run once, traced line by line. Then each mutant runs
the tests that ran its line, the fastest first, until one fails; a mutant that takes too long has been noticed, too. The
process that forks them has imported all that the tests need of other packages. Started again with the same output file,
it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest

from mutate.covering import Coverage, TracingPlugin
from mutate.mutants import Mutant, mutants_of, sample
from mutate.tracer import Tracer, contexts_of_lines

ROOT = Path(__file__).resolve().parents[2]
PYTEST = ["-q", "-p", "no:cacheprovider", "--durations=0"]
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "runs")
CRASH = 70
"""The exit status of a process in which this tool failed, or pytest found no test."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="files or folders, relative to the root")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one per mutant; read again to resume")
    parser.add_argument("--tests", nargs="+", help="files or folders; default: those that mirror the sources")
    parser.add_argument("--number", type=int, help="mutants, drawn evenly over functions; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--limit", type=float, default=60.0, help="seconds per mutant; its tests should take half of it"
    )
    parser.add_argument("--root", type=Path, default=ROOT)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left running or lying about
    with tempfile.TemporaryDirectory(prefix="mutate_") as folder:
        run = Run(options.root.resolve(), Path(folder), options.sources, options.tests, options.limit)
        run.try_all(number=options.number, seed=options.seed, workers=options.workers, out=options.out)
    print(summary(options.out))


# --- The run ----------------------------------------------------------------------------------------------------------


class FirstFailure:
    """Writes the name of the first test that fails."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self._file.exists():
            self._file.write_text(report.nodeid)


@dataclass(frozen=True)
class Attempt:
    """A mutant whose tests run at the moment."""

    mutant: Mutant
    tree: Path
    tests: list[str]
    num_left_out: int
    """The covering tests that do not run, because the others take all the time that there is."""
    started: float


class Run:
    def __init__(
        self, root: Path, folder: Path, sources: Sequence[str], tests: Sequence[str] | None, limit: float
    ) -> None:
        self._root, self._folder, self._limit = root, folder, limit
        paths = [path for name in sources for path in (sorted((root / name).rglob("*.py")) or [root / name])]
        self._sources = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
        self._tests = list(tests or dict.fromkeys(self._mirror(Path(file)) for file in self._sources))

    def _mirror(self, source: Path) -> str:
        """Returns the test file of a source, or the nearest folder of tests that there is."""
        below = Path("tests", *source.parts[1:])
        candidates = [below.with_name(f"test_{below.name}"), *below.parents]
        return next(path.as_posix() for path in candidates if (self._root / path).exists())

    def try_all(self, *, number: int | None, seed: int, workers: int, out: Path) -> None:
        """Tries the mutants that the output file does not hold yet."""
        mutants = [mutant for file, source in self._sources.items() for mutant in mutants_of(file, source)]
        mutants = mutants if number is None else sample(mutants, number, seed=seed)
        done = {_key(record) for record in _records(out)}
        waiting = [mutant for mutant in mutants if _key(asdict(mutant)) not in done]
        print(f"{len(mutants)} mutants, {len(waiting)} to try; tests: {' '.join(self._tests)}", flush=True)
        if not waiting:
            return
        trees = [self._copy(f"tree_{number}") for number in range(min(workers, len(waiting)))]
        coverage = self._trace(trees[0])
        running: dict[int, Attempt] = {}
        try:
            while waiting or running:
                while waiting and trees:
                    mutant = waiting.pop(0)
                    tests = coverage.tests_of(mutant)
                    if tests:
                        pid, attempt = self._begin(mutant, trees.pop(), tests, coverage.durations)
                        running[pid] = attempt
                    else:
                        _note(out, mutant, status="not covered")
                time.sleep(0.02)
                for pid, attempt in list(running.items()):
                    if (result := self._ended(pid, attempt)) is not None:
                        del running[pid]
                        trees.append(attempt.tree)
                        _note(out, attempt.mutant, **result)
        finally:
            for pid in running:
                _kill(pid)

    def _copy(self, name: str) -> Path:
        tree = self._folder / name
        shutil.copytree(self._root, tree, ignore=IGNORED, symlinks=True)
        return tree

    def _trace(self, tree: Path) -> Coverage:
        """Runs all tests once, traced; then imports what they have imported, except for what the tree holds.

        Raises:
            SystemExit: a test fails without any change.
        """
        notes, result = self._folder / "notes", self._folder / "baseline.json"
        Tracer.prepare(notes, tree, self._sources)

        def work() -> int:
            os.environ["PYTHONPATH"] += os.pathsep + str(notes)
            plugin = TracingPlugin(notes)
            code = int(pytest.main([*PYTEST, *self._tests], plugins=[plugin]))
            names = [name for name, module in sys.modules.items() if not _lies_in(module, tree)]
            result.write_text(json.dumps({"durations": plugin.durations, "modules": names}))
            return code

        started, log = time.monotonic(), self._folder / "baseline.log"
        pid = _fork(tree, log, work)
        try:
            _, status = os.waitpid(pid, 0)
        finally:
            _kill(pid)
        if status:
            raise SystemExit(f"the tests fail as they are:\n{log.read_text()[-4000:]}")
        found = json.loads(result.read_text())
        with warnings.catch_warnings(action="ignore"):
            for name in found["modules"]:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        print(f"{len(found['durations'])} tests traced in {time.monotonic() - started:.0f} s", flush=True)
        return Coverage(contexts_of_lines(notes), found["durations"])

    def _begin(self, mutant: Mutant, tree: Path, tests: list[str], durations: dict[str, float]) -> tuple[int, Attempt]:
        chosen: list[str] = []
        total = 0.0
        for test in tests:
            if chosen and total + durations[test] > self._limit / 2:
                break
            chosen.append(test)
            total += durations[test]
        (tree / mutant.file).write_bytes(mutant.apply(self._sources[mutant.file]))
        failure = tree / "first_failure"
        failure.unlink(missing_ok=True)
        module = mutant.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

        def work() -> int:
            code = int(pytest.main([*PYTEST, "-x", *chosen], plugins=[FirstFailure(failure)]))
            imported = sys.modules.get(module)
            right = imported is None or _lies_in(imported, tree)
            return code if right and code != pytest.ExitCode.NO_TESTS_COLLECTED else CRASH

        pid = _fork(tree, tree / "mutant.log", work)
        return pid, Attempt(mutant, tree, chosen, len(tests) - len(chosen), time.monotonic())

    def _ended(self, pid: int, attempt: Attempt) -> dict[str, Any] | None:
        """Returns what became of a mutant, and restores its tree; None while it runs."""
        ended, status = os.waitpid(pid, os.WNOHANG)
        late = not ended and time.monotonic() > attempt.started + self._limit
        if not ended and not late:
            return None
        _kill(pid)
        if late:
            os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == CRASH:
            raise RuntimeError((attempt.tree / "mutant.log").read_text()[-4000:])
        (attempt.tree / attempt.mutant.file).write_bytes(self._sources[attempt.mutant.file])
        failure = attempt.tree / "first_failure"
        return {
            "status": "timeout" if late else "killed" if code else "survived",
            "killed_by": failure.read_text() if failure.exists() else None,
            "tests": len(attempt.tests),
            "left_out": attempt.num_left_out,
            "seconds": round(time.monotonic() - attempt.started, 1),
        }


def _fork(tree: Path, log: Path, work: Callable[[], int]) -> int:
    """Starts `work` in a process of its own session, which imports from `tree`; its result is the exit status."""
    pid = os.fork()
    if pid:
        return pid
    code = CRASH
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        os.environ["PYTHONPATH"] = str(tree)
        # A change of equal length within a second would otherwise find the bytecode of the last one.
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True
        sys.modules["__main__"] = types.ModuleType("__main__")  # multiprocessing would import this file
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _kill(pid: int) -> None:
    """Ends a process that `_fork` started, and those that its tests have started and left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _lies_in(module: Any, tree: Path) -> bool:
    return str(getattr(module, "__file__", None)).startswith(f"{tree}/")


# --- Records ----------------------------------------------------------------------------------------------------------


def _note(out: Path, mutant: Mutant, **result: Any) -> None:
    with out.open("a") as lines:
        lines.write(json.dumps(asdict(mutant) | result) + "\n")
    print(f"{result['status']:12} {_describe(asdict(mutant))}", flush=True)


def _records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("file", "line", "start", "end", "before", "after"))


def _describe(record: dict[str, Any]) -> str:
    return f"{record['file']}:{record['line']} | {' '.join(record['before'].split())} -> {record['after']}"


def summary(out: Path) -> str:
    """Returns a line per source with its mutants by status, then the mutants that no test noticed."""
    records = _records(out)
    counts: dict[str, Counter[str]] = {record["file"]: Counter() for record in records}
    for record in records:
        counts[record["file"]][record["status"]] += 1
    lines = [
        f"{file}: {sum(count.values())} mutants, " + ", ".join(f"{number} {status}" for status, number in count.items())
        for file, count in counts.items()
    ]
    unnoticed = [record for record in records if record["status"] in ("survived", "not covered")]
    return "\n".join([*lines, *(f"{record['status']}: {_describe(record)}" for record in unnoticed)])


if __name__ == "__main__":
    main()
