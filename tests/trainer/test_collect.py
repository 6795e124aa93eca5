"""Bounded resampling and group filtering. What is under test is the rule; sampler and grader follow a script."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vppo.algorithm.types import GradedResponse, Prompt, Response, Reward
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.observability.metrics import RunLog, read_metrics
from megatron_vppo.rollout.records import SamplingSettings
from megatron_vppo.trainer.collect import Collector
from megatron_vppo.trainer.stopping import Durations
from megatron_vppo.trainer.validate import Validator


class Stream:
    def __init__(self) -> None:
        self.drawn = 0

    def next(self, k: int) -> list[Prompt]:
        self.drawn += k
        return [Prompt("train", self.drawn - k + i, "q", "a", (1, 2), (1, 2), (), ()) for i in range(k)]


class Sampler:
    def __init__(self) -> None:
        self.seeds: list[int] = []

    def generate(self, prompts: Any, *, seeds: Any, sampling: Any, first_group: int = 0) -> list[list[Response]]:
        self.seeds += [seed for group in seeds for seed in group]
        return [
            [Response(p, first_group + i, j, (5,) * (j + 1), (0.0,) * (j + 1), "stop", 0) for j in range(len(seeds[i]))]
            for i, p in enumerate(prompts)
        ]


class Grader:
    """Row r is right in its first sample where `mixed` says so, and wrong otherwise."""

    def __init__(self, mixed: set[int]) -> None:
        self.mixed = mixed

    def grade(self, responses: Any) -> list[GradedResponse]:
        rights = [float(r.sample == 0 and r.prompt.row in self.mixed) for r in responses]
        return [GradedResponse(r, "", Reward(right, right, {})) for r, right in zip(responses, rights, strict=True)]


@pytest.fixture(autouse=True)
def world() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def collect(tmp_path: Path, mixed: set[int], **algorithm: Any) -> tuple[list[Any], dict[str, float], Sampler]:
    config = RunConfig.model_validate(
        {
            "data": {"train_files": "x", "rollout_batch_size": 4},
            "model": {"path": "y"},
            "actor": {"global_batch_size": 4},
            "rollout": {"n": 2},
            "algorithm": algorithm,
        }
    )
    sampler = Sampler()
    sampling, durations = SamplingSettings(max_tokens=4), Durations()
    collector = Collector(config, Stream(), sampler, Grader(mixed), sampling, durations)  # type: ignore[arg-type]
    log = RunLog(tmp_path)
    with log.step(1):
        groups = collector.groups(1, log)
    assert durations.longest("grading") is not None
    log.close()
    (metrics,) = read_metrics(tmp_path)
    return groups, metrics, sampler


def test_sampling_goes_on_until_the_batch_is_full_and_drops_the_surplus(tmp_path: Path) -> None:
    groups, metrics, sampler = collect(tmp_path, {1, 3, 4, 5, 6}, max_try_make_batch=4)
    assert [group[0].response.prompt.row for group in groups] == [1, 3, 4, 5]
    assert metrics["rollout/attempts"] == 2
    assert metrics["rollout/sampled_groups"] == 8
    assert metrics["rollout/kept_groups"] == 5 and metrics["rollout/trained_groups"] == 4
    assert len({group[0].response.group_id for group in groups}) == 4
    assert len(set(sampler.seeds)) == 16, "a retry must not repeat the noise of an earlier round"


def test_sampling_stops_at_the_bound_and_says_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    groups, metrics, _ = collect(tmp_path, {2}, max_try_make_batch=3)
    assert [group[0].response.prompt.row for group in groups] == [2]
    assert metrics["rollout/sampled_groups"] == 12
    assert "1 of 4 wanted groups" in caplog.text and "algorithm.max_try_make_batch" in caplog.text


def test_a_step_may_keep_nothing(tmp_path: Path) -> None:
    groups, metrics, _ = collect(tmp_path, set(), max_try_make_batch=2)
    assert groups == [] and metrics["rollout/kept_groups"] == 0
    assert metrics["critic/score/mean"] == 0.0


def test_without_filtering_every_group_is_kept(tmp_path: Path) -> None:
    groups, metrics, _ = collect(tmp_path, {0}, online_filtering=False)
    assert len(groups) == 4 and metrics["rollout/attempts"] == 1
    # One of eight responses is right; lengths are 1 and 2.
    assert metrics["critic/score/mean"] == pytest.approx(1 / 8)
    assert metrics["response_length/mean"] == pytest.approx(1.5)
    assert metrics["prompt_length/max"] == 2


class BrokenGrader(Grader):
    """Like Grader, but no answer to row 1 could be graded."""

    def grade(self, responses: Any) -> list[GradedResponse]:
        failed = Reward(0.0, 0.0, {}, error="it raised")
        return [
            replace(item, reward=failed) if item.response.prompt.row == 1 else item for item in super().grade(responses)
        ]


def test_validation_is_a_mean_over_samples_and_counts_what_could_not_be_graded() -> None:
    config = RunConfig.model_validate(
        {"data": {"train_files": "x"}, "model": {"path": "y"}, "rollout": {"val": {"n": 4}}}
    )
    grader: Any = BrokenGrader({0, 1, 2})
    metrics = Validator(config, Stream().next(4), Sampler(), grader, SamplingSettings(max_tokens=4)).run()  # type: ignore[arg-type]
    assert metrics["val/accuracy"] == 2 / 16  # rows 0 and 2, one sample in four
    assert metrics["val/errors"] == 4.0
    assert metrics["val/response_length"] == (1 + 2 + 3 + 4) / 4
