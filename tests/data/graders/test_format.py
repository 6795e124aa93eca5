"""The format reward against the regular expression of EasyR1's math reward."""

from __future__ import annotations

import itertools
import re

import pytest

from megatron_vppo.data.graders.format import grade, keeps_format
from megatron_vppo.data.graders.grade import Grade

EXPRESSION = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)
PIECES = ("<think>", "</think>", r"\boxed{", "}", "\nx")


def test_it_agrees_with_the_expression_on_every_order_of_its_pieces() -> None:
    texts = ["".join(pieces) for n in range(7) for pieces in itertools.product(PIECES, repeat=n)]
    expected = [EXPRESSION.fullmatch(text) is not None for text in texts]
    assert len(texts) == (5**7 - 1) // 4 and 100 < sum(expected) < len(texts) / 2
    assert [keeps_format(text) for text in texts] == expected


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<think>a</think>\\boxed{4}", 1.0),
        (" < think >\na\n< / think >\n\\boxed{4}", 1.0),  # of Qwen2.5-VL-32B, as the authors note
        ("So: <think>a</think>\\boxed{4}", 0.0),
        ("<think>a</think> 4", 0.0),
        ("<think>\\boxed{4}</think>", 0.0),
    ],
)
def test_grades(response: str, reward: float) -> None:
    assert grade(response, "5") == Grade(reward=reward, accuracy=reward)
