"""The results of an evaluation and of those that it is compared with, from their recorded responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_vppo.evaluation.folder import EvalSettings, differing_protocol, read_settings
from megatron_vppo.evaluation.inputs import AskedBenchmark
from megatron_vppo.evaluation.published import MAIN, PublishedRow
from megatron_vppo.evaluation.question import Question
from megatron_vppo.evaluation.responses import RecordedSample, recorded_samples, response_path
from megatron_vppo.evaluation.settings import EvalConfig
from megatron_vppo.evaluation.statistics import BenchmarkResult, Measure, compare, suite_average, summarise
from megatron_vppo.observability.statistics import PairedTest

Samples = Mapping[str, Sequence[RecordedSample]]
"""By the id of a question: its samples in order."""


@dataclass(frozen=True)
class BenchmarkFigures:
    """One model on one benchmark."""

    questions: int
    of: int
    """The questions of the benchmark; all of them, unless the evaluation is unfinished."""
    result: BenchmarkResult
    truncated: float
    """The share of responses that ended at the length limit."""
    errors: int
    """Responses whose grading failed or took too long; they count as wrong."""
    length: float
    """The mean length of a response, in tokens."""


@dataclass(frozen=True)
class RunResults:
    """One evaluation."""

    name: str
    """The name of its folder, after those of the folders around it that tell it from the others'."""
    folder: str
    model: str
    config: EvalConfig
    benchmarks: Mapping[str, BenchmarkFigures]
    """By name, in the order of the suite; those of which some question is whole."""
    average: Measure | None
    """The mean over all benchmarks of the suite; None: not all are whole."""
    average_unseen: Measure | None
    """The mean without those that models were chosen by; None: as above, or there are none of either kind."""


@dataclass(frozen=True)
class RunComparison:
    """This evaluation against another, on the questions that both have."""

    other: str
    """The name of the other, as in its RunResults."""
    tests: Mapping[str, PairedTest]
    """By benchmark: our mean accuracy minus theirs. Benchmarks without a common question are left out."""
    overall: PairedTest | None
    """Over all common questions of benchmarks that models were not chosen by, each with the same weight."""
    unlike: Mapping[str, tuple[int, int]]
    """By benchmark of which not all questions are compared: those that are, and all."""
    differences: Sequence[str]
    """Settings that differ and on which responses depend: name, our value, theirs."""


@dataclass(frozen=True)
class EvalResults:
    """Everything that results are shown from."""

    suite: str
    """The name of the suite's file."""
    leaked: frozenset[str]
    """The benchmarks that models were chosen by."""
    elsewhere: Sequence[str]
    """The benchmarks that this evaluation's folder has responses to, and that the suite does not name."""
    runs: Sequence[RunResults]
    """This one, and then the others."""
    comparisons: Sequence[RunComparison]
    published: Sequence[PublishedRow]
    """Main results of the paper on some of these benchmarks."""


@dataclass(frozen=True)
class RecordedRun:
    """An evaluation as its folder has it."""

    folder: Path
    settings: EvalSettings
    samples: Mapping[str, Samples]
    """By benchmark."""


def read_run(out: Path, benchmarks: Sequence[AskedBenchmark]) -> RecordedRun:
    """Reads what a folder has of these benchmarks.

    Raises ValueError if it is no folder of an evaluation.
    """
    return RecordedRun(
        folder=out,
        settings=read_settings(out),
        samples={one.name: recorded_samples(out, one.name, one.digests) for one in benchmarks},
    )


