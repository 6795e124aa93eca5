"""Questions asked, graded and recorded, with stand-ins for engines: lost ones, repeated responses, seeds.

The reward workers are real. tests/evaluation/test_run.py has a real engine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_vppo.data.reward_pool import RewardPool
from megatron_vppo.data.text_decoder import describe_tokenizer
from megatron_vppo.evaluation.grading_worker import QUESTION_REWARD
from megatron_vppo.evaluation.inputs import EvalInputs
from megatron_vppo.evaluation.responses import ResponseFile, read_records, response_path
from megatron_vppo.evaluation.sampling import Missing, Sampling
from megatron_vppo.rollout.child import EngineLost
from megatron_vppo.rollout.records import Completion, Sampled, SampleRequest, SamplingSettings
from megatron_vppo.rollout.seeds import question_seed
from tests.evaluation.suites import opened


class FakeEngine:
    """Boxes 0 as the response to every question. It is lost after some responses, and can be started again."""

    def __init__(self, tokenizer: Any, *, lost_after: int | None = None) -> None:
        self.tokenizer, self.lost_after = tokenizer, lost_after
        self.given = self.restarts = 0
        self.asked: list[tuple[int, tuple[int | None, ...]]] = []
        self.waiting: list[Sampled] = []
        self._never_readable, self._other_end = os.pipe()

    def begin_sampling(self, settings: SamplingSettings) -> None:
        self.waiting = []

    def ask(self, requests: Mapping[int, SampleRequest]) -> None:
        tokens = tuple(self.tokenizer("\\boxed{0}")["input_ids"])
        for number, request in requests.items():
            assert len(request.images) == 1
            self.asked.append((number, request.seeds))
            completion = Completion(tokens, (-0.25,) * len(tokens), "stop", -1)
            self.waiting += [Sampled(number, sample, completion) for sample in range(len(request.seeds))]

    def take(self, seconds: float = 0.0) -> list[Sampled]:
        if self.lost_after is not None and self.given >= self.lost_after:
            raise EngineLost("ended", log_end="")
        taken, self.waiting = self.waiting[:1], self.waiting[1:]
        self.given += len(taken)
        return taken

    def fileno(self) -> int:
        return self._never_readable

    def end_sampling(self) -> list[Sampled]:
        return []

    def restart(self, *, timeout_seconds: float) -> None:
        self.restarts += 1
        self.lost_after = None


class Rig:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, self.inputs = opened(folder, "one", "two")
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        self.pool = RewardPool(
            QUESTION_REWARD, tokenizer=describe_tokenizer(self.tokenizer), num_workers=1, num_batch_workers=1,
            timeout_seconds=30,
        )  # fmt: skip

    def run(self, *engines: FakeEngine, missing: list[Missing], max_engine_restarts: int = 1) -> None:
        files = {name: ResponseFile(response_path(self.folder, name)) for name in ("one", "two")}
        made: Any = engines
        Sampling(
            engines=made, settings=SamplingSettings(max_tokens=8), images=self.inputs.images, pool=self.pool,
            files=files, tokenizer=self.tokenizer, seed=5, responses_at_once=2,
            max_engine_restarts=max_engine_restarts, start_timeout_seconds=1, recorded=lambda record, benchmark: None,
        ).run(missing)  # fmt: skip
        for file in files.values():
            file.close()

    def records(self, name: str) -> list[dict[str, Any]]:
        return sorted(read_records(response_path(self.folder, name)), key=lambda one: (one["question"], one["sample"]))


@pytest.fixture(scope="module")
def whole_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("sampling"))
    with rig.pool:
        yield rig


@pytest.fixture
def rig(whole_rig: Rig, tmp_path: Path) -> Rig:
    whole_rig.folder = tmp_path
    return whole_rig


def everything(inputs: EvalInputs) -> list[Missing]:
    return [Missing(asked, (0, 1)) for benchmark in inputs.benchmarks for asked in benchmark.asked]


def keys(records: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(one["question"], one["sample"]) for one in records]


ALL = [("0", 0), ("0", 1), ("1", 0), ("1", 1), ("2", 0), ("2", 1)]


def test_every_sample_of_every_benchmark_is_recorded_once_with_its_grade(rig: Rig) -> None:
    engine = FakeEngine(rig.tokenizer)
    rig.run(engine, missing=everything(rig.inputs))
    for name in ("one", "two"):
        records = rig.records(name)
        assert keys(records) == ALL
        assert [one["accuracy"] for one in records] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
        first = records[0]
        assert (first["response"], first["vote"], first["error"]) == ("\\boxed{0}", "0", None)
        assert "".join(first["tokens"]) == "\\boxed{0}"
        assert first["logps"] == [-0.25] * len(first["tokens"])
    assert len(engine.asked) == 6, "each prompt is asked once, with all of its seeds"


def test_seeds_depend_on_benchmark_question_and_sample_alone(rig: Rig) -> None:
    engine = FakeEngine(rig.tokenizer)
    missing = [Missing(rig.inputs.benchmarks[1].asked[2], (1,)), Missing(rig.inputs.benchmarks[0].asked[1], (0, 1))]
    rig.run(engine, missing=missing)
    assert dict(engine.asked) == {
        0: (question_seed(run_seed=5, benchmark="two", question="2", sample=1),),
        1: tuple(question_seed(run_seed=5, benchmark="one", question="1", sample=sample) for sample in (0, 1)),
    }
    assert keys(rig.records("one")) == [("1", 0), ("1", 1)] and keys(rig.records("two")) == [("2", 1)]


def test_what_a_lost_engine_has_not_done_the_other_does(rig: Rig) -> None:
    lost, other = FakeEngine(rig.tokenizer, lost_after=1), FakeEngine(rig.tokenizer)
    rig.run(lost, other, missing=everything(rig.inputs))
    assert keys(rig.records("one")) == ALL and keys(rig.records("two")) == ALL
    assert lost.restarts == 0, "nothing was left to do"


def test_engines_that_are_all_lost_are_started_again(rig: Rig) -> None:
    engine = FakeEngine(rig.tokenizer, lost_after=3)
    rig.run(engine, missing=everything(rig.inputs))
    assert engine.restarts == 1
    assert keys(rig.records("one")) == ALL and keys(rig.records("two")) == ALL


def test_but_not_forever(rig: Rig) -> None:
    with pytest.raises(EngineLost):
        rig.run(FakeEngine(rig.tokenizer, lost_after=3), missing=everything(rig.inputs), max_engine_restarts=0)
