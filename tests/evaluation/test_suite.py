"""A benchmark's settings: our own rows, graders and their tolerances, and what is said of a wrong copy."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from megatron_vppo.config.choices import BenchmarkSource
from megatron_vppo.evaluation.question import GradingRule
from megatron_vppo.evaluation.suite import READERS, Benchmark, read_questions
from tests.evaluation.sources.copies import colors, png, questions_of, write_json, write_parquet

ROWS = [
    {"question": "<image>How many?", "solution": "3", "image": "red.png"},
    {"question": "Two and two?", "solution": "4", "image": None},
]
KEYS: dict[str, Any] = {"prompt_key": "question", "answer_key": "solution", "image_key": "image"}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "red.png").write_bytes(png("red"))
    write_json(tmp_path / "rows.json", ROWS)
    return tmp_path / "rows.json"


def test_rows_of_our_own_form(rows: Path) -> None:
    questions = questions_of("rows", rows, images=str(rows.parent / "images"), **KEYS)
    assert [(one.id, one.problem, one.answer) for one in questions] == [
        ("0", "<image>How many?", "3"),
        ("1", "Two and two?", "4"),
    ]
    assert [colors(question) for question in questions] == [["red"], []]
    assert questions[0].rule == GradingRule("mathruler")
    assert questions[0].benchmark == "tiny"


def test_the_grader_that_is_set_wins_with_its_tolerances(rows: Path) -> None:
    settings = {**KEYS, "images": str(rows.parent / "images"), "grader": "number", "relative_tolerance": 0.05}
    questions = questions_of("rows", rows, **settings)
    assert {question.rule for question in questions} == {GradingRule("number", 0.05, 0.0, 0.5)}


def test_an_answer_that_the_grader_does_not_take_is_named_with_its_row(rows: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"rows\.json, row 0: the grader 'choice' does not take the answer '3'; set another `grader` of",
    ):
        questions_of("rows", rows, images=str(rows.parent / "images"), grader="choice", **KEYS)


def test_a_copy_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'tiny': .*/none\.parquet does not exist\. Benchmarks are read from local copies"
    ):
        questions_of("geometry3k", tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"hiyouga/geometry3k does not exist"):
        questions_of("geometry3k", "hiyouga/geometry3k@test")


def test_a_wrong_column(rows: Path) -> None:
    with pytest.raises(
        ValueError, match=r"rows\.json, row 0: the file has no column 'problem'; it has question, solution"
    ):
        questions_of("rows", rows)


def test_an_image_that_is_missing_is_not_replaced_by_one_of_its_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as opened:
        for member in ("a/1.png", "b/2.png"):
            opened.writestr(member, png("red"))
    rows = [{"problem": "<image>x", "answer": "1", "images": [path]} for path in ("a/1.png", "c/2.png")]
    write_json(tmp_path / "rows.json", rows)
    with pytest.raises(ValueError, match=r"benchmark 'tiny': the image 'c/2\.png' is not in"):
        questions_of("rows", tmp_path / "rows.json", images=str(tmp_path / "images.zip"))


def test_a_damaged_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"problem": "x", "answer": "1"}\n{"problem": \n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 1: not valid JSON.* \[line 2\]"):
        questions_of("rows", tmp_path / "rows.jsonl")


def test_rows_that_cannot_be_read_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    good = '{"problem": "x", "answer": "1"}\n'
    rows.write_text(good + '{"problem": \n{"problem": "y", "answer": ""}\n' + good)
    benchmark = Benchmark(name="tiny", source="rows", path=str(rows))
    questions, left_out = read_questions(benchmark, on_bad_row="skip")
    assert ([one.id for one in questions], left_out) == (["0", "3"], 2)
    rows.write_text('{"problem": "y", "answer": ""}\n')
    with pytest.raises(ValueError, match=r"none of the 1 rows of .* is left; .*row 0: 'answer' is empty"):
        read_questions(benchmark, on_bad_row="skip")


def test_every_source_has_a_reader() -> None:
    assert {"rows", *READERS} == {*get_args(BenchmarkSource)}


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="pathh"):
        Benchmark(name="x", source="rows", path="x.json", pathh="y")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("rows", {"relative_tolerance": 0.1}, "tolerances would have no effect; leave it out, or set grader: number"),
        ("rows", {"grader": "choice", "absolute_tolerance": 0.1}, "set grader: number"),
        ("rows", {"grader": "number", "iou_threshold": 0.7}, "iou_threshold would have no effect"),
        ("mmk12", {"answer_key": "solution"}, "keys would have no effect; leave it out, or set source: rows"),
        ("sharegpt", {"multiple_choice_only": True}, "set a `source` that says which questions are multiple choice"),
    ],
)
def test_settings_without_effect_are_refused(source: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Benchmark(name="x", source=source, path="x.json", **settings)


def test_a_benchmark_that_was_written_with_all_settings_can_be_read_again() -> None:
    benchmark = Benchmark(name="x", source="mmk12", path="x.json", selection_leak=True)
    assert Benchmark.model_validate(benchmark.model_dump(mode="json")) == benchmark


ARCHIVES = {
    "AI4Math_MathVerse": "AI4Math_MathVerse_images.zip",
    "PAPO_MMK12": "PAPO_MMK12_test_images.zip",
    "hiyouga_geometry3k": "hiyouga_geometry3k_images.zip",
    "We_Math": "We-Math_We-Math_images.zip",
    "lscpku_LogicVista": "lscpku_LogicVista_images.zip",
    "MMMU_MMMU_Pro": "MMMU_MMMU_Pro_images.zip",
}
"""The archives of PAPO-Galaxy/PAPO_eval by split: four are named by it, two are not (prepare_data of PAPO-Eval)."""


def test_the_suite_of_the_paper_reads_copies_as_the_hub_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = yaml.safe_load((Path(__file__).resolve().parents[2] / "examples/eval/vppo8.yaml").read_text())
    monkeypatch.chdir(tmp_path)

    def row(folder: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": "<image>How many?"}, {"role": "assistant", "content": "3"}]
        return {"messages": turns, "images": [f"./data/images/{folder}/1.png"]}

    papo = Path("data/eval/PAPO_eval")
    for split, archive in ARCHIVES.items():
        write_parquet(papo / "data" / f"{split}-00000-of-00001.parquet", [row(split)])
        with zipfile.ZipFile(papo / archive, "w") as opened:
            opened.writestr(f"{split}/1.png", png("red"))
    for name in ("DynaMath_DynaMath_Sample", "MathLLMs_MathVision"):
        write_json(Path(f"data/eval/VPPO-Eval/data/vppo/{name}.json"), [row(name)])
        image = Path(f"data/eval/VPPO-Eval/data/images/{name}/1.png")
        image.parent.mkdir(parents=True)
        image.write_bytes(png("blue"))
    found = {
        settings["name"]: [
            colors(question) for question in read_questions(Benchmark(**settings), on_bad_row="error")[0]
        ]
        for settings in suite["benchmarks"]
    }
    in_folders = {key: [["blue"]] for key in ("DynaMath", "MathVision")}
    assert found == {name: in_folders.get(name, [["red"]]) for name in found}
    assert len(found) == 8
