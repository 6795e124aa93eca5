"""The share of responses that keep the format, before the first update: said once, and warned of where it is none."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from megatron_vppo.algorithm.types import GradedResponse, Prompt, Response, Reward
from megatron_vppo.trainer.format_share import LEAST_SHARE, FormatShare, share_of_format


def graded(*kept: float, problem: str = "q", name: str = "format") -> list[GradedResponse]:
    prompt = Prompt("val", 0, problem, "a", (1,), (1,), (), ())
    response = Response(prompt, 0, 0, (5,), (0.0,), "stop", 0)
    return [GradedResponse(response, "", Reward(0.5, 0.25, {name: one})) for one in kept]


def looked(items: list[GradedResponse], caplog: pytest.LogCaptureFixture, **more: Any) -> tuple[list[str], str]:
    said: list[str] = []
    share = FormatShare(**{"grader": "mathruler", "asks": True, "has_tokens": True, "say": said.append, **more})
    with caplog.at_level(logging.WARNING):
        share.look(items, where="of the first step")
        share.look(items, where="of a later one")
    return said, caplog.text


def test_shares() -> None:
    assert share_of_format(graded(1.0, 0.0, 0.0, 1.0, 0.0), grader="mathruler") == 0.4
    assert share_of_format(graded(1.0, name="other"), grader="mathruler") is None
    assert share_of_format(graded(1.0, name="other"), grader="format") == 0.25, "the grader's own accuracy"


def test_none_is_warned_of_with_the_fix(caplog: pytest.LogCaptureFixture) -> None:
    said, warned = looked(graded(*[0.0] * 49, 1.0, 1.0)[:50], caplog)
    assert said == ["format: 2.0% of 50 responses of the first step keep it"]
    assert warned.count("the prompt asks for <think>, and 2.0% of the responses before the first update keep the") == 1
    assert "which is below 5%. The tokenizer has tokens" in warned and "set data.plain_think_tokens=true" in warned


def test_plain_tags_have_another_reason(caplog: pytest.LogCaptureFixture) -> None:
    _, warned = looked(graded(0.0), caplog, has_tokens=False)
    assert "plain text to the tokenizer already" in warned and "plain_think_tokens" not in warned


@pytest.mark.parametrize(
    ("items", "settings", "warns"),
    [
        (graded(*[0.0] * 19, 1.0), {}, False),  # LEAST_SHARE itself
        (graded(0.0), {"asks": False}, False),
        (graded(0.0, problem="Write <think> first."), {"asks": False}, True),
        (graded(0.0, name="other"), {}, False),
    ],
)
def test_when_it_is_warned_of(items, settings, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert LEAST_SHARE == 1 / 20
    assert bool(looked(items, caplog, **settings)[1]) == warns
