"""The question of a benchmark, in the one form that every source gives it.

Imported by the workers that grade: at the top nothing may import `datasets` or torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vppo.config.choices import Grading

if TYPE_CHECKING:
    from megatron_vppo.data.dataset import VisionDataset
    from megatron_vppo.evaluation.encoded import EncodedImage


@dataclass(frozen=True, slots=True)
class GradingRule:
    """The way the responses to a question are graded. Picklable."""

    kind: Grading
    relative_tolerance: float = 0.0
    absolute_tolerance: float = 0.0
    """Both are those of `number`."""
    iou_threshold: float = 0.5
    """The least overlap that `iou` counts as right."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a benchmark, without any instruction on the format of responses."""

    benchmark: str
    """The name that the suite gives the benchmark."""
    id: str
    """Its name in the benchmark; no other question of the benchmark has it."""
    problem: str
    """The text with its options, as the model reads them; one `<image>` per image, in the order of the images."""
    answer: str
    """The ground truth; of a multiple choice its letter."""
    rule: GradingRule
    place: str
    """File and row, for messages."""
    images: tuple[EncodedImage, ...] = ()
    options: tuple[str, ...] = ()
    """The texts of A, B, ... of a multiple choice; empty: a free answer, or options that stand in the problem alone."""
    categories: Mapping[str, str] = field(default_factory=dict)
    """Its place in the orders that the benchmark has, such as {'subject': 'physics'}."""
    variant_of: str | None = None
    """The name that all variants of one question share; None: it has no variants."""


class _QuestionRows:
    """Questions as the rows of a data file."""

    columns: Sequence[str] = ("problem", "answer", "images")

    def __init__(self, questions: Sequence[Question]) -> None:
        self._questions = questions

    def __len__(self) -> int:
        return len(self._questions)

    def cell(self, row: int, column: str, inside: Sequence[str] = ()) -> Any:
        assert not inside, "no column holds records"
        question = self._questions[row]
        if column == "images":
            return [image.read() for image in question.images]
        return getattr(question, column)

    def as_stored(self, row: int, column: str) -> Any:
        return self.cell(row, column)

    def place(self, row: int) -> str:
        question = self._questions[row]
        return f"question {question.id}, {question.place}"


def dataset_of(questions: Sequence[Question]) -> VisionDataset:
    """Makes a data set of the questions of one benchmark, whose row numbers are their positions.

    Images are read when they are asked for.
    """
    from megatron_vppo.data.columns import Column, Columns
    from megatron_vppo.data.dataset import VisionDataset

    return VisionDataset(
        _QuestionRows(questions),
        source=questions[0].benchmark,
        image_root=Path("/"),
        columns=Columns(Column("problem"), Column("answer"), Column("images"), "marks"),
    )
