"""Notes which lines of the sources each test runs, also in processes that a test starts.

A line is noted with the context in which a process first ran it: the test while its body runs, the test file while
fixtures are made or ended. Lines that run on import are not noted. Processes that tests start trace themselves, because
the folder of the notes is on their path and holds a module `sitecustomize`.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

CUSTOMIZE = """import sys
sys.path.append({tools!r})
from mutate.tracer import Tracer
Tracer({folder!r}).start()
"""


class Tracer:
    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._files: dict[str, str] = json.loads((self._folder / "files.json").read_text())
        self._seen: set[tuple[str, int]] = set()

    @staticmethod
    def prepare(folder: Path, tree: Path, files: Iterable[str]) -> None:
        """Writes what the tracers of all processes read: the files to trace, by path below `tree`."""
        folder.mkdir()
        (folder / "files.json").write_text(json.dumps({str(tree / file): file for file in files}))
        tools = str(Path(__file__).resolve().parents[1])
        (folder / "sitecustomize.py").write_text(CUSTOMIZE.format(tools=tools, folder=str(folder)))
        (folder / "context").write_text("")

    def start(self) -> None:
        threading.settrace(self._called)
        sys.settrace(self._called)

    def enter(self, context: str) -> None:
        """Changes the context, for all processes."""
        (self._folder / "context").write_text(context)
        self._seen.clear()

    def _called(self, frame: FrameType, event: str, argument: object) -> Any:
        is_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED  # not the body of a module or class
        return self._ran if is_function and frame.f_code.co_filename in self._files else None

    def _ran(self, frame: FrameType, event: str, argument: object) -> Any:
        place = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and place not in self._seen:
            self._seen.add(place)
            context = (self._folder / "context").read_text()
            with (self._folder / f"lines.{os.getpid()}").open("a") as notes:
                notes.write(json.dumps([context, self._files[place[0]], place[1]]) + "\n")
        return self._ran


def contexts_of_lines(folder: Path) -> dict[tuple[str, int], set[str]]:
    """Reads the notes: the contexts of each (file, line)."""
    found: dict[tuple[str, int], set[str]] = defaultdict(set)
    for notes in folder.glob("lines.*"):
        for context, file, line in map(json.loads, notes.read_text().splitlines()):
            found[file, line].add(context)
    return found
