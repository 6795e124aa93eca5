"""Rows of our own form, as for training: a problem with its `<image>` marks, an answer, images."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vppo.evaluation.question import GradingRule, Question
from megatron_vppo.evaluation.sources.row import BenchmarkRow


@dataclass(frozen=True, slots=True)
class OwnRows:
    """The reader, with the names of the columns."""

    problem_key: str
    answer_key: str
    image_key: str

    def __call__(self, row: BenchmarkRow) -> Question:
        """Reads a row. A file without a column of images has none."""
        images = row.images(self.image_key) if row.has(self.image_key) else ()
        rule = GradingRule("mathruler")
        return row.question(row.text(self.problem_key), row.text(self.answer_key), rule, images=images)
