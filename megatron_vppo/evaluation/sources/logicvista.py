"""LogicVista: lscpku/LogicVista on the hub, or `data/dataset.json` of its repository with a folder of images.

Answers are a letter, several letters, or a number. A row without an answer is left out: nothing could be right.
"""

from __future__ import annotations

from megatron_vppo.evaluation.grading import letters_of
from megatron_vppo.evaluation.question import GradingRule, Question
from megatron_vppo.evaluation.sources.options import options_in
from megatron_vppo.evaluation.sources.row import BenchmarkRow, LeftOut, marks_before, rule_of


def read(row: BenchmarkRow) -> Question | LeftOut:
    """Reads a question; no column is asked for that one row spells in another way (`sourceli,nk`)."""
    answer = row.optional_text("answer")
    if not answer:
        return LeftOut("it has no answer")
    question = row.text("question")
    letters = letters_of(answer)
    images = row.images("image", "imagename")
    skills = row.value("skill") if row.has("skill") else None
    return row.question(
        marks_before(question, images),
        answer,
        GradingRule("letters") if letters is not None and len(letters) > 1 else rule_of(answer),
        images=images,
        id=row.optional_text("key") or None,
        options=options_in(question),
        categories={"skill": ", ".join(map(str, skills)) if isinstance(skills, list) else str(skills or "")},
    )
