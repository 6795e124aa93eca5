"""The accuracy of each held-out question, from the validations that runs have recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from megatron_vppo.observability.json_lines import number
from megatron_vppo.observability.step_files import read_records
from megatron_vppo.observability.validations import VALIDATIONS

Question: TypeAlias = tuple[object, ...]
"""Split, row, text and answer: a question is the same in two runs only if all of them are."""


def accuracies(run_dirs: Sequence[Path], step: int) -> dict[Question, float]:
    """Returns the mean accuracy of each question over its responses, and over runs. It has those that all runs have.

    Raises:
        FileNotFoundError: a run has not recorded the validation of this step.
    """
    runs = [_of_run(VALIDATIONS.path(run_dir, step)) for run_dir in run_dirs]
    shared = [question for question in runs[0] if all(question in run for run in runs)]
    return {question: sum(run[question] for run in runs) / len(runs) for question in shared}


def steps_of_all(run_dirs: Sequence[Path]) -> list[int]:
    """Lists the steps whose validation all runs have recorded."""
    return sorted(set.intersection(*(set(VALIDATIONS.steps(run_dir)) for run_dir in run_dirs))) if run_dirs else []


def _of_run(path: Path) -> Mapping[Question, float]:
    found: dict[Question, list[float]] = defaultdict(list)
    for record in read_records(path):
        accuracy = number(record.get("accuracy"))
        if accuracy is not None:
            question = tuple(record.get(field) for field in ("split", "row", "problem", "answer"))
            found[question].append(accuracy)
    return {question: sum(values) / len(values) for question, values in found.items()}
