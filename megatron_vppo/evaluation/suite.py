"""The benchmarks of a suite: their settings, and the questions of each."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from megatron_vppo.config.choices import BadRows, BenchmarkSource, Grading
from megatron_vppo.config.ranges import FilePath, PositiveOrZero, ShareAboveZero, Text
from megatron_vppo.config.schema import Section
from megatron_vppo.data.dataset import RowError
from megatron_vppo.evaluation.grading import check_answer
from megatron_vppo.evaluation.opening import numbered, rows_of
from megatron_vppo.evaluation.question import GradingRule, Question
from megatron_vppo.evaluation.released import unlike_release
from megatron_vppo.evaluation.sources import (
    dynamath,
    geometry3k,
    logicvista,
    mathverse,
    mathvision,
    mmk12,
    mmmu_pro,
    sharegpt,
    we_math,
)
from megatron_vppo.evaluation.sources.own_rows import OwnRows
from megatron_vppo.evaluation.sources.row import BenchmarkRow, LeftOut, Reader
from megatron_vppo.system.visible import visible

_CHOICES = ("choice", "letters")
_NATIVE_SOURCE = "a `source` that says which questions are multiple choice, such as mathverse"

logger = logging.getLogger(__name__)


class Benchmark(Section):
    """One benchmark. Tolerances are those of the grader that is set; without one the source decides how to grade."""

    name: Text
    """The name on pages and in files; unique in the suite."""
    source: BenchmarkSource
    """The format: 'rows' (our own, as for training), 'sharegpt' (PAPO-Eval, VPPO-Eval), or a benchmark's native one."""
    path: FilePath
    """File or folder, as `path` or `path@split`; a split may be cut, as in `path@test[:100]`."""
    images: FilePath | None = None
    """Folder or zip archive that relative paths of images are taken from; None: the source's own place."""
    grader: Grading | None = None
    """None: that of the source, which may differ from question to question."""
    relative_tolerance: PositiveOrZero = 0.0
    absolute_tolerance: PositiveOrZero = 0.0
    """Both are those of the grader 'number'."""
    iou_threshold: ShareAboveZero = 0.5
    """The least overlap that the grader 'iou' counts as right."""
    multiple_choice_only: bool = False
    """True leaves out questions with a free answer (MathVerse, as the authors do)."""
    selection_leak: bool = False
    """True where models were chosen by these very questions (MMK12: the authors' validation set); it is reported
    apart."""
    prompt_key: Text = "problem"
    answer_key: Text = "answer"
    image_key: Text = "images"
    """Columns of the source 'rows'."""

    @model_validator(mode="after")
    def _refuse_settings_without_effect(self) -> Benchmark:
        """Refuses a setting that this grader, or this source, does not look at."""
        without_effect = [
            (
                self.relative_tolerance or self.absolute_tolerance,
                self.grader == "number",
                "tolerances",
                "grader: number",
            ),
            ("iou_threshold" in self._changed(), self.grader == "iou", "iou_threshold", "grader: iou"),
            (
                self._changed() & {"prompt_key", "answer_key", "image_key"},
                self.source == "rows",
                "keys",
                "source: rows",
            ),
            (
                self.multiple_choice_only,
                self.source not in ("rows", "sharegpt"),
                "multiple_choice_only",
                _NATIVE_SOURCE,
            ),
        ]
        for is_set, is_used, setting, need in without_effect:
            if is_set and not is_used:
                raise PydanticCustomError(
                    "no_effect",
                    "{setting} would have no effect; leave it out, or set {need}",
                    {"setting": setting, "need": need},
                )
        return self

    def _changed(self) -> set[str]:
        """Returns the settings that are not at their defaults. A file that was written has all of them."""
        fields = type(self).model_fields
        return {name for name in fields if getattr(self, name) != fields[name].default}


READERS: dict[BenchmarkSource, Reader] = {
    "sharegpt": sharegpt.read,
    "mathverse": mathverse.read,
    "dynamath": dynamath.read,
    "mmk12": mmk12.read,
    "geometry3k": geometry3k.read,
    "mathvision": mathvision.read,
    "we_math": we_math.read,
    "logicvista": logicvista.read,
    "mmmu_pro": mmmu_pro.read,
}
"""The reader of each format but our own, whose columns have settings."""


def read_questions(benchmark: Benchmark, *, on_bad_row: BadRows) -> tuple[list[Question], int]:
    """Reads the questions of a benchmark. Rows that are left out, and a number other than was released, are told.

    Returns:
        The questions, and the number of bad rows, which are left out under on_bad_row=skip.

    Raises:
        ValueError: naming the file, the row and what to do: the copy is not there or damaged, a row is not of the
            source's form under on_bad_row=error, the grader does not take an answer, or no question is left.
    """
    rows, whole = rows_of(benchmark.name, benchmark.source, benchmark.path, benchmark.images)
    if whole and (warning := unlike_release(benchmark.source, benchmark.path, len(rows))):
        logger.warning("%s", visible(f"benchmark {benchmark.name!r}: {warning}"))
    questions, bad = _questions_of(benchmark, rows, on_bad_row)
    try:
        if rows:
            rows[0].image_places.check()  # all rows have the same
    except ValueError as error:
        raise ValueError(f"benchmark {benchmark.name!r}: {error}") from error
    if benchmark.multiple_choice_only:
        questions = [question for question in questions if question.rule.kind in _CHOICES]
    if not questions:
        raise ValueError(
            f"benchmark {benchmark.name!r}: none of the {len(rows)} rows of {benchmark.path} is left"
            + ("; leave out `multiple_choice_only`" if benchmark.multiple_choice_only else "")
            + (f"; the first of {len(bad)} bad ones: {bad[0]}" if bad else "")
        )
    if benchmark.grader is not None:
        rule = GradingRule(
            benchmark.grader, benchmark.relative_tolerance, benchmark.absolute_tolerance, benchmark.iou_threshold
        )
        questions = [replace(question, rule=rule) for question in questions]
    for question in questions:
        try:
            check_answer(question.answer, rule=question.rule)
        except ValueError as error:
            raise ValueError(f"{question.place}: {error} of benchmark {benchmark.name!r}") from error
    ids = numbered([question.id for question in questions])
    return [replace(question, id=id) for question, id in zip(questions, ids, strict=True)], len(bad)


def _questions_of(
    benchmark: Benchmark, rows: Sequence[BenchmarkRow], on_bad_row: BadRows
) -> tuple[list[Question], list[RowError]]:
    """Reads every row, and tells how many are left out, and why. Returns the questions and the bad rows."""
    own = OwnRows(benchmark.prompt_key, benchmark.answer_key, benchmark.image_key)
    read = own if benchmark.source == "rows" else READERS[benchmark.source]
    questions = []
    bad: list[RowError] = []
    reasons: Counter[str] = Counter()
    for row in rows:
        try:
            found = read(row)
        except RowError as error:
            if on_bad_row == "error":
                raise
            bad.append(error)
            continue
        match found:
            case LeftOut(reason):
                reasons[reason] += 1
            case question:
                questions.append(question)
    if bad:
        reasons[f"they cannot be read, the first because of: {bad[0]}"] = len(bad)
    for reason, count in reasons.items():
        logger.warning(
            "%s", visible(f"benchmark {benchmark.name!r}: {count} of {len(rows)} rows are left out: {reason}")
        )
    return questions, bad
