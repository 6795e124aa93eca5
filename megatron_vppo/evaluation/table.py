"""The results of an evaluation as Markdown tables and as JSON. Accuracies are per cent, differences points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from megatron_vppo.evaluation.results import BenchmarkFigures, EvalResults, RunComparison, RunResults
from megatron_vppo.evaluation.statistics import Measure
from megatron_vppo.observability.statistics import CONFIDENCE, PairedTest

NOTHING = "–"
MEAN, MEAN_UNSEEN = "mean", "mean without benchmarks of selection"
LEAK_MARK = " *"
LEAK_NOTE = "* models were chosen by these questions, so the figure is no measure of new ones"
PUBLISHED_NOTE = (
    "As published: avg@8 at temperature 1.0, exact match of the boxed answer, without intervals. Compare only with a "
    "run of the same protocol and the same questions."
)
INTERVAL = f"{CONFIDENCE:.0%} interval"

Row = tuple[str, ...]


def markdown(results: EvalResults) -> str:
    """Writes everything."""
    return "\n".join([short_markdown(results), *_category_sections(results)])


def short_markdown(results: EvalResults) -> str:
    """Writes everything except categories and variants."""
    parts = [f"# {results.suite}: {results.runs[0].name}\n", *(f"{note}\n" for note in suite_notes(results))]
    for run in results.runs:
        parts.append(f"## {run.name}\n\n{run.model}\n\n{protocol(run)}\n\n{_table(*figures_table(results, run))}")
    for comparison in results.comparisons:
        parts.append(
            f"## {results.runs[0].name} minus {comparison.other}\n\n{_table(*comparison_table(comparison))}"
            + "".join(f"\n{note}\n" for note in comparison_notes(comparison))
        )
    if results.published:
        parts.append(f"## Published\n\n{PUBLISHED_NOTE}\n\n{_table(*published_table(results))}")
    if results.leaked:
        parts.append(f"{LEAK_NOTE}\n")
    return "\n".join(parts)


def suite_notes(results: EvalResults) -> list[str]:
    """Says what the folder has that is not in these results."""
    if not results.elsewhere:
        return []
    return [
        f"Responses to {', '.join(results.elsewhere)} are recorded as well; this suite does not name them, so they are "
        "not in these results"
    ]


def protocol(run: RunResults) -> str:
    """Says in a line how a run's responses were sampled."""
    config = run.config
    rollout, data = config.rollout, config.data
    top_k = "off" if rollout.top_k == -1 else rollout.top_k
    preset = "" if config.preset is None else f"preset {config.preset}: "
    return (
        f"{preset}{rollout.n} sample{'s' * (rollout.n > 1)} per question, temperature {rollout.temperature:g}, top-p "
        f"{rollout.top_p:g}, top-k {top_k}, at most {data.max_response_length:,} tokens, {data.min_pixels:,} to "
        f"{data.max_pixels:,} pixels, seed {config.seed}"
    )


# --- The figures of a run ---------------------------------------------------------------------------------------------


def figures_table(results: EvalResults, run: RunResults) -> tuple[Row, list[Row]]:
    """Returns the head and the rows of a run: one for each benchmark, and the means."""
    n = run.config.rollout.n
    head = (
        "benchmark", "questions", f"avg@{n}, %", INTERVAL, f"pass@{n}, %", f"majority@{n}, %", "truncated, %",
        "no answer, %", "grading errors", "tokens",
    )  # fmt: skip
    rows = [_figures_row(marked(results, name), figures) for name, figures in run.benchmarks.items()]
    for name, average in ((MEAN, run.average), (MEAN_UNSEEN, run.average_unseen)):
        if average is not None and len(run.benchmarks) > 1:
            rows.append((name, f"{average.count:,}", percent(average.mean), interval(average), *[NOTHING] * 6))
    return head, rows


def marked(results: EvalResults, benchmark: str) -> str:
    """Returns the name of a benchmark, with a mark if models were chosen by it."""
    return benchmark + LEAK_MARK * (benchmark in results.leaked)


def _figures_row(name: str, figures: BenchmarkFigures) -> Row:
    result = figures.result
    whole = f"{figures.questions:,}" if figures.questions == figures.of else f"{figures.questions:,} of {figures.of:,}"
    return (
        name, whole, percent(result.average.mean), interval(result.average),
        percent(result.pass_at[result.samples].mean), percent(result.majority.mean), percent(figures.truncated),
        percent(1 - result.answered), f"{figures.errors:,}", f"{figures.length:,.0f}",
    )  # fmt: skip


def percent(share: float) -> str:
    return f"{share * 100:.1f}"


def interval(measure: Measure) -> str:
    return NOTHING if math.isinf(measure.error) else f"{percent(measure.low)} .. {percent(measure.high)}"


# --- Comparisons ------------------------------------------------------------------------------------------------------


def comparison_table(comparison: RunComparison) -> tuple[Row, list[Row]]:
    """Returns the head and the rows of a comparison: one for each benchmark, and one over all questions."""
    head = ("benchmark", "questions", "difference, points", INTERVAL, "p")
    rows = [_test_row(name, test) for name, test in comparison.tests.items()]
    if comparison.overall is not None and len(comparison.tests) > 1:
        rows.append(_test_row("all questions", comparison.overall))
    return head, rows


