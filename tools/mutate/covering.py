"""The tests that cover a changed line, and the part of the tracing that goes on in pytest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mutate.mutants import Mutant
from mutate.tracer import Tracer


@dataclass(frozen=True)
class Coverage:
    contexts: dict[tuple[str, int], set[str]]
    """The tests, and files of tests, that ran each (file, line)."""
    durations: dict[str, float]
    """The seconds of each test, fixtures included."""

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Lists the tests that run a mutant, the fastest first."""
        first, last = mutant.statement
        found = self.contexts.get((mutant.file, mutant.line)) or set()
        if not found:  # an expression of several lines need not report each of them
            found = set().union(*(self.contexts.get((mutant.file, line), ()) for line in range(first, last + 1)))
        if not mutant.function:  # it runs on import: every test that uses the module
            found = set().union(*(tests for (file, _), tests in self.contexts.items() if file == mutant.file))
        return sorted(
            (test for test in self.durations if test in found or test.split("::")[0] in found),
            key=lambda test: self.durations[test],
        )


class TracingPlugin:
    """Tells the tracer which test runs, and notes how long it took."""

    def __init__(self, folder: Path) -> None:
        self._tracer = Tracer(folder)
        self.durations: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._tracer.enter(nodeid.split("::")[0])
        self._tracer.start()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self._tracer.enter(item.nodeid)
        result = yield
        self._tracer.enter(item.nodeid.split("::")[0])
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.skipped:
            self.durations[report.nodeid] += report.duration
