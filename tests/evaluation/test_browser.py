"""The part of an evaluation that is on its page: which questions, within how many bytes."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_vppo.evaluation import browser
from megatron_vppo.evaluation.browser import Shown, pick_shown, surprises
from megatron_vppo.evaluation.results import read_run
from tests.evaluation.test_results import START, TRAINED, Study, make


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder: Path = tmp_path_factory.mktemp("browser")
    make(folder, "start", "trained")
    study = Study(folder)
    study.write("start", START)
    study.write("trained", TRAINED)
    return study


def picked(study: Study, *names: str, budget_bytes: int = 1 << 20) -> Shown:
    runs = [read_run(study.folder / name, study.inputs.benchmarks) for name in names]
    return pick_shown(study.inputs.benchmarks, study.inputs.images, runs, budget_bytes=budget_bytes)


def test_questions_of_all_kinds_come_in_turn(study: Study) -> None:
    """Benchmark one at the start: question 0 is right in one sample, 1 in none, 2 in both."""
    shown = picked(study, "start")
    assert [q["id"] for q in shown.questions if q["benchmark"] == 0] == ["0", "1", "2"]
    assert shown.of == {"one": (3, 3), "two": (3, 3)}


def test_runs_that_disagree_come_first(study: Study) -> None:
    """Benchmark two at the start: questions 1 and 2 are right in one sample. Training changed the second of them."""
    trained = {**TRAINED, "two": [[1, 1], [0, 1], [1, 1]]}
    (study.folder / "third").mkdir(exist_ok=True)
    (study.folder / "third" / "responses" / "two.jsonl").unlink(missing_ok=True)
    (study.folder / "third" / "responses" / "one.jsonl").unlink(missing_ok=True)
    study.write("third", trained)
    shown = picked(study, "start", "third")
    assert [q["id"] for q in shown.questions if q["benchmark"] == 1] == ["2", "0", "1"]


def test_a_question_has_its_image_its_samples_and_those_of_the_others(study: Study) -> None:
    question = picked(study, "start", "trained").questions[0]
    assert (question["problem"], question["answer"], question["grader"]) == ("<image>Which? 0", "0", "mathruler")
    assert [[one["accuracy"] for one in of_run] for of_run in question["runs"]] == [[1.0, 0.0], [1.0, 1.0]]
    first = question["runs"][0][0]
    assert (first["tokens"], first["logps"]) == (["\\boxed", "{1}", "<|im_end|>"], [-0.5, -1.25, 0.0])
    head, data = question["images"][0].split(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (84, 56)


def test_large_images_become_small(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "IMAGE_SIDE", 42)
    data = picked(study, "start").questions[0]["images"][0].split(",")[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (42, 28)


def test_the_page_keeps_within_its_bytes_and_says_what_is_left_out(study: Study) -> None:
    whole = picked(study, "start")
    size = len(json.dumps(whole.questions[0]))
    shown = picked(study, "start", budget_bytes=2 * int(2.5 * size))
    assert shown.of == {"one": (2, 3), "two": (2, 3)}
    tiny = picked(study, "start", budget_bytes=1)
    assert tiny.of == {"one": (1, 3), "two": (1, 3)}, "one question of each benchmark in any case"


def test_long_responses_are_cut(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "MAX_TOKENS", 2)
    shown = picked(study, "start")
    response = shown.questions[0]["runs"][0][0]
    assert (len(response["tokens"]), len(response["logps"]), response["of"]) == (2, 2, 3)
    assert shown.cut_responses == 12


def test_the_numbers_that_tokens_are_shaded_by(study: Study) -> None:
    values = list(surprises(picked(study, "start").questions))
    assert len(values) == 6 * 2 * 3 and set(values) == {0.5, 1.25, 0.0}
