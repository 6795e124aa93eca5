"""MMK12 (FanqingM/MMK12): questions of four subjects, options in the text, the answer a letter."""

from __future__ import annotations

from megatron_vppo.data.prompts import IMAGE_MARK
from megatron_vppo.evaluation.question import Question
from megatron_vppo.evaluation.sources.options import options_in
from megatron_vppo.evaluation.sources.row import BenchmarkRow, marks_before, rule_of


def read(row: BenchmarkRow) -> Question:
    """Reads a question."""
    question, answer = row.text("question"), row.text("answer")
    images = row.images("image", "images")
    return row.question(
        question if IMAGE_MARK in question else marks_before(question, images),
        answer,
        rule_of(answer),
        images=images,
        id=row.optional_text("id") or None,
        options=options_in(question),
        categories={"subject": row.optional_text("subject")},
    )
