"""Questions as prompts: tokens as transformers makes them, digests, and what is refused before engines start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor

from megatron_vppo.evaluation.inputs import question_digest
from megatron_vppo.evaluation.question import GradingRule
from tests.evaluation.suites import opened, write_rows


def test_a_prompt_has_the_tokens_of_transformers(tmp_path: Path) -> None:
    _, inputs = opened(tmp_path, "one")
    asked = inputs.benchmarks[0].asked[1]
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which? 1"}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    image = Image.open(tmp_path / "one_1.png")
    size = {"shortest_edge": 3136, "longest_edge": 12544}
    expected = processor(text=[text], images=[image], images_kwargs={"size": size})["input_ids"][0]
    assert list(asked.prompt.token_ids) == list(expected)
    assert (asked.question.id, asked.prompt.split, asked.prompt.row) == ("1", "one", 1)


def test_prompts_that_are_too_long_are_counted(tmp_path: Path) -> None:
    """The prompts of ten rows have the same length but the last, whose number has two digits."""
    rows = write_rows(tmp_path, "many", count=11)
    benchmark = {"name": "many", "source": "rows", "path": str(rows)}
    _, inputs = opened(tmp_path, benchmarks=[benchmark])
    lengths = [len(one.prompt.token_ids) for one in inputs.benchmarks[0].asked]
    assert lengths == [lengths[0]] * 10 + [lengths[0] + 1]
    limits = {"max_prompt_length": lengths[0], "max_response_length": 8, "min_pixels": 3136, "max_pixels": 12544}
    with pytest.raises(ValueError, match=rf"many: 1 of 11 prompts .* the longest {lengths[-1]}; set data.max_prompt"):
        opened(tmp_path, benchmarks=[benchmark], data=limits)


def test_all_missing_copies_are_named_at_once_with_their_hub_ids(tmp_path: Path) -> None:
    benchmarks = [
        {"name": "Geo3K", "source": "geometry3k", "path": str(tmp_path / "nowhere")},
        {"name": "DynaMath", "source": "sharegpt", "path": str(tmp_path / "DynaMath_DynaMath_Sample.json")},
        {"name": "MMK12", "source": "sharegpt", "path": str(tmp_path / "PAPO_MMK12.parquet")},
    ]
    with pytest.raises(ValueError) as caught:
        opened(tmp_path, benchmarks=benchmarks)
    first, *others = str(caught.value).split("\n  - ")
    assert first == "3 of 3 benchmarks cannot be read"
    for line, hub in zip(others, ("hiyouga/geometry3k", "chamber111/VPPO-Eval", "PAPO-Galaxy/PAPO_eval"), strict=True):
        assert f"hf download {hub} --repo-type dataset" in line


def test_a_broken_question_is_refused_or_left_out(tmp_path: Path) -> None:
    rows = write_rows(tmp_path, "one")
    (tmp_path / "one_2.png").write_bytes(b"no image")
    benchmark = {"name": "one", "source": "rows", "path": str(rows)}
    with pytest.raises(ValueError, match="image 0 is unreadable"):
        opened(tmp_path, benchmarks=[benchmark])
    limits = {"max_prompt_length": 120, "max_response_length": 8, "min_pixels": 3136, "max_pixels": 12544}
    _, inputs = opened(tmp_path, benchmarks=[benchmark], data={**limits, "on_bad_row": "skip"})
    (found,) = inputs.benchmarks
    assert ([one.question.id for one in found.asked], found.left_out) == (["0", "1"], 1)
    with rows.open("a") as file:
        file.write("no row\n")
    _, inputs = opened(tmp_path, benchmarks=[benchmark], data={**limits, "on_bad_row": "skip"})
    assert inputs.benchmarks[0].left_out == 2, "a row that is none is counted with a broken image"


def test_the_digest_covers_all_that_is_asked_and_graded_with(tmp_path: Path) -> None:
    _, inputs = opened(tmp_path, "one")
    question = inputs.benchmarks[0].questions[0]
    others = [
        replace(question, problem="<image>Which one?"),
        replace(question, answer="7"),
        replace(question, options=("a", "b")),
        replace(question, rule=GradingRule("choice")),
        replace(question, images=inputs.benchmarks[0].questions[1].images),
    ]
    digests = {question_digest(one) for one in (question, *others)}
    assert len(digests) == 6
    same = replace(question, benchmark="other", id="other", place="elsewhere", categories={"subject": "x"})
    assert question_digest(same) == question_digest(question)
