"""Records of a run, one file per step: <run>/<folder>/step_N.jsonl.zst, compressed JSON lines."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from megatron_vppo.observability.json_lines import dump_line, parse_lines
from megatron_vppo.system.whole import whole_file


@dataclass(frozen=True)
class StepFiles:
    """The files of one kind of records."""

    folder: str
    """The name of their folder in the run folder."""

    def path(self, run_dir: str | Path, step: int) -> Path:
        return Path(run_dir) / self.folder / f"step_{step}.jsonl.zst"

    def write(self, run_dir: str | Path, step: int, records: Iterable[Mapping[str, Any]]) -> Path:
        """Writes the records of a step, completely or not at all. They replace those of an earlier attempt at it."""
        path = self.path(run_dir, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file, zstandard.ZstdCompressor(level=6).stream_writer(file, closefd=False) as packed:
            for record in records:
                packed.write(dump_line(record).encode())
        return path

    def steps(self, run_dir: str | Path) -> list[int]:
        """Lists the steps that have a file, in rising order."""
        names = (
            re.fullmatch(r"step_(0|[1-9][0-9]*)\.jsonl\.zst", path.name)
            for path in (Path(run_dir) / self.folder).glob("step_*")
        )
        return sorted(int(match[1]) for match in names if match)

    def cut_after(self, run_dir: str | Path, step: int) -> None:
        """Deletes the files of later steps, which a resumed run computes again, and what a killed process left."""
        for unfinished in (Path(run_dir) / self.folder).glob(".step_*.jsonl.zst.*.tmp"):
            unfinished.unlink(missing_ok=True)
        for later in self.steps(run_dir):
            if later > step:
                self.path(run_dir, later).unlink()


def read_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yields the records of one file as they were written. Non-finite numbers are strings (see json_lines.py)."""
    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as unpacked:
        yield from parse_lines(io.TextIOWrapper(unpacked, encoding="utf-8"))