def comparison_notes(comparison: RunComparison) -> list[str]:
    """Says what the two evaluations do not have in common."""
    notes = [
        f"{name}: {common:,} of {questions:,} questions are compared; the other evaluation has not recorded the rest, "
        "or with another text, image, answer or grader, or it is unfinished here"
        for name, (common, questions) in comparison.unlike.items()
    ]
    if comparison.differences:
        notes.append(f"The two were made with other settings (ours, theirs): {'; '.join(comparison.differences)}")
    return notes


def _test_row(name: str, test: PairedTest) -> Row:
    p = "< 0.001" if test.p_value < 0.001 else f"{test.p_value:.3f}"
    return name, f"{test.questions:,}", points(test.difference), f"{points(test.low)} .. {points(test.high)}", p


def points(share: float) -> str:
    """Writes a difference of two shares in percentage points."""
    return f"{share * 100:+.1f}".replace("-", "−")


# --- Published rows ---------------------------------------------------------------------------------------------------


def published_table(results: EvalResults) -> tuple[Row, list[Row]]:
    """Returns runs and published rows with a column for each benchmark. A mean is over the benchmarks of its row."""
    names = list(results.runs[0].benchmarks)
    head = ("", *(marked(results, name) for name in names), MEAN, "source")
    rows: list[Row] = []
    for run in results.runs:
        found = [run.benchmarks[name].result.average.mean if name in run.benchmarks else None for name in names]
        mean = None if run.average is None else run.average.mean
        rows.append((run.name, *map(_percent_or_nothing, [*found, mean]), "this evaluation"))
    for row in results.published:
        cells = [f"{row.accuracy[name]:.1f}" if name in row.accuracy else NOTHING for name in names]
        same = set(names) == row.accuracy.keys() and row.average is not None
        source = f"{row.source}: {row.note}" if row.note else row.source
        rows.append((f"{row.model} ({row.base})", *cells, f"{row.average:.1f}" if same else NOTHING, source))
    return head, rows


def _percent_or_nothing(share: float | None) -> str:
    return NOTHING if share is None else percent(share)


# --- Categories -------------------------------------------------------------------------------------------------------


def category_table(results: EvalResults, benchmark: str, category: str) -> tuple[Row, list[Row]]:
    """Returns avg@n by value of a category, a column for each run."""
    runs = [run for run in results.runs if benchmark in run.benchmarks]
    tables = [run.benchmarks[benchmark].result.categories.get(category, {}) for run in runs]
    head = (category, "questions", *(text for run in runs for text in (f"{run.name}, %", INTERVAL)))
    rows = []
    for value, measure in tables[0].items():
        found = [table.get(value) for table in tables]
        cells = [text for one in found for text in ((percent(one.mean), interval(one)) if one else (NOTHING, NOTHING))]
        rows.append((value, f"{measure.count:,}", *cells))
    return head, rows


def variants_table(results: EvalResults, benchmark: str) -> tuple[Row, list[Row]] | None:
    """Returns the mean and the worst case over the variants of a question, by run; None if there are no variants."""
    rows: list[Row] = []
    for run in results.runs:
        worst = run.benchmarks[benchmark].result.worst_case if benchmark in run.benchmarks else None
        if worst is not None:
            average, least = worst.average, worst.worst
            cells = (percent(average.mean), interval(average), percent(least.mean), interval(least))
            rows.append((run.name, f"{least.count:,}", *cells))
    head: Row = ("", "questions with variants", "mean of variants, %", INTERVAL, "right in every variant, %", INTERVAL)
    return (head, rows) if rows else None


def _category_sections(results: EvalResults) -> Iterator[str]:
    for name, figures in results.runs[0].benchmarks.items():
        if (variants := variants_table(results, name)) is not None:
            yield f"## {name}: variants\n\n{_table(*variants)}"
        for category in figures.result.categories:
            yield f"## {name} by {category}\n\n{_table(*category_table(results, name, category))}"


def _table(head: Row, rows: Sequence[Row]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(_cell(cell) for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    """Writes a cell of a table: in one line, and without what would end it."""
    return " ".join(text.split()).replace("|", "\\|")


# --- JSON -------------------------------------------------------------------------------------------------------------


def as_json(results: EvalResults) -> dict[str, Any]:
    """Returns all numbers, with shares as shares."""
    return {
        "suite": results.suite,
        "selection_leak": sorted(results.leaked),
        "recorded_outside_suite": list(results.elsewhere),
        "runs": [
            {
                "name": run.name,
                "folder": run.folder,
                "model": run.model,
                "settings": run.config.model_dump(mode="json", exclude={"benchmarks"}),
                "benchmarks": {name: asdict(figures) for name, figures in run.benchmarks.items()},
                "average": None if run.average is None else asdict(run.average),
                "average_without_selection_leak": None if run.average_unseen is None else asdict(run.average_unseen),
            }
            for run in results.runs
        ],
        "comparisons": [asdict(comparison) for comparison in results.comparisons],
        "published": [asdict(row) for row in results.published],
    }
