"""The recorded responses of an evaluation: <out>/responses/<benchmark>.jsonl, one line per response, as they end.

A line is written at once. A process that is killed while it writes leaves a line without an end, which the next one
removes; so every line is whole, and no response is recorded twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

from megatron_vppo.evaluation.grading import GradedSample
from megatron_vppo.observability.json_lines import dump_line

FOLDER = "responses"
_LOOK_BYTES = 1 << 16


class ResponseRecord(TypedDict):
    """One line. Lists have one entry per token of the response."""

    question: str
    """The id of the question in its benchmark."""
    digest: str
    """The digest of the question."""
    sample: int
    """0 to n - 1."""
    response: str
    """The text, without special tokens."""
    accuracy: float
    vote: str | None
    """The answer that was found, as a majority counts it."""
    error: str | None
    """The reason why the accuracy is zero, if grading raised or ran out of time."""
    finish_reason: str
    """'stop', or 'length' at data.max_response_length."""
    tokens: list[str]
    """The text of each token, special tokens included."""
    logps: list[float]
    """Nats, to three decimals: log-probs in the distribution that was sampled from, as the engine reports them."""


@dataclass(frozen=True, slots=True)
class RecordedSample:
    """A recorded response without its texts."""

    graded: GradedSample
    error: str | None
    truncated: bool
    """True if it ended at the length limit."""
    length: int
    """Tokens."""


Key = tuple[str, str, int]
"""Question, digest, sample."""


def response_path(out: Path, benchmark: str) -> Path:
    return out / FOLDER / f"{benchmark}.jsonl"


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a file; nothing if there is none. A line without an end is left out.

    Raises ValueError for a line that is no record.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                record["question"], record["digest"], record["sample"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}, line {number} is no recorded response ({error}); remove the line, and it is sampled again"
                ) from error
            yield record


def read_samples(path: Path) -> dict[Key, RecordedSample]:
    """Returns the outcome of every recorded response. Raises as `read_records` does."""
    return {
        (record["question"], record["digest"], record["sample"]): RecordedSample(
            graded=GradedSample(float(record["accuracy"]), record["vote"]),
            error=record["error"],
            truncated=record["finish_reason"] == "length",
            length=len(record["tokens"]),
        )
        for record in read_records(path)
    }


def recorded_samples(out: Path, benchmark: str, digests: Mapping[str, str]) -> dict[str, list[RecordedSample]]:
    """Returns the samples of those questions of a benchmark that a folder has, by id, in order.

    Args:
        digests: of the questions, by id. One that is recorded with another digest is another question.
    """
    found: dict[str, dict[int, RecordedSample]] = {}
    for (question, digest, sample), outcome in read_samples(response_path(out, benchmark)).items():
        if digests.get(question) == digest:
            found.setdefault(question, {})[sample] = outcome
    return {question: [samples[k] for k in sorted(samples)] for question, samples in found.items()}


class ResponseFile:
    """The file of one benchmark, to go on with."""

    def __init__(self, path: Path) -> None:
        """Opens the file, and removes a line without an end."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("a+b", buffering=0)
        end = _end_of_lines(self._file)
        if end < self._file.seek(0, os.SEEK_END):
            self._file.truncate(end)

    def add(self, record: ResponseRecord) -> None:
        """Writes a line. Raises OSError if it cannot be written whole."""
        data = dump_line(record).encode()
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> None:
        """Returns when all lines are on the disk; harmless when repeated."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()


def _end_of_lines(file: BinaryIO) -> int:
    """Returns the position behind the last line that has an end."""
    at = file.seek(0, os.SEEK_END)
    while at > 0:
        start = max(0, at - _LOOK_BYTES)
        file.seek(start)
        found = file.read(at - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        at = start
    return 0
