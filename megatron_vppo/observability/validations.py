"""The recorded validations of a run: <run>/validation/step_N.jsonl.zst, one line per response to a held-out prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypedDict

from megatron_vppo.observability.step_files import StepFiles

VALIDATIONS = StepFiles("validation")


class ValidationRecord(TypedDict):
    """One response. The names of the fields are those of the file, and stay."""

    split: str
    row: int
    """The row of the data set. (split, row) identifies the prompt."""
    sample: int
    """The index among the responses of the prompt."""
    problem: str
    answer: str
    """The ground truth."""
    response: str
    """The response as text, without special tokens."""
    response_length: int
    """Tokens."""
    reward: float
    accuracy: float
    """A number in [0, 1]."""
    reward_error: str | None
    finish_reason: str
    """'stop' or 'length'."""


@dataclass(frozen=True)
class ValidationRecords:
    """The records of one validation, as another process takes them over and writes them."""

    files: ClassVar[StepFiles] = VALIDATIONS

    responses: Sequence[ValidationRecord]
    """In the order of the prompts."""

    def write(self, run_dir: Path, step: int) -> Path:
        """Writes the file of the step, completely or not at all."""
        return self.files.write(run_dir, step, self.responses)
