"""We-Math (We-Math/We-Math): options in one string, separated unevenly, four to seven of them.

The plain accuracy is computed, as the authors do; We-Math's own strict and loose scores are others.
"""

from __future__ import annotations

from megatron_vppo.evaluation.question import Question
from megatron_vppo.evaluation.sources.options import options_in, with_options
from megatron_vppo.evaluation.sources.row import BenchmarkRow, marks_before, rule_of


def read(row: BenchmarkRow) -> Question:
    """Reads a question, with one option per line. Raises RowError if the options cannot be told apart."""
    listed = row.text("option")
    options = options_in(listed)
    if len(options) < 2:
        raise row.error(f"'option' holds no options A., B., ...: {listed[:160]!r}")
    images = row.images("image_path", "image")
    return row.question(
        marks_before(with_options(row.text("question"), options), images),
        answer := row.text("answer"),
        rule_of(answer),
        images=images,
        id=row.optional_text("ID") or None,
        options=options,
        categories={"key": row.optional_text("key"), "concept": row.optional_text("knowledge concept")},
    )
