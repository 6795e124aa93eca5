"""The results of a sweep as a Markdown table and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron_vppo.observability.statistics import CONFIDENCE, Estimate
from megatron_vppo.sweep.results import ACCURACY, SweepResults, VariantResults

COLUMNS = (
    "variant", "seeds", "steps", "start, %", "end, %", "questions", "difference, points",
    f"{CONFIDENCE:.0%} interval", "p",
)  # fmt: skip
NOTHING = "–"


def markdown(results: SweepResults) -> str:
    """Writes the table, and notes below it. Accuracies are per cent, mean ± standard error over seeds; differences are
    percentage points, over questions.
    """
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(cells(results, variant) for variant in results.variants)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([table, *(f"\n{note}" for note in notes(results))]) + "\n"


def notes(results: SweepResults) -> list[str]:
    """Says which variants are not compared, and which are compared at an earlier step than their end."""
    found: dict[str, list[str]] = {}
    for variant in results.variants:
        steps = variant.curves[ACCURACY].steps
        if variant.why_not is not None:
            found.setdefault(f"not compared with {results.baseline}: {variant.why_not}", []).append(variant.name)
        elif variant.difference is not None and steps and variant.difference.step != steps[-1]:
            note = f"compared with {results.baseline} at step {variant.difference.step}"
            found.setdefault(note, []).append(variant.name)
    return [f"{', '.join(names)}: {note}" for note, names in found.items()]


def cells(results: SweepResults, variant: VariantResults) -> tuple[str, ...]:
    """Returns the texts of a row."""
    curve = variant.curves[ACCURACY]
    name = f"{variant.name} (baseline)" if variant.name == results.baseline else variant.name
    seeds = f"{len(variant.finished)} of {results.num_seeds}"
    if len(variant.seeds) != len(variant.finished):
        seeds += f" ({len(variant.seeds)} begun)"
    steps = str(curve.steps[-1]) if curve.steps else NOTHING
    start = percent(curve.estimates[0]) if curve.steps[:1] == (0,) else NOTHING
    end = percent(curve.estimates[-1]) if curve.steps else NOTHING
    if variant.difference is None:
        return (name, seeds, steps, start, end, *[NOTHING] * 4)
    test = variant.difference.test
    interval = f"{points(test.low)} .. {points(test.high)}"
    numbers = (f"{test.questions:,}", points(test.difference), interval, p_value(test.p_value))
    return (name, seeds, steps, start, end, *numbers)


def percent(found: Estimate) -> str:
    """Writes a share in per cent, with its standard error if it has one."""
    error = "" if found.error is None else f" ± {found.error * 100:.1f}"
    return f"{found.mean * 100:.1f}{error}"


def points(share: float) -> str:
    """Writes a difference of two shares in percentage points."""
    return f"{share * 100:+.1f}".replace("-", "−")


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def as_json(results: SweepResults) -> dict[str, Any]:
    """Returns all numbers, with shares as shares."""
    return {**asdict(results), "folder": str(results.folder)}
