"""The rule by which groups of responses are trained on."""

from __future__ import annotations

from collections.abc import Sequence


def keep_group(accuracies: Sequence[float], *, low: float, high: float) -> bool:
    """Returns True if a group's mean accuracy lies strictly between low and high, so that it can teach something
    (DAPO).

    Args:
        accuracies: in [0, 1], one per response of the group.
    """
    if not accuracies:
        raise ValueError("a group without responses has no accuracy; drop it before filtering")
    return low < sum(accuracies) / len(accuracies) < high
