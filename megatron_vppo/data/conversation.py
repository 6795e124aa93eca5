"""A row that is a conversation: its system turn, its question and its answer, from the turns that a cell holds.

Turns are written as LLaMA-Factory, verl and transformers have them ({'role': 'user', 'content': ...}), or as ShareGPT
has them ({'from': 'human', 'value': ...}). A dataset_info.json of LLaMA-Factory's next to a file may name them
otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vppo.data.graders.answer_text import last_box

_THOUGHT_END = "</think>"
_INFO = "dataset_info.json"


class BadTurns(ValueError):
    """Turns that are not one question with its answer."""


@dataclass(frozen=True, slots=True)
class TurnTags:
    """The names of a turn's fields, and of who speaks; each under its key in LLaMA-Factory's dataset_info.json."""

    role_tag: str
    content_tag: str
    user_tag: str
    assistant_tag: str
    system_tag: str = "system"


MESSAGES = TurnTags("role", "content", "user", "assistant")
SHAREGPT = TurnTags("from", "value", "human", "gpt")
"""LLaMA-Factory's defaults."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One question, and what stands around it."""

    system: str | None
    """None: there is no system turn."""
    question: str
    answer: str | None
    """The last box of the assistant's turn, or else what it says after thinking; None: there is no such turn."""


def is_conversation(cell: Any) -> bool:
    """Returns True for a list of turns, whatever they say."""
    return isinstance(cell, list | tuple) and bool(cell) and all(isinstance(turn, Mapping) for turn in cell)


def read_turns(turns: Any, tags: TurnTags | None) -> Conversation:
    """Reads an optional system turn, one user's turn, and an optional assistant's turn, in this order.

    Args:
        tags: None: those of MESSAGES or SHAREGPT, whichever the turns have.

    Raises:
        BadTurns: there are other turns, more of a kind, or one without a text.
    """
    tags = tags or (MESSAGES if all(MESSAGES.role_tag in turn for turn in turns) else SHAREGPT)
    speakers = {tags.system_tag: "system", tags.user_tag: "user", tags.assistant_tag: "assistant"}
    said: dict[str, str] = {}
    spoken = []
    for number, turn in enumerate(turns):
        name, text = turn.get(tags.role_tag), turn.get(tags.content_tag)
        if name not in speakers:
            known = ", ".join(map(repr, speakers))
            raise BadTurns(f"turn {number} has {tags.role_tag}={name!r}; it should be one of {known}")
        if not isinstance(text, str):
            raise BadTurns(f"turn {number} has no text in {tags.content_tag!r}: {str(text)[:80]!r}")
        said[speakers[name]] = text
        spoken.append(speakers[name])
    if spoken not in (["user"], ["user", "assistant"], ["system", "user"], ["system", "user", "assistant"]):
        raise BadTurns(
            f"the turns are {', '.join(spoken)}; a row is one question: a system turn or none, one user's turn, and "
            "the assistant's turn with the answer or none"
        )
    answer = said.get("assistant")
    return Conversation(said.get("system"), said["user"], None if answer is None else final_answer(answer))


def final_answer(text: str) -> str:
    """Returns what the last box of an answer holds; without one, all that stands behind its thoughts."""
    box = last_box(text)
    return text.rpartition(_THOUGHT_END)[2].strip() if box is None else box


def tags_of_file(file: Path) -> TurnTags | None:
    """Reads how a dataset_info.json next to a data file names its turns; None if there is none, or it says nothing.

    Raises ValueError if it is damaged, or if the names are no texts.
    """
    path = file.parent / _INFO
    try:
        sets = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}, which describes {file.name}, is not valid JSON: {error}") from error
    entries = [one for one in sets.values() if isinstance(one, dict)] if isinstance(sets, dict) else []
    named = next((one for one in entries if one.get("file_name") == file.name), {})
    tags = named.get("tags")
    if tags is None:
        return None
    fields = TurnTags.__dataclass_fields__
    if not isinstance(tags, dict) or not all(isinstance(tags.get(name, ""), str) for name in fields):
        raise ValueError(f"{path}: the tags of {file.name} are {tags!r}; each should be the name of a field or role")
    return TurnTags(**{name: tags.get(name, getattr(SHAREGPT, name)) for name in fields})
