"""The options of a multiple choice: found in a text, and written below a question."""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"
_LABEL = re.compile(r"(?<![A-Za-z0-9$\\])\(?([A-J])(?:\s*[.:)．：、])\s*")
_SEPARATORS = " \t\r\n;,；"


def options_in(text: str) -> tuple[str, ...]:
    """Finds the options of a text: 'A. 5 cm;B. 6 cm', '(A) yes (B) no', 'Choices:\\nA:50°\\nB:55°'.

    They are labelled A, B, ... in this order, at least two. The last such series counts. Empty: there is none.
    """
    labels = list(_LABEL.finditer(text))
    for begin in reversed(range(len(labels))):
        if labels[begin][1] != "A":
            continue
        series = [labels[begin]]
        for label in labels[begin + 1 :]:
            if label[1] == LETTERS[len(series) : len(series) + 1]:
                series.append(label)
        if len(series) > 1:
            ends = [label.start() for label in series[1:]] + [len(text)]
            return tuple(text[label.end() : end].strip(_SEPARATORS) for label, end in zip(series, ends, strict=True))
    return ()


def with_options(question: str, options: Sequence[str]) -> str:
    """Writes options below a question, one per line: 'A. 5 cm'."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines])
