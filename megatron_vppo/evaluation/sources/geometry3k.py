"""Geometry3K (hiyouga/geometry3k): a list of images, their marks in the problem, answers in LaTeX or decimals."""

from __future__ import annotations

from megatron_vppo.evaluation.question import GradingRule, Question
from megatron_vppo.evaluation.sources.row import BenchmarkRow


def read(row: BenchmarkRow) -> Question:
    """Reads a question."""
    return row.question(row.text("problem"), row.text("answer"), GradingRule("mathruler"), images=row.images("images"))
