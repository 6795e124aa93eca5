"""The figures of runs and their comparisons, from recorded responses; the numbers are worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.evaluation.folder import EvalSettings, take_over
from megatron_vppo.evaluation.inputs import EvalInputs
from megatron_vppo.evaluation.results import EvalResults, gather_results, read_run
from megatron_vppo.evaluation.settings import EvalConfig
from tests.evaluation.suites import opened, record, write_records

START = {"one": [[1, 0], [0, 0], [1, 1]], "two": [[0, 0], [0, 1], [1, 0]]}
TRAINED = {"one": [[1, 1], [1, 1], [1, 1]], "two": [[1, 1], [1, 1], [0, 1]]}
Accuracies = dict[str, list[list[int]]]


class Study:
    """Two benchmarks of three questions, and runs of them."""

    def __init__(self, folder: Path, *, leaked: str | None = None) -> None:
        self.folder = folder
        self.template: str | None = None
        config, inputs = opened(folder, "one", "two")
        values = config.model_dump()
        for benchmark in values["benchmarks"]:
            benchmark["selection_leak"] = benchmark["name"] == leaked
        self.config = EvalConfig.model_validate(values)
        self.inputs: EvalInputs = inputs
        for asked, benchmark in zip(inputs.benchmarks, self.config.benchmarks, strict=True):
            object.__setattr__(asked, "benchmark", benchmark)

    def write(self, name: str, accuracies: Accuracies, **fields: Any) -> None:
        take_over(self.folder / name, EvalSettings(f"/models/{name}", "f", self.template, self.config))
        for benchmark in self.inputs.benchmarks:
            rows = accuracies.get(benchmark.name, [])
            write_records(self.folder / name, benchmark.name, [
                record(asked.question.id, asked.digest, sample, float(accuracy), **fields)
                for asked, of_question in zip(benchmark.asked, rows, strict=False)
                for sample, accuracy in enumerate(of_question)
            ])  # fmt: skip

    def results(self, *names: str) -> EvalResults:
        ours, *others = [read_run(self.folder / name, self.inputs.benchmarks) for name in names]
        return gather_results("suite", self.inputs.benchmarks, ours, others)


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir()


def test_the_figures_of_a_run(tmp_path: Path) -> None:
    make(tmp_path, "start")
    study = Study(tmp_path)
    study.write("start", START)
    (run,) = study.results("start").runs
    one, two = run.benchmarks["one"], run.benchmarks["two"]
    assert one.result.average.mean == pytest.approx(3 / 6) and two.result.average.mean == pytest.approx(2 / 6)
    assert one.result.pass_at[2].mean == pytest.approx(2 / 3)
    assert (one.questions, one.of, one.errors, one.truncated, one.length) == (3, 3, 0, 0.0, 3.0)
    assert run.average is not None and run.average.mean == pytest.approx((3 / 6 + 2 / 6) / 2)
    assert run.average_unseen is None, "no benchmark is set apart"
    assert (run.name, run.model) == ("start", "/models/start")


def test_truncated_responses_and_failed_grades_are_counted(tmp_path: Path) -> None:
    make(tmp_path, "start")
    study = Study(tmp_path)
    study.write("start", START, finish_reason="length", error="no result after 10 s")
    one = study.results("start").runs[0].benchmarks["one"]
    assert (one.truncated, one.errors) == (1.0, 6)


def test_a_benchmark_of_selection_is_reported_apart(tmp_path: Path) -> None:
    make(tmp_path, "start", "trained")
    study = Study(tmp_path, leaked="two")
    study.write("start", START)
    study.write("trained", TRAINED)
    results = study.results("trained", "start")
    trained = results.runs[0]
    assert results.leaked == {"two"}
    assert trained.average is not None and trained.average.mean == pytest.approx((1 + 5 / 6) / 2)
    assert trained.average_unseen is not None and trained.average_unseen.mean == pytest.approx(1.0)
    (comparison,) = results.comparisons
    assert set(comparison.tests) == {"one", "two"}
    assert comparison.overall is not None and comparison.overall.questions == 3, "of benchmark one alone"


def test_an_unfinished_run_counts_whole_questions_and_has_no_mean(tmp_path: Path) -> None:
    make(tmp_path, "start")
    study = Study(tmp_path)
    study.write("start", {"one": [[1, 0], [1]]})
    (run,) = study.results("start").runs
    assert list(run.benchmarks) == ["one"]
    assert (run.benchmarks["one"].questions, run.benchmarks["one"].of) == (1, 3)
    assert run.average is None


def test_a_comparison_is_over_the_questions_that_both_have(tmp_path: Path) -> None:
    """Differences per question of benchmark one: 1/2, 1, 0; the third one is not recorded here. Two: 1, 1/2, 0."""
    make(tmp_path, "start", "trained")
    study = Study(tmp_path)
    study.write("start", {**START, "one": START["one"][:2]})
    study.write("trained", TRAINED)
    (comparison,) = study.results("trained", "start").comparisons
    assert comparison.other == "start"
    assert comparison.tests["one"].questions == 2
    assert comparison.tests["one"].difference == pytest.approx((1 / 2 + 1) / 2)
    assert comparison.tests["two"].difference == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert comparison.overall is not None and comparison.overall.questions == 5
    assert comparison.unlike == {"one": (2, 3)}
    assert comparison.overall.difference == pytest.approx((1 / 2 + 1 + 1 + 1 / 2 + 0) / 5)


def test_other_questions_of_the_same_name_are_not_compared(tmp_path: Path) -> None:
    make(tmp_path, "start", "trained")
    study = Study(tmp_path)
    study.write("trained", TRAINED)
    take_over(tmp_path / "start", EvalSettings("/m", "f", None, study.config))
    write_records(tmp_path / "start", "one", [record("0", "0123456789abcdef", k, 1.0) for k in range(2)])
    (comparison,) = study.results("trained", "start").comparisons
    assert comparison.tests == {} and comparison.overall is None
    assert comparison.unlike == {"one": (0, 3), "two": (0, 3)}


def test_recorded_benchmarks_that_the_suite_does_not_name_are_told(tmp_path: Path) -> None:
    make(tmp_path, "start")
    study = Study(tmp_path)
    study.write("start", START)
    assert study.results("start").elsewhere == []
    study.inputs = replace(study.inputs, benchmarks=study.inputs.benchmarks[:1])
    assert study.results("start").elsewhere == ["two"]


def test_folders_of_one_name_are_told_apart_by_those_around_them(tmp_path: Path) -> None:
    make(tmp_path, "x", "x/eval", "y", "y/eval", "z")
    study = Study(tmp_path)
    for name in ("x/eval", "y/eval", "z"):
        study.write(name, START)
    results = study.results("x/eval", "y/eval", "z", "z")
    assert [run.name for run in results.runs] == ["x/eval", "y/eval", "z", "z"]
    assert [one.other for one in results.comparisons] == ["y/eval", "z", "z"]


def test_settings_that_differ_are_told(tmp_path: Path) -> None:
    make(tmp_path, "start", "trained")
    study = Study(tmp_path)
    study.write("start", START)
    study.config = EvalConfig.model_validate({**study.config.model_dump(), "seed": 4})
    study.template = "0123"
    study.write("trained", TRAINED)
    (comparison,) = study.results("trained", "start").comparisons
    assert comparison.differences == ["seed: 4, 1", "the digest of data.format_prompt: 0123, None"]
