"""Sampling and grading of everything that is not recorded yet, by all engines together.

The engines draw questions from one queue, and the samples of a question come from one engine, one after the other in
its queue: vLLM's caches then process and encode each image once, and its prefix cache can serve all but the first.
Responses are graded while others are sampled, and each is recorded as soon as it is graded.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_vppo.algorithm.types import Response, Reward
from megatron_vppo.data.images import VisionInputs
from megatron_vppo.data.reward_pool import RewardPool
from megatron_vppo.evaluation.grading_worker import ground_truth_of
from megatron_vppo.evaluation.inputs import AskedQuestion
from megatron_vppo.evaluation.responses import ResponseFile, ResponseRecord
from megatron_vppo.rollout.child import EngineLost
from megatron_vppo.rollout.conductor import Conductor, OwnEngine, Source, Work
from megatron_vppo.rollout.draw import Draw
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.records import Ask, Completion, SampleRequest, SamplingSettings
from megatron_vppo.rollout.seeds import question_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Missing:
    """A question, and the samples of it that are not recorded."""

    asked: AskedQuestion
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """The parts that sample, grade and record."""

    engines: Sequence[RolloutEngine]
    settings: SamplingSettings
    images: VisionInputs
    pool: RewardPool
    files: Mapping[str, ResponseFile]
    """By benchmark."""
    tokenizer: Any
    """The model's, of transformers."""
    seed: int
    responses_at_once: int
    """Responses in flight in an engine."""
    max_engine_restarts: int
    start_timeout_seconds: float
    recorded: Callable[[ResponseRecord, str], None]
    """Gets each record and the name of its benchmark, once it is written."""

    def run(self, missing: Sequence[Missing]) -> None:
        """Samples all that is missing.

        A lost engine is left alone until the others have done its work. If all are lost, they are started again.

        Raises:
            EngineLost: an engine is lost once more, and was started again as often as it may be.
        """
        restarts = [0] * len(self.engines)
        judge = RecordingJudge(self, missing)
        while judge.missing:
            conductor = Conductor(self._work(judge), stop_wanted=lambda: False)
            links = {
                number: OwnEngine(engine, self.settings, self._requests) for number, engine in enumerate(self.engines)
            }
            lost = conductor.run(links, capacity=self.responses_at_once, look=lambda: None)
            judge = judge.rest()
            if judge.missing:
                self._restart(lost, restarts)

    def _work(self, judge: RecordingJudge) -> Work:
        missing = judge.missing
        sizes = [len(one.samples) for one in missing]
        draw = Draw(wanted=len(sizes), most=len(sizes), responses=max(sizes), order="draw", missing=sizes)
        return Work(draw, lambda number: Ask(missing[number].asked.prompt, self._seeds(missing[number])), judge)

    def _seeds(self, missing: Missing) -> tuple[int, ...]:
        question = missing.asked.question
        return tuple(
            question_seed(run_seed=self.seed, benchmark=question.benchmark, question=question.id, sample=sample)
            for sample in missing.samples
        )

    def _requests(self, asks: Mapping[int, Ask]) -> dict[int, SampleRequest]:
        return {
            number: SampleRequest(
                ask.prompt.compact_token_ids, tuple(self.images.image(ref) for ref in ask.prompt.images), ask.seeds
            )
            for number, ask in asks.items()
        }

    def _restart(self, lost: Mapping[int, EngineLost], restarts: list[int]) -> None:
        for number, error in lost.items():
            if restarts[number] == self.max_engine_restarts:
                raise error
            restarts[number] += 1
            logger.warning("engine %d is started again: %s", number, error.what)
            self.engines[number].restart(timeout_seconds=self.start_timeout_seconds)


class RecordingJudge:
    """The `Judge` of the conductor: it has responses graded, records them, and keeps every question."""

    def __init__(self, sampling: Sampling, missing: Sequence[Missing]) -> None:
        sampling.pool.forget()
        self.missing = missing
        self._sampling = sampling
        self._sheets = [replace(one.asked.prompt, answer=ground_truth_of(one.asked.question)) for one in missing]
        self._submitted: dict[int, Response] = {}
        """By the pool's ticket; group_id is the number of the question here."""
        self._taken: set[tuple[int, int]] = set()
        self._written: list[set[int]] = [set() for _ in missing]
        self._texts: dict[int, str] = {}

    def rest(self) -> RecordingJudge:
        """Returns a judge of what is still not recorded."""
        left = [
            Missing(one.asked, tuple(sample for sample in one.samples if sample not in written))
            for one, written in zip(self.missing, self._written, strict=True)
        ]
        return RecordingJudge(self._sampling, [one for one in left if one.samples])

    def sampled(self, number: int, sample: int, completion: Completion) -> None:
        """Takes a response to grade. One that it has already, from an engine that was lost, is left alone."""
        sample = self.missing[number].samples[sample]
        if (number, sample) in self._taken:
            return
        self._taken.add((number, sample))
        response = Response(
            self._sheets[number], number, sample, array("i", completion.token_ids), array("d", completion.logps),
            completion.finish_reason, completion.weight_version,
        )  # fmt: skip
        (ticket,) = self._sampling.pool.submit([response])
        self._submitted[ticket] = response

    def left(self, number: int, sample: int, completion: Completion) -> None:
        """Does nothing: sampling ends when everything is sampled."""

    def verdicts(self, *, idle: bool) -> list[tuple[int, bool]]:
        """Records what has been graded. Returns the questions of which nothing is missing any more."""
        whole = []
        for ticket, (text, reward) in self._sampling.pool.take().items():
            response = self._submitted.pop(ticket, None)
            if response is None:
                continue  # of a round before, after which it is sampled again
            number = response.group_id
            self._record(number, response, text, reward)
            self._written[number].add(response.sample)
            if len(self._written[number]) == len(self.missing[number].samples):
                whole.append((number, True))
        return whole

    def sources(self) -> list[Source]:
        """Returns what becomes readable when there are verdicts."""
        return list(self._sampling.pool.sources())

    def _record(self, number: int, response: Response, text: str, reward: Reward) -> None:
        asked = self.missing[number].asked
        record = ResponseRecord(
            question=asked.question.id,
            digest=asked.digest,
            sample=response.sample,
            response=text,
            accuracy=reward.accuracy,
            vote=reward.vote,
            error=reward.error,
            finish_reason=response.finish_reason,
            tokens=self._token_texts(response.token_ids),
            logps=[round(logp, 3) + 0.0 for logp in response.rollout_logps],
        )
        self._sampling.files[asked.question.benchmark].add(record)
        self._sampling.recorded(record, asked.question.benchmark)

    def _token_texts(self, token_ids: Sequence[int]) -> list[str]:
        if new := sorted({*token_ids} - self._texts.keys()):
            texts = self._sampling.tokenizer.batch_decode([[token] for token in new])
            self._texts.update(zip(new, texts, strict=True))
        return [self._texts[token] for token in token_ids]
