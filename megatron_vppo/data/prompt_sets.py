"""The prompts of one data file or of several, in one sequence."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

from megatron_vppo.algorithm.types import Prompt
from megatron_vppo.data.prompts import PromptSet


class PromptSets(Sequence[Prompt]):
    """The usable prompts of all files, file after file. A Prompt is built when it is asked for."""

    def __init__(self, sets: Sequence[PromptSet]) -> None:
        self.sets = tuple(sets)
        self._begins = list(itertools.accumulate((len(one) for one in sets), initial=0))

    def __len__(self) -> int:
        return self._begins[-1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of prompts of each file."""
        return tuple(len(one) for one in self.sets)

    @property
    def source(self) -> str:
        """The files as messages name them."""
        return " and ".join(one.dataset.source for one in self.sets)

    def of_row(self, split: str, row: int) -> Prompt:
        """Returns the prompt of a row of a file, by the file's name. Raises KeyError if there is none."""
        for one in self.sets:
            if one.split == split:
                return one.of_row(row)
        raise KeyError(split)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # IndexError and negative indices as for any sequence
        number = bisect.bisect_right(self._begins, index) - 1
        return self.sets[number][index - self._begins[number]]
