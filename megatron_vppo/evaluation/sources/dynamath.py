"""DynaMath (DynaMath/DynaMath_Sample): 501 questions, each in ten variants with other numbers."""

from __future__ import annotations

import re

from megatron_vppo.data.graders.number import quantity_of
from megatron_vppo.evaluation.grading import pi_as_number
from megatron_vppo.evaluation.question import GradingRule, Question
from megatron_vppo.evaluation.sources.options import options_in
from megatron_vppo.evaluation.sources.row import BenchmarkRow, marks_before, rule_of

_VARIANT = re.compile(r"variant_?(\d+)")
_NUMBER = GradingRule("number", absolute_tolerance=0.001)
"""VLMEvalKit's tolerance (its module dynamath)."""
_TEXT = GradingRule("text")


def read(row: BenchmarkRow) -> Question:
    """Reads a variant, whose number is in the name of its file or split, such as `sample_variant3`."""
    question, answer = row.text("question"), row.text("ground_truth", "answer")
    kind = row.text("answer_type")
    name = row.text("question_id", "id")
    variant = _VARIANT.findall(row.place)
    images = row.images("decoded_image", "image")
    return row.question(
        marks_before(question, images),
        answer,
        _rule(kind, answer),
        images=images,
        id=f"{name} variant {variant[-1]}" if variant else name,
        options=options_in(question) if kind == "multiple choice" else (),
        categories={
            "subject": row.optional_text("subject"),
            "level": row.optional_text("knowledge_level", "level"),
            "answer type": kind,
        },
        variant_of=name,
    )


def _rule(kind: str, answer: str) -> GradingRule:
    """Returns the rule by the type of the answer: float, int, multiple choice, text and single answer."""
    if kind == "multiple choice":
        return rule_of(answer)
    if kind in ("float", "int") and quantity_of(pi_as_number(answer)) is not None:
        return _NUMBER
    return _TEXT
