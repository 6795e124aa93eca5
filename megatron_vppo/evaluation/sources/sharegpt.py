"""The files of PAPO-Eval and VPPO-Eval: conversations of one question and its answer, as LLaMA-Factory takes them.

A JSON list, or parquet from the hub (PAPO-Galaxy/PAPO_eval: `data/<split>-00000-of-00001.parquet`, images in
`<split>_images.zip`). An instruction on the format of responses is part of each question there; it is taken off, since
a run puts its own format prompt around the question.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_vppo.evaluation.question import GradingRule, Question
from megatron_vppo.evaluation.sources.row import BenchmarkRow

_INSTRUCTIONS = (
    # PAPO-Eval and VPPO-Eval, after one or two line ends or a space
    r"You first think through the reasoning process as an internal monologue, enclosed within <think> </think> tags\. "
    r"Then, provide your final answer enclosed within \\boxed\{\}\.?",
    # EasyR1's examples/format_prompt/math.jinja, of which PAPO's grew
    r"You FIRST think about the reasoning process as an internal monologue and then provide the final answer\. The "
    r"reasoning process MUST BE enclosed within <think> </think> tags\. The final answer MUST BE put in \\boxed\{\}\.?",
)
_INSTRUCTION = re.compile(
    r"\s*(?:" + "|".join(text.replace(" ", r"\s+") for text in _INSTRUCTIONS) + r")\s*$", re.IGNORECASE
)
_LIKE_AN_INSTRUCTION = re.compile(r"\\boxed|</?think>|</?answer>")
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
"""The speakers by both sets of tags that LLaMA-Factory knows: role/content and from/value."""


def read(row: BenchmarkRow) -> Question:
    """Reads a conversation. Raises RowError if a question ends with an instruction that is not known."""
    turns = row.value("messages", "conversations")
    spoken = _texts_by_speaker(row, turns)
    text = spoken["user"]
    question = _INSTRUCTION.sub("", text).strip()
    if _LIKE_AN_INSTRUCTION.search(question):
        raise row.error(
            f"the question asks for a format in words that are not known: {question[-160:]!r}. A run would ask for a "
            "second one; take the instruction out of the file"
        )
    images = row.images("images") if row.has("images") else ()
    id = row.optional_text("id") or None
    return row.question(question, spoken["assistant"], GradingRule("mathruler"), images=images, id=id)


def _texts_by_speaker(row: BenchmarkRow, turns: Any) -> dict[str, str]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise row.error(f"'messages' is no list of turns: {str(turns)[:80]!r}")
    spoken = {}
    for turn in turns:
        role = str(turn.get("role", turn.get("from")))
        text = turn.get("content", turn.get("value"))
        if role not in _ROLES or _ROLES[role] in spoken:
            raise row.error(f"a conversation is one question and one answer; this one has a turn more, of {role!r}")
        if not isinstance(text, str) or not text.strip():
            raise row.error(f"the turn of {role!r} holds no text: {str(text)[:80]!r}")
        spoken[_ROLES[role]] = text.strip()
    if len(spoken) != 2:
        raise row.error(f"a conversation is one question and one answer; this one has only {', '.join(spoken)}")
    return spoken
