"""MMMU-Pro (MMMU/MMMU_Pro): its standard configurations, of four or ten options, and the one where the image has all.

The options are a Python list in a string. `<image 2>` always means column image_2, wherever it stands in the question
or in an option; options are shuffled, so the marks come in any order. Images that no mark names are not shown: they
explain the solution (MMMU-Benchmark/MMMU, the README of mmmu-pro and issue 70).
"""

from __future__ import annotations

import ast
import re

from megatron_vppo.data.prompts import IMAGE_MARK
from megatron_vppo.evaluation.encoded import EncodedImage
from megatron_vppo.evaluation.question import Question
from megatron_vppo.evaluation.sources.options import with_options
from megatron_vppo.evaluation.sources.row import SHOWN_QUESTION, BenchmarkRow, marks_before, rule_of

_MARK = re.compile(r"<image\s+(\d+)>")


def read(row: BenchmarkRow) -> Question:
    """Reads a question of any configuration. Raises RowError for options that are no list, and missing images."""
    options = _options(row)
    answer = row.text("answer")
    if row.has("question"):
        marked = with_options(row.text("question"), options)
        columns = [f"image_{number}" for number in _MARK.findall(marked)]
        images = tuple(image for column in columns for image in _image(row, column))
        problem = _MARK.sub(IMAGE_MARK, marked)
    else:
        images = _image(row, "image")
        problem = marks_before(SHOWN_QUESTION, images)
    return row.question(
        problem,
        answer,
        rule_of(answer),
        images=images,
        id=row.text("id"),
        options=tuple(options),
        categories={"subject": row.optional_text("subject"), "difficulty": row.optional_text("topic_difficulty")},
    )


def _image(row: BenchmarkRow, column: str) -> tuple[EncodedImage, ...]:
    images = row.images(column)
    if not images:
        raise row.error(f"column {column!r} holds no image, though the question shows it")
    return images


def _options(row: BenchmarkRow) -> list[str]:
    listed = row.value("options")
    try:
        options = ast.literal_eval(listed) if isinstance(listed, str) else listed
    except (ValueError, SyntaxError) as error:
        raise row.error(f"'options' is no list of Python: {listed[:160]!r}") from error
    if not isinstance(options, list) or not 2 <= len(options) <= 10:
        raise row.error(f"'options' is no list of 2 to 10 options: {str(listed)[:160]!r}")
    return [str(option) for option in options]
