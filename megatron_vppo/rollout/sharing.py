"""Groups of responses: gathered on rank 0 as they end, and then given to every rank.

They are kept and sent as flat arrays: to pickle numbers one by one takes ten times as long, and an object for each of
them takes six times the memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Any

import torch.distributed as dist

from megatron_vppo.algorithm.types import Prompt, Response
from megatron_vppo.rollout.carry import CarriedGroup
from megatron_vppo.rollout.records import Completion


class SampledGroups:
    """Groups of responses, on rank 0; as the `Judge` of a draw it keeps every group."""

    def __init__(
        self, prompt: Callable[[int], Prompt], *, size: int, carried: Mapping[int, CarriedGroup] = MappingProxyType({})
    ) -> None:
        """
        Args:
            prompt: returns that of a group, by its number.
            size: the responses of a group.
            carried: the groups that an earlier step began, by their numbers.
        """
        self.size = size
        self._prompt = prompt
        self._carried = carried
        self._groups: dict[int, dict[int, Response]] = {}
        self._left: dict[int, dict[int, Response]] = {}
        """Those that came too late or are unfinished."""
        self._whole: list[int] = []

    def take_carried(self) -> None:
        """Takes the carried responses that have ended; to be called before any other is sampled."""
        for number, group in self._carried.items():
            for one in group.ended:
                self.add(replace(one, group_id=number))

    def sampled(self, number: int, sample: int, completion: Completion) -> None:
        """Takes a response. One that is there already is left alone.

        Args:
            sample: the place among those that were asked for.
        """
        response = self._response(number, sample, completion)
        if response.sample not in self._groups.get(number, {}):
            self.add(response)

    def left(self, number: int, sample: int, completion: Completion) -> None:
        """Takes a response that came too late, or is unfinished."""
        response = self._response(number, sample, completion)
        self._left.setdefault(number, {})[response.sample] = response

    def begun(self, number: int) -> dict[int, Response]:
        """Returns all that there is of a group, by samples."""
        before = self._carried[number].responses if number in self._carried else {}
        return {**before, **self._left.get(number, {}), **self._groups.get(number, {})}

    def _response(self, number: int, place: int, completion: Completion) -> Response:
        prompt, tokens, logps = self._prompt(number), array("i", completion.token_ids), array("d", completion.logps)
        reason, version = completion.finish_reason, completion.weight_version
        group = self._carried.get(number)
        if group is None:
            ids, of_them = array("i", completion.likeliest_ids), array("f", completion.likeliest_logps)
            return Response(prompt, number, place, tokens, logps, reason, version, 0, ids, of_them)
        sample = group.missing[place]
        begun = group.responses.get(sample)
        if begun is not None:
            tokens, logps = array("i", begun.token_ids) + tokens, array("d", begun.rollout_logps) + logps
        carried = 0 if begun is None else len(begun.token_ids)
        return Response(prompt, number, sample, tokens, logps, reason, version, carried)

    def add(self, response: Response) -> None:
        """Takes a response that is not there yet."""
        group = self._groups.setdefault(response.group_id, {})
        group[response.sample] = response
        if len(group) == self.size:
            self._whole.append(response.group_id)

    def responses(self, number: int) -> list[Response]:
        """Returns those of a whole group, in order."""
        return [self._groups[number][sample] for sample in range(self.size)]

    def verdicts(self, *, idle: bool) -> list[tuple[int, bool]]:
        """Returns the groups that have become whole since the last call."""
        whole, self._whole = self._whole, []
        return [(number, True) for number in whole]

    def sources(self) -> list[Any]:
        """Returns nothing to wait for."""
        return []


def share_groups(groups: Callable[[], Sequence[Sequence[Response]]]) -> list[list[Response]]:
    """Returns groups of responses, each to one prompt, on every rank; a collective over all ranks.

    Args:
        groups: called on rank 0; returns the groups there are.
    """
    box: list[Any] = [_Share.of(groups()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    share: _Share = box[0]
    return list(share.groups())


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
    """Groups as they are sent."""

    numbers: list[int]
    prompts: list[Prompt]
    sizes: list[int]
    """The number of responses of each group."""
    token_ids: _Rows
    """In 32 bits."""
    logps: _Rows
    """In 64 bits, in which nothing of a Python number is lost."""
    finish_reasons: list[str]
    weight_versions: list[int]
    carried_tokens: list[int]
    likeliest_ids: _Rows
    likeliest_logps: _Rows

    @classmethod
    def of(cls, groups: Sequence[Sequence[Response]]) -> _Share:
        responses = [response for group in groups for response in group]
        return cls(
            numbers=[group[0].group_id for group in groups],
            prompts=[group[0].prompt for group in groups],
            sizes=[len(group) for group in groups],
            token_ids=_Rows.of([one.token_ids for one in responses], "i"),
            logps=_Rows.of([one.rollout_logps for one in responses], "d"),
            finish_reasons=[one.finish_reason for one in responses],
            weight_versions=[one.weight_version for one in responses],
            carried_tokens=[one.carried_tokens for one in responses],
            likeliest_ids=_Rows.of([one.likeliest_ids for one in responses], "i"),
            likeliest_logps=_Rows.of([one.likeliest_logps for one in responses], "f"),
        )

    def groups(self) -> Iterator[list[Response]]:
        sampled = zip(
            self.token_ids.split(), self.logps.split(), self.finish_reasons, self.weight_versions, self.carried_tokens,
            self.likeliest_ids.split(), self.likeliest_logps.split(),
            strict=True,
        )  # fmt: skip
        for number, prompt, size in zip(self.numbers, self.prompts, self.sizes, strict=True):
            yield [Response(prompt, number, sample, *next(sampled)) for sample in range(size)]
