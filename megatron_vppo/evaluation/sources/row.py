"""A row of a benchmark's file, as the readers of all formats see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vppo.data.dataset import RowError
from megatron_vppo.data.graders.choice import letter_of
from megatron_vppo.data.prompts import IMAGE_MARK
from megatron_vppo.data.rows import BadRow, DataRows
from megatron_vppo.evaluation.encoded import CellImage, EncodedImage
from megatron_vppo.evaluation.image_places import ImagePlaces
from megatron_vppo.evaluation.question import GradingRule, Question

SHOWN_QUESTION = "Answer the question shown in the image."
"""The problem where the question is in the image alone."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that becomes no question."""

    reason: str


@dataclass(frozen=True, slots=True)
class BenchmarkRow:
    """One row. Every error names file and row."""

    benchmark: str
    source: str
    """The file or folder, as the suite names it."""
    rows: DataRows
    number: int
    image_places: ImagePlaces

    @property
    def place(self) -> str:
        """The file and the row in it."""
        within = self.rows.place(self.number)
        return f"{self.source}, row {self.number}" + ("" if within is None else f" [{within}]")

    def error(self, reason: str) -> RowError:
        """Builds the error of the row."""
        return RowError(self.source, self.number, reason, self.rows.place(self.number))

    def has(self, column: str) -> bool:
        """Returns True if the file has the column."""
        return column in self.rows.columns

    def value(self, *columns: str) -> Any:
        """Returns the value of the first of the columns that the file has.

        Raises RowError if it has none of them, or the row cannot be read.
        """
        for column in columns:
            if self.has(column):
                try:
                    return self.rows.cell(self.number, column)
                except BadRow as error:
                    raise self.error(str(error)) from error
        wanted, known = " or ".join(map(repr, columns)), ", ".join(self.rows.columns)
        raise self.error(f"the file has no column {wanted}; it has {known}. Is `source` the format of this file?")

    def optional_text(self, *columns: str) -> str:
        """Returns the text or number of the first of the columns that the file has; empty if there is none."""
        if not any(map(self.has, columns)):
            return ""
        value = self.value(*columns)
        if value is not None and not isinstance(value, str | int | float):
            raise self.error(f"{' or '.join(columns)} holds no text: {str(value)[:80]!r}")
        return "" if value is None else str(value).strip()

    def text(self, *columns: str) -> str:
        """Returns the text or number of the first of the columns that the file has. Raises RowError if it is empty."""
        self.value(*columns)
        if not (text := self.optional_text(*columns)):
            raise self.error(f"{' or '.join(map(repr, columns))} is empty")
        return text

    def images(self, *columns: str) -> tuple[EncodedImage, ...]:
        """Returns the images of the first of the columns that the file has; none for an empty cell.

        A cell holds a path, encoded bytes or a {'bytes', 'path'}, or a list of them.
        """
        column = next(filter(self.has, columns), columns[0])
        cell = self.value(*columns)
        cells = cell if isinstance(cell, list) else [cell]
        return tuple(self._image(one, column, index) for index, one in enumerate(cells) if not _is_empty(one))

    def _image(self, cell: Any, column: str, index: int) -> EncodedImage:
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(data, bytes):
            return CellImage(self.rows, self.number, column, index, self.place)
        path = cell.get("path") if isinstance(cell, dict) else cell
        if not isinstance(path, str) or not path:
            raise self.error(f"column {column!r} holds neither image bytes nor a path: {str(cell)[:80]!r}")
        try:
            return self.image_places.find(path)
        except ValueError as error:
            raise self.error(str(error)) from error

    def question(
        self,
        problem: str,
        answer: str,
        rule: GradingRule,
        *,
        images: tuple[EncodedImage, ...],
        id: str | None = None,
        options: tuple[str, ...] = (),
        categories: Mapping[str, str] | None = None,
        variant_of: str | None = None,
    ) -> Question:
        """Builds the question of the row.

        Args:
            id: None: the number of the row.
            categories: empty ones are left out.

        Raises:
            RowError: the problem has not one `<image>` per image.
        """
        if (marks := problem.count(IMAGE_MARK)) != len(images):
            raise self.error(f"the problem has {marks} {IMAGE_MARK!r} for {len(images)} image(s)")
        return Question(
            benchmark=self.benchmark,
            id=str(self.number) if id is None else id,
            problem=problem,
            answer=answer,
            rule=rule,
            place=self.place,
            images=images,
            options=options,
            categories={name: value for name, value in (categories or {}).items() if value},
            variant_of=variant_of,
        )


def _is_empty(cell: Any) -> bool:
    """Returns True for a cell of images without an image: nothing, an empty path, or neither bytes nor path."""
    return not (cell.get("bytes") or cell.get("path")) if isinstance(cell, dict) else cell in (None, "")


Reader = Callable[[BenchmarkRow], Question | LeftOut]
"""The reader of a format."""


def marks_before(text: str, images: tuple[EncodedImage, ...]) -> str:
    """Returns a text with the marks of its images before it, as PAPO-Eval and VPPO-Eval have them."""
    return IMAGE_MARK * len(images) + text


def rule_of(answer: str) -> GradingRule:
    """Returns the rule for an answer whose kind nothing else says: a letter is a choice, the rest is mathematics."""
    return GradingRule("mathruler" if letter_of(answer) is None else "choice")