def gather_results(
    suite: str, benchmarks: Sequence[AskedBenchmark], ours: RecordedRun, others: Sequence[RecordedRun]
) -> EvalResults:
    """Computes all figures."""
    names = _names([run.folder for run in (ours, *others)])
    leaked = frozenset(one.name for one in benchmarks if one.benchmark.selection_leak)
    return EvalResults(
        suite=suite,
        leaked=leaked,
        elsewhere=[
            one.name
            for one in ours.settings.config.benchmarks
            if one.name not in ours.samples and response_path(ours.folder, one.name).exists()
        ],
        runs=[_results_of(run, name, benchmarks, leaked) for run, name in zip((ours, *others), names, strict=True)],
        comparisons=[
            _compared(ours, other, name, benchmarks, leaked) for other, name in zip(others, names[1:], strict=True)
        ],
        published=[row for row in MAIN if any(one.name in row.accuracy for one in benchmarks)],
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest end of each folder's path that no other folder has."""
    paths = [folder.resolve().parts for folder in folders]
    lengths = [
        next(n for n in range(1, len(path) + 1) if all(other == path or other[-n:] != path[-n:] for other in paths))
        for path in paths
    ]
    return ["/".join(path[-length:]) for path, length in zip(paths, lengths, strict=True)]


def _results_of(
    run: RecordedRun, name: str, benchmarks: Sequence[AskedBenchmark], leaked: frozenset[str]
) -> RunResults:
    n = run.settings.config.rollout.n
    figures = {
        one.name: found
        for one in benchmarks
        if (found := _figures(one.questions, _whole(run.samples[one.name], n))) is not None
    }
    is_whole = all(one.name in figures and figures[one.name].questions == len(one.asked) for one in benchmarks)
    unseen = [one.name for one in benchmarks if one.name not in leaked]
    return RunResults(
        name=name,
        folder=str(run.folder),
        model=run.settings.model,
        config=run.settings.config,
        benchmarks=figures,
        average=suite_average([one.result.average for one in figures.values()]) if is_whole else None,
        average_unseen=(
            suite_average([figures[name].result.average for name in unseen])
            if is_whole and unseen and len(unseen) < len(benchmarks)
            else None
        ),
    )


def _whole(samples: Samples, n: int) -> Samples:
    """Returns the questions of which all n samples are recorded."""
    return {question: of_question for question, of_question in samples.items() if len(of_question) == n}


def _figures(questions: Sequence[Question], samples: Samples) -> BenchmarkFigures | None:
    whole = [question for question in questions if question.id in samples]
    if not whole:
        return None
    outcomes = [samples[question.id] for question in whole]
    every = [outcome for of_question in outcomes for outcome in of_question]
    return BenchmarkFigures(
        questions=len(whole),
        of=len(questions),
        result=summarise(whole, [[one.graded for one in of_question] for of_question in outcomes]),
        truncated=sum(one.truncated for one in every) / len(every),
        errors=sum(one.error is not None for one in every),
        length=sum(one.length for one in every) / len(every),
    )


def _compared(
    ours: RecordedRun, theirs: RecordedRun, name: str, benchmarks: Sequence[AskedBenchmark], leaked: frozenset[str]
) -> RunComparison:
    tests: dict[str, PairedTest] = {}
    unlike: dict[str, tuple[int, int]] = {}
    pooled: list[tuple[Question, Sequence[RecordedSample], Sequence[RecordedSample]]] = []
    for benchmark in benchmarks:
        mine = _whole(ours.samples[benchmark.name], ours.settings.config.rollout.n)
        other = _whole(theirs.samples[benchmark.name], theirs.settings.config.rollout.n)
        common = [
            (question, mine[question.id], other[question.id])
            for question in benchmark.questions
            if question.id in mine and question.id in other
        ]
        if len(common) < len(benchmark.asked):
            unlike[benchmark.name] = (len(common), len(benchmark.asked))
        if common:
            tests[benchmark.name] = _test(common)
        if benchmark.name not in leaked:
            pooled += [(_told_apart(question), mine, other) for question, mine, other in common]
    return RunComparison(
        other=name,
        tests=tests,
        overall=_test(pooled) if pooled else None,
        unlike=unlike,
        differences=[
            f"{name}: {mine}, {their}" for name, their, mine in differing_protocol(theirs.settings, ours.settings)
        ],
    )


def _told_apart(question: Question) -> Question:
    """Returns a question whose names hold that of its benchmark."""
    variant_of = None if question.variant_of is None else f"{question.benchmark}/{question.variant_of}"
    return replace(question, id=f"{question.benchmark}/{question.id}", variant_of=variant_of)


def _test(common: Sequence[tuple[Question, Sequence[RecordedSample], Sequence[RecordedSample]]]) -> PairedTest:
    questions, mine, other = zip(*common, strict=True)
    return compare(
        questions,
        [[one.graded for one in of_question] for of_question in mine],
        [[one.graded for one in of_question] for of_question in other],
    )
