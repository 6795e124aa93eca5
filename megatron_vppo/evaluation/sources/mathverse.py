"""MathVerse (AI4Math/MathVerse): each problem in up to six versions, which move its content from the text to the image.

`Text Only` has no image, `Vision Only` the question in its image. Free answers need a judge; the authors' set is the
multiple choice alone (`multiple_choice_only`).
"""

from __future__ import annotations

from megatron_vppo.evaluation.question import GradingRule, Question
from megatron_vppo.evaluation.sources.options import options_in
from megatron_vppo.evaluation.sources.row import SHOWN_QUESTION, BenchmarkRow, marks_before

_KINDS = {"multi-choice": GradingRule("choice"), "free-form": GradingRule("mathruler")}


def read(row: BenchmarkRow) -> Question:
    """Reads a version of a problem. Raises RowError for an image that is missing in a version that has one."""
    version = row.text("problem_version")
    kind = row.text("question_type")
    if kind not in _KINDS:
        raise row.error(f"question_type is {kind!r}, and none of {', '.join(_KINDS)}")
    images = row.images("image")
    if not images and version != "Text Only":
        raise row.error(f"'image' is empty in the version {version!r}; only 'Text Only' has no image")
    question = row.optional_text("question") if version == "Vision Only" else row.text("question")
    about = row.value("metadata") if row.has("metadata") else None
    about = about if isinstance(about, dict) else {}
    return row.question(
        marks_before(question or SHOWN_QUESTION, images),
        row.text("answer"),
        _KINDS[kind],
        images=images,
        id=row.text("sample_index"),
        options=options_in(question or row.optional_text("question_for_eval")) if kind == "multi-choice" else (),
        categories={
            "version": version,
            "subject": str(about.get("subject") or ""),
            "subfield": str(about.get("subfield") or ""),
        },
        variant_of=row.text("problem_index"),
    )
