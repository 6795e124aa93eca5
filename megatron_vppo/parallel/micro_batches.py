"""The division of responses: groups over data-parallel ranks, and a rank's rows over micro-batches.

Only balance and memory depend on it. The loss does not: weights and denominators are final before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_vppo.algorithm.types import PerturbKey, Response
from megatron_vppo.config.choices import PerturbUnit
from megatron_vppo.parallel.balancing import assign_to_ranks
from megatron_vppo.parallel.token_counts import fill

Rows = tuple[int, ...]
"""Rows of the mini-batch."""


@dataclass(frozen=True)
class Reading:
    """The views of a response that a phase reads, and what they share: how much a group of rows costs."""

    shares_prompts: bool
    """True if rows of a micro-batch that show the same prompt share its tokens."""
    perturb_per: PerturbUnit | None
    """The rows that have a perturbed view in common; None: only original images are read."""
    patch_work: float
    """The work of the vision tower on a patch over that of the language model on a token."""
    to_end: bool = False
    """True if the last tokens of responses are read, too."""

    @property
    def views(self) -> int:
        """The number of views that are read of a response."""
        return 1 if self.perturb_per is None else 2

    def tokens(self, rows: Sequence[Response]) -> int:
        """Counts the tokens of some responses to one prompt that are packed together.

        The last token of a response predicts nothing, and is read only if its own hidden state is asked for.
        """
        unread = 0 if self.to_end else 1
        prompt, read = len(rows[0].prompt.token_ids), sum(len(row.token_ids) - unread for row in rows)
        views = [1, *self._perturbations(rows)]  # for each view, how often the prompt is shown differently
        return sum((count if self.shares_prompts else len(rows)) * prompt + read for count in views)

    def work(self, rows: Sequence[Response]) -> float:
        """Returns the work on some responses to one prompt, in tokens of the language model."""
        patches = sum(math.prod(grid) for grid in rows[0].prompt.grids_thw)
        return self.tokens(rows) + self.patch_work * patches * (1 + sum(self._perturbations(rows)))

    def _perturbations(self, rows: Sequence[Response]) -> list[int]:
        """Returns the number of perturbations of the images, in a list; an empty one if there is no perturbed view."""
        if self.perturb_per is None or not rows[0].prompt.images:
            return []
        return [len({PerturbKey.of(row, 0, per=self.perturb_per) for row in rows})]


def groups_of_rank(responses: Sequence[Response], *, data_rank: int, data: int, reading: Reading) -> list[Rows]:
    """Returns the rows of a data-parallel rank, group by group: whole groups, balanced by work.

    A group shares its prompt's images, so each image is needed on one data-parallel rank only. There are no groups if
    there are fewer of them than ranks.
    """
    rows_of_group: dict[int, list[int]] = {}
    for row, response in enumerate(responses):
        rows_of_group.setdefault(response.group_id, []).append(row)
    groups = [tuple(rows) for rows in rows_of_group.values()]
    work = [reading.work([responses[row] for row in rows]) for rows in groups]
    return [groups[number] for number in sorted(assign_to_ranks(work, num_ranks=data)[data_rank])]


def packed_tokens(responses: Sequence[Response], rows: Sequence[int], *, reading: Reading) -> int:
    """Counts the tokens of a micro-batch, padding left out."""
    members: dict[int, list[Response]] = {}
    for row in rows:
        members.setdefault(responses[row].group_id, []).append(responses[row])
    return sum(reading.tokens(of_group) for of_group in members.values())


def cut_by_rows(groups: Sequence[Rows], *, rows_each: int) -> list[Rows]:
    """Cuts rows into micro-batches of at most `rows_each`.

    Neighbours stay together: responses to a prompt share it and its images. A group that fits into a micro-batch is not
    cut. Of larger ones as many rows go into each as there is room for.
    """
    micro_batches: list[Rows] = []
    for group in groups:
        room = rows_each - len(micro_batches[-1]) if micro_batches else 0
        if room < len(group) <= rows_each:
            room = 0
        if room:
            micro_batches[-1] += group[:room]
        micro_batches += [group[start : start + rows_each] for start in range(room, len(group), rows_each)]
    return micro_batches


def fill_by_tokens(
    responses: Sequence[Response], groups: Sequence[Rows], *, most_tokens: int, reading: Reading
) -> list[Rows]:
    """Fills micro-batches with whole groups: as few as possible, with numbers of tokens just below the `token_counts`.

    A group that is larger than a micro-batch is cut, as seldom as possible. A row that is larger has one by itself.
    """

    def tokens(rows: Sequence[int]) -> int:
        return reading.tokens([responses[row] for row in rows])

    parts = [part for group in groups for part in _parts(group, most_tokens, tokens)]
    filled = fill([size for _, size in parts], limit=most_tokens)
    return sorted(tuple(sorted(row for part in members for row in parts[part][0])) for members in filled)


def _parts(group: Rows, most_tokens: int, tokens: Callable[[Sequence[int]], int]) -> list[tuple[Rows, int]]:
    """Cuts a group into parts of at most `most_tokens`, and returns them with their tokens."""
    parts: list[tuple[Rows, int]] = []
    rows: Rows = ()
    for row in group:
        if rows and tokens((*rows, row)) > most_tokens:
            parts.append((rows, tokens(rows)))
            rows = ()
        rows = (*rows, row)
    return [*parts, (rows, tokens(rows))]
