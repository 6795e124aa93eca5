"""MathVision (MathLLMs/MathVision): one image per question, though several `<imageN>` may speak of parts of it.

Options are texts, or letters alone where the image shows them, or none for a free answer.
"""

from __future__ import annotations

import re

from megatron_vppo.evaluation.question import Question
from megatron_vppo.evaluation.sources.options import LETTERS, with_options
from megatron_vppo.evaluation.sources.row import BenchmarkRow, marks_before, rule_of

_TAG = re.compile(r"<image(\d+)>")


def read(row: BenchmarkRow) -> Question:
    """Reads a question. The image leads; several tags become words, since options may consist of them."""
    options = row.value("options")
    options = [] if options is None else options
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise row.error(f"'options' is no list of texts: {str(options)[:80]!r}")
    texts = [] if [option.strip() for option in options] == list(LETTERS[: len(options)]) else options
    problem = with_options(row.text("question"), texts)
    several = len(set(_TAG.findall(problem))) > 1
    answer = row.text("answer")
    images = row.images("decoded_image", "image")
    return row.question(
        marks_before(_in_words(problem, several=several), images),
        answer,
        rule_of(answer),
        images=images,
        id=row.text("id"),
        options=tuple(_in_words(text, several=several) for text in texts),
        categories={"subject": row.optional_text("subject"), "level": row.optional_text("level")},
    )


def _in_words(text: str, *, several: bool) -> str:
    return _TAG.sub(r"(image \1)" if several else "", text).strip()
