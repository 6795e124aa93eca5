"""The second task: a table of four handwritten digits, added cell by cell in 65 to 81 tokens.

Four tokens of a solution are read from the image. The sums follow from the text before them, and the words are the same
whatever the image shows. Only last digits are kept, so that a small model soon learns to add.
"""

from __future__ import annotations

from collections.abc import Sequence

from digits.task import Task

ROWS, COLUMNS = 2, 2
CELLS = "abcd"
"""The names of the cells, in reading order. Letters, so that no digit of a solution is a name."""
READINGS = (
    "{c}: I see {d}. {before}+{d}={after}. ",
    "{c} is {d}. {before}+{d}={after}. ",
    "{c} shows {d}, {before}+{d}={after}. ",
    "{c}: {d}, so {before}+{d}={after}. ",
)
"""The reading of one cell, added to what was there before, in several wordings. Each cell of a solution has its own."""


def solution(digits: Sequence[int], wordings: Sequence[int]) -> str:
    """Writes a worked solution: the reading of every cell, then the box."""
    readings = []
    before = 0
    for cell, digit, wording in zip(CELLS, digits, wordings, strict=True):
        after = (before + digit) % 10
        readings.append(READINGS[wording].format(c=cell, d=digit, before=before, after=after))
        before = after
    return "".join(readings) + rf"\boxed{{{before}}}"


TABLE = Task(
    question="<image>Last digit of the sum?",
    columns=COLUMNS,
    digits=ROWS * COLUMNS,
    wordings=len(READINGS),
    choices=ROWS * COLUMNS,
    answer=lambda digits: sum(digits) % 10,
    solution=solution,
    longest_solution=90,
)
