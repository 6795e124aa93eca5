"""A stand-in for a client of an engine: it takes requests and gives completions, a few at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from megatron_vppo.rollout.records import UNFINISHED, Completion, Sampled, SampleRequest, SamplingSettings


class StandIn:
    """Completes what it was asked, `at_a_time` completions with each `take`: (last token of the prompt, seed, name)."""

    version = 7

    def __init__(self, name: int = 0, *, at_a_time: int = 2) -> None:
        self.name, self.at_a_time = name, at_a_time
        self.samples = False
        self.left: list[Sampled] = []
        self.asked: list[list[int]] = []
        self._never_readable, self._other_end = os.pipe()

    def begin_sampling(self, settings: SamplingSettings) -> None:
        assert not self.samples
        self.samples, self.keeps_unfinished = True, settings.keeps_unfinished

    def ask(self, requests: Mapping[int, SampleRequest]) -> None:
        assert self.samples
        self.asked.append(list(requests))
        for number, request in requests.items():
            for sample, seed in enumerate(request.seeds):
                tokens = (request.token_ids[-1], seed or 0, self.name)
                self.left.append(Sampled(number, sample, Completion(tokens, (-1.0,) * 3, "stop", self.version)))

    def take(self, seconds: float = 0.0) -> list[Sampled]:
        taken, self.left = self.left[: self.at_a_time], self.left[self.at_a_time :]
        return taken

    def fileno(self) -> int:
        return self._never_readable

    def end_sampling(self) -> list[Sampled]:
        """Returns what is left, with one token, if it is to be kept."""
        assert self.samples
        left = [] if not self.keeps_unfinished else [
            replace(one, completion=replace(
                one.completion, token_ids=one.completion.token_ids[:1], logps=(-1.0,), finish_reason=UNFINISHED
            ))
            for one in self.left
        ]  # fmt: skip
        self.samples, self.left = False, []
        return left
