"""Everything that the engines have sampled, on every rank.

Ranks send flat arrays, and keep them: to pickle numbers one by one takes ten times as long, and an object for each of
them takes six times the memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch.distributed as dist

from megatron_vppo.algorithm.types import Prompt, Response
from megatron_vppo.rollout.records import Completion


def gather_responses(
    mine: Mapping[int, Sequence[Completion]], prompts: Sequence[Prompt], *, first_group: int
) -> list[list[Response]]:
    """Returns the responses of all ranks, in the order of the prompts. A collective over all ranks.

    Args:
        mine: what this rank's engine has sampled, by the number of the prompt; {} if it leads none.
        prompts: all of them, the same on every rank.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, _Share.of(mine))
    groups: dict[int, list[Response]] = {}
    for share in gathered:
        share.add_to(groups, prompts, first_group=first_group)
    return [groups[number] for number in range(len(prompts))]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of numbers, one after the other."""

    flat: array[Any]
    lengths: list[int]

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]], typecode: str) -> _Rows:
        flat: array[Any] = array(typecode)
        for row in rows:
            flat.extend(row)
        return cls(flat, [len(row) for row in rows])

    def split(self) -> list[array[Any]]:
        return [self.flat[start:end] for start, end in pairwise(accumulate(self.lengths, initial=0))]


@dataclass(frozen=True, slots=True)
class _Share:
    """The responses of one engine."""

    sizes: dict[int, int]
    """The number of responses to each prompt, by the number of the prompt."""
    token_ids: _Rows
    """In 32 bits."""
    logps: _Rows
    """In 64 bits, in which nothing of a Python number is lost."""
    finish_reasons: list[str]
    weight_versions: list[int]

    @classmethod
    def of(cls, sampled: Mapping[int, Sequence[Completion]]) -> _Share:
        responses = [completion for group in sampled.values() for completion in group]
        return cls(
            sizes={number: len(group) for number, group in sampled.items()},
            token_ids=_Rows.of([one.token_ids for one in responses], "i"),
            logps=_Rows.of([one.logps for one in responses], "d"),
            finish_reasons=[one.finish_reason for one in responses],
            weight_versions=[one.weight_version for one in responses],
        )

    def add_to(self, groups: dict[int, list[Response]], prompts: Sequence[Prompt], *, first_group: int) -> None:
        """Adds the responses to `groups`, by the number of their prompt."""
        sampled = zip(
            self.token_ids.split(), self.logps.split(), self.finish_reasons, self.weight_versions, strict=True
        )
        for number, size in self.sizes.items():
            groups[number] = [
                Response(prompts[number], first_group + number, sample, *next(sampled)) for sample in range(size)
            ]
