"""The files of PAPO-Eval and VPPO-Eval: instruction, images in folders and archives, speakers, refusals."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path
from typing import Any

import jinja2
import pytest

from megatron_vppo.data.prompts import read_template
from tests.evaluation.sources.copies import colors, png, questions_of, write_json, write_parquet

PAPO = (
    "You first think through the reasoning process as an internal monologue, enclosed within <think> </think> tags. "
    "Then, provide your final answer enclosed within \\boxed{}."
)
EASYR1 = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. The "
    "reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}."
)


def row(text: str, answer: str = "48", images: tuple[str, ...] = ("./data/images/geo/1.png",)) -> dict[str, Any]:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": list(images)}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The layout of LLaMA-Factory: data/papo/geo.json, images in data/images/geo/."""
    for name, color in (("1", "red"), ("2", "blue")):
        path = tmp_path / "data" / "images" / "geo" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(color))
    return tmp_path / "data" / "papo" / "geo.json"


@pytest.mark.parametrize(
    "end",
    [
        f" {PAPO}",
        f"\n{PAPO}",
        f"\n\n{PAPO}",
        f"\n{PAPO[:-1]}",
        f"\n{PAPO}\n",
        "\n" + PAPO.replace(" Then", "\nThen"),
        f" {EASYR1}",
        "",
    ],
)
def test_the_instruction_is_taken_off(copy: Path, end: str) -> None:
    write_json(copy, [row(f"<image>Find $x$ < 3 / 2.{end}")])
    (question,) = questions_of("sharegpt", copy)
    assert question.problem == "<image>Find $x$ < 3 / 2."
    assert question.answer == "48"
    assert question.rule.kind == "mathruler"
    assert colors(question) == ["red"]


def test_our_format_prompt_gives_the_text_that_papo_eval_has(copy: Path) -> None:
    """The words that are taken off come back, once, by the template of the authors' training."""
    text = f"<image>Find $x$.\n\n{PAPO}"
    write_json(copy, [row(text)])
    (question,) = questions_of("sharegpt", copy)
    template = Path(__file__).resolve().parents[3] / "examples/format_prompt/math_format_perception.jinja"
    assert jinja2.Template(read_template(str(template))).render(content=question.problem) == text


def test_an_instruction_in_other_words_is_refused(copy: Path) -> None:
    write_json(copy, [row(f"<image>Find x. {PAPO}"), row("<image>Find y. Put your answer in \\boxed{}.")])
    with pytest.raises(
        ValueError, match=r"geo\.json, row 1: .*asks for a format in words that are not known.*take the"
    ):
        questions_of("sharegpt", copy)


def test_images_between_the_words_keep_their_places(copy: Path) -> None:
    images = ("./data/images/geo/2.png", "./data/images/geo/1.png")
    write_json(copy, [row(f"Is <image> like <image>? {PAPO}", images=images)])
    (question,) = questions_of("sharegpt", copy)
    assert question.problem == "Is <image> like <image>?"
    assert colors(question) == ["blue", "red"]


def test_marks_that_are_not_as_many_as_images(copy: Path) -> None:
    write_json(copy, [row(f"Find x. {PAPO}")])
    with pytest.raises(ValueError, match=r"row 0: the problem has 0 '<image>' for 1 image"):
        questions_of("sharegpt", copy)


def test_the_other_names_of_llama_factory(copy: Path) -> None:
    turns = [{"from": "human", "value": f"<image>Find x. {PAPO}"}, {"from": "gpt", "value": "5"}]
    write_json(copy, [{"conversations": turns, "images": ["./data/images/geo/1.png"], "id": "geo_0"}])
    (question,) = questions_of("sharegpt", copy)
    assert (question.problem, question.answer, question.id) == ("<image>Find x.", "5", "geo_0")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "user", "content": "x"}], "this one has only user"),
        ([{"role": "system", "content": "x"}], "a turn more, of 'system'"),
        ([{"role": "user", "content": "x"}] * 2, "a turn more, of 'user'"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}], "'assistant' holds no text"),
        ("x", "'messages' is no list of turns"),
    ],
)
def test_what_is_no_question_with_its_answer(copy: Path, turns: Any, message: str) -> None:
    write_json(copy, [{"messages": turns}])
    with pytest.raises(ValueError, match=f"geo.json, row 0: .*{message}"):
        questions_of("sharegpt", copy)


def test_parquet_of_the_hub_with_images_in_an_archive(tmp_path: Path) -> None:
    """PAPO-Galaxy/PAPO_eval: the archive is next to the folder of parquet files, named by the split."""
    rows = [
        {**row(f"<image>Find x. {PAPO}", images=("./data/images/geo/1.png",)), "id": "geo_0"},
        {**row(f"<image>Find y. {PAPO}", images=("./data/images/geo/2.png",)), "id": "geo_1"},
    ]
    path = tmp_path / "data" / "geo-00000-of-00001.parquet"
    write_parquet(path, rows)
    with zipfile.ZipFile(tmp_path / "geo_images.zip", "w") as archive:
        archive.writestr("geo/2.png", png("blue"))
        archive.writestr("geo/1.png", png("red"))
        archive.writestr("__MACOSX/geo/1.png", b"")
    questions = questions_of("sharegpt", path)
    assert [question.id for question in questions] == ["geo_0", "geo_1"]
    assert [colors(question) for question in questions] == [["red"], ["blue"]]
    (tmp_path / "geo_images.zip").rename(tmp_path / "others.zip")
    with pytest.raises(ValueError, match=r"row 0: its image './data/images/geo/1.png' is not in .*set `images`"):
        questions_of("sharegpt", path)
    assert [colors(one) for one in questions_of("sharegpt", path, images=str(tmp_path / "others.zip"))] == [
        ["red"],
        ["blue"],
    ]


def test_another_number_of_rows_than_was_released(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "MathLLMs_MathVision.json"
    write_json(path, [row(f"Find x. {PAPO}", images=())] * 3)
    with caplog.at_level(logging.WARNING):
        questions = questions_of("sharegpt", path)
    assert "MathLLMs_MathVision.json has 3 rows, and 2907 (MathLLMs_MathVision) were released" in caplog.text
    assert [question.id for question in questions] == ["0", "1", "2"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        questions_of("sharegpt", f"{path}@train[:2]")
    assert caplog.text == "", "a part was asked for"
