"""The benchmarks of a suite: their settings, and the questions of each."""

from __future__ import annotations

from megatron_vppo.config.choices import BenchmarkSource, Grading
from megatron_vppo.config.ranges import FilePath, PositiveOrZero, ShareAboveZero, Text
from megatron_vppo.config.schema import Section
from megatron_vppo.evaluation.question import Question


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
    """Leaves out questions with a free answer (MathVerse, as the authors do)."""
    selection_leak: bool = False
    """True where models were chosen by these very questions (MMK12: the authors' validation set); it is reported
    apart."""
    prompt_key: Text = "problem"
    answer_key: Text = "answer"
    image_key: Text = "images"
    """Columns of the source 'rows'."""


def read_questions(benchmark: Benchmark) -> list[Question]:
    """Reads all questions of a benchmark.

    Raises ValueError with file, row and what to do about it.
    """
    raise NotImplementedError
