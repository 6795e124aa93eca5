"""Turns of a conversation become a system prompt, a question and an answer, or a reason why they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.data.conversation import (
    BadTurns,
    Conversation,
    TurnTags,
    final_answer,
    is_conversation,
    read_turns,
    tags_of_file,
)


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


QUESTION = turn("user", "<image>How many?")


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([QUESTION], Conversation(None, "<image>How many?", None)),
        ([QUESTION, turn("assistant", "48")], Conversation(None, "<image>How many?", "48")),
        ([turn("system", "Be brief."), QUESTION], Conversation("Be brief.", "<image>How many?", None)),
        (
            [{"from": "system", "value": ""}, {"from": "human", "value": "q"}, {"from": "gpt", "value": r"\boxed{B}"}],
            Conversation("", "q", "B"),
        ),
    ],
)
def test_turns(turns: list[dict[str, Any]], expected: Conversation) -> None:
    assert is_conversation(turns) and read_turns(turns, None) == expected


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([QUESTION, turn("assistant", "3"), QUESTION], "the turns are user, assistant, user; a row is one question"),
        ([QUESTION, QUESTION], "the turns are user, user; a row is one"),
        ([turn("assistant", "3")], "the turns are assistant; a row is one"),
        ([QUESTION, turn("system", "late")], "the turns are user, system; a row is one"),
        ([turn("tool", "x"), QUESTION], r"turn 0 has role='tool'; it should be one of 'system', 'user', 'assistant'"),
        ([QUESTION, turn("assistant", None)], "turn 1 has no text in 'content': 'None'"),
        ([turn("user", [{"type": "text", "text": "q"}])], "turn 0 has no text in 'content'"),
        ([{"role": "user", "content": "q"}, {"from": "gpt", "value": "3"}], "turn 0 has from=None; it should be one"),
    ],
)
def test_other_turns_have_a_reason(turns: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(BadTurns, match=reason):
        read_turns(turns, None)


def test_what_is_no_conversation() -> None:
    assert [is_conversation(cell) for cell in ("text", None, [], ["a.png"], {"role": "user"}, [QUESTION, "x"])] == [
        False
    ] * 6


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48", "48"),
        (" 48 \n", "48"),
        (r"So \boxed{3}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("<think>It is 3.</think>\n\n 4", "4"),
        (r"<think>\boxed{3}?</think> It is \boxed{4}", "4"),
        (r"\boxed{3", r"\boxed{3"),  # not closed
    ],
)
def test_final_answers(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_names_of_turns_from_the_file_next_to_it(tmp_path: Path) -> None:
    data = tmp_path / "mine.json"
    assert tags_of_file(data) is None
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "pupil", "assistant_tag": "teacher"}
    sets = {
        "other": {"file_name": "other.json", "tags": {"role_tag": "x"}},
        "mine": {"file_name": "mine.json", "formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": tags},
        "bare": {"file_name": "bare.json"},
        "hub": {"hf_hub_url": "a/b"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(sets))
    found = tags_of_file(data)
    assert found == TurnTags("who", "says", "pupil", "teacher", "system")
    assert tags_of_file(tmp_path / "bare.json") is tags_of_file(tmp_path / "unnamed.json") is None
    assert read_turns([{"who": "pupil", "says": "q"}, {"who": "teacher", "says": "3"}], found).answer == "3"
    assert tags_of_file(tmp_path / "other.json") == TurnTags("x", "value", "human", "gpt")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.json", "tags": ["x"]}}))
    with pytest.raises(ValueError, match=r"dataset_info\.json: the tags of mine\.json are \['x'\]"):
        tags_of_file(data)
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset_info\.json, which describes mine\.json, is not valid JSON"):
        tags_of_file(data)
