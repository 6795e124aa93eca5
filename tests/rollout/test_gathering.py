"""Responses after gathering equal those that were sampled, in every bit, whoever sampled how many."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_vppo.algorithm.types import Prompt
from megatron_vppo.rollout.gathering import gather_responses
from megatron_vppo.rollout.records import Completion
from tests.gloo import run_gloo


def _made(seed: int, length: int, *, finish_reason: str = "stop") -> Completion:
    draw = np.random.default_rng(seed)
    logps = (-draw.random(length)).tolist()  # of 53 bits, more than a float32 holds
    return Completion(tuple(draw.integers(0, 2**31, length).tolist()), tuple(logps), finish_reason, seed)


ODD = Completion((0, 2**31 - 1), (-0.0, -math.inf), "length", -1)
ROUNDS: tuple[tuple[dict[int, list[Completion]], dict[int, list[Completion]]], ...] = (
    ({0: [_made(1, 5), _made(2, 0)], 2: [_made(3, 700, finish_reason="length")]}, {1: [ODD], 3: []}),
    ({}, {1: [_made(4, 1)], 0: [_made(5, 2), _made(6, 3)]}),
    ({0: [_made(7, 4)]}, {}),
    ({}, {}),
)
"""The responses that each of two ranks has sampled."""
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
        groups = gather_responses(shares[rank], prompts, first_group=FIRST_GROUP)
        for group, prompt in zip(groups, prompts, strict=True):
            for one in group:
                assert one.prompt is prompt, "the rank's own, which holds 1,400 tokens"
                assert isinstance(one.token_ids, array) and isinstance(one.rollout_logps, array)
        found.append(
            [
                [(r.group_id, r.sample, tuple(r.token_ids), _bits(r.rollout_logps), r.finish_reason, r.weight_version)
                 for r in group]
                for group in groups
            ]
        )  # fmt: skip
    return found


def test_every_rank_gets_what_all_have_sampled() -> None:
    ranks = run_gloo(_rank, 2)
    for number, (mine, other) in enumerate(ROUNDS):
        sampled = {**mine, **other}
        expected = [
            [
                (FIRST_GROUP + prompt, sample, one.token_ids, _bits(one.logps), one.finish_reason, one.weight_version)
                for sample, one in enumerate(sampled[prompt])
            ]
            for prompt in range(len(sampled))
        ]
        assert [rank[number] for rank in ranks] == [expected, expected]
