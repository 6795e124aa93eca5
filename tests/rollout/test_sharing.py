"""Responses on every rank equal those that were sampled, in every bit."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_vppo.algorithm.types import Prompt, Response
from megatron_vppo.rollout.records import Completion
from megatron_vppo.rollout.sharing import SampledGroups, share_groups
from tests.gloo import run_gloo


def _made(seed: int, length: int, *, finish_reason: str = "stop") -> Completion:
    draw = np.random.default_rng(seed)
    logps = (-draw.random(length)).tolist()  # of 53 bits, more than a float32 holds
    ids, likeliest = draw.integers(0, 2**31, length).tolist(), draw.integers(0, 2**31, 2 * length).tolist()
    of_them = (-draw.random(2 * length, dtype=np.float32)).tolist()
    return Completion(tuple(ids), tuple(logps), finish_reason, seed, tuple(likeliest), tuple(of_them))


ODD = Completion((0, 2**31 - 1), (-0.0, -math.inf), "length", -1)
ROUNDS: tuple[tuple[dict[int, list[Completion]], dict[int, list[Completion]]], ...] = (
    ({0: [_made(1, 5), _made(2, 0)], 2: [_made(3, 700, finish_reason="length")]}, {1: [ODD], 3: []}),
    ({}, {1: [_made(4, 1)], 0: [_made(5, 2), _made(6, 3)]}),
    ({0: [_made(7, 4)]}, {}),
    ({}, {}),
)
"""The responses of groups, by number, in two parts that belong together."""
FIRST_GROUP = 30


def _prompts(count: int) -> list[Prompt]:
    return [Prompt("train", row, "q", "a", (1,), (1,), (), ()) for row in range(count)]


def _bits(numbers: Sequence[float]) -> bytes:
    """Tells -0.0 from 0.0."""
    return struct.pack(f"{len(numbers)}d", *numbers)


def _rank(rank: int, world: int) -> Any:
    found = []
    for shares in ROUNDS:
        prompts = _prompts(sum(map(len, shares)))
        groups = [
            [
                Response(
                    prompts[number],
                    FIRST_GROUP + number,
                    sample,
                    one.token_ids,
                    one.logps,
                    one.finish_reason,
                    one.weight_version,
                    likeliest_ids=one.likeliest_ids,
                    likeliest_logps=one.likeliest_logps,
                )
                for sample, one in enumerate(group)
            ]
            for number, group in sorted((shares[0] | shares[1]).items())
            if group
        ]
        shared = share_groups(lambda groups=groups: groups)
        for group in shared:
            for one in group:
                assert one.prompt is group[0].prompt, "one for a group: it may hold 1,400 tokens"
                assert isinstance(one.token_ids, array) and isinstance(one.rollout_logps, array)
        found.append(
            [
                [
                    (
                        r.prompt.row,
                        r.group_id,
                        r.sample,
                        tuple(r.token_ids),
                        _bits(r.rollout_logps),
                        r.finish_reason,
                        r.weight_version,
                        tuple(r.likeliest_ids),
                        _bits(r.likeliest_logps),
                    )
                    for r in group
                ]
                for group in shared
            ]
        )
    return found


def test_every_rank_gets_what_all_have_sampled() -> None:
    ranks = run_gloo(_rank, 2)
    for number, (mine, other) in enumerate(ROUNDS):
        sampled = {**mine, **other}
        expected = [
            [
                (
                    prompt,
                    FIRST_GROUP + prompt,
                    sample,
                    one.token_ids,
                    _bits(one.logps),
                    one.finish_reason,
                    one.weight_version,
                    one.likeliest_ids,
                    _bits(one.likeliest_logps),
                )
                for sample, one in enumerate(sampled[prompt])
            ]
            for prompt in range(len(sampled))
            if sampled[prompt]
        ]
        assert [rank[number] for rank in ranks] == [expected, expected]


def test_a_response_that_comes_twice_counts_once() -> None:
    """A group that a lost engine had begun comes again from another one."""
    groups = SampledGroups(_prompts(8).__getitem__, size=2)
    first, second = _made(1, 3), _made(2, 4)
    groups.sampled(5, 1, second)
    assert groups.verdicts(idle=False) == []
    groups.sampled(5, 1, _made(3, 9))
    assert groups.verdicts(idle=False) == []
    groups.sampled(5, 0, first)
    assert groups.verdicts(idle=False) == [(5, True)] and groups.verdicts(idle=True) == []
    responses = groups.responses(5)
    assert [(r.prompt.row, r.group_id, r.sample) for r in responses] == [(5, 5, 0), (5, 5, 1)]
    assert [(tuple(r.token_ids), tuple(r.rollout_logps)) for r in responses] == [
        (first.token_ids, first.logps), (second.token_ids, second.logps),
    ]  # fmt: skip
    assert [(tuple(r.likeliest_ids), tuple(r.likeliest_logps)) for r in responses] == [
        (first.likeliest_ids, first.likeliest_logps), (second.likeliest_ids, second.likeliest_logps),
    ]  # fmt: skip
