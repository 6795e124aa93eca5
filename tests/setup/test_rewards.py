"""The reward that the settings ask for, and as many workers as the cores allow where that changes no reward."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.config.schema import DataConfig, RewardConfig
from megatron_vppo.data.columns import RowExtras
from megatron_vppo.data.graders.weighted import BuiltInReward
from megatron_vppo.data.user_reward import UserReward
from megatron_vppo.setup import rewards
from megatron_vppo.setup.places import Place
from megatron_vppo.setup.rewards import fair_workers, open_reward_pool, reward_of
from tests.data.rows import open_rows
from tests.setup.test_places import block


def with_cores(places: list[Place], *cores: range) -> list[Place]:
    return [dataclasses.replace(place, cores=tuple(own)) for place, own in zip(places, cores, strict=True)]


def test_a_fair_share_of_the_cores() -> None:
    assert fair_workers(block(2, 4)) == 16, "four ranks of the host share 64 cores"
    assert fair_workers(with_cores(block(1, 2), range(8), range(8, 48))) == 8, "rank 0 has cores of its own"
    assert fair_workers(with_cores(block(1, 2), range(2), range(2))) == 1
    assert fair_workers(with_cores(block(1, 4), *[range(2)] * 4)) == 1
    assert fair_workers(block(1, 1)) == 32, "no more than pay"


class Pool:
    """A pool whose function is of the kind of `grades_batches`."""

    convention = "verl's"
    grades_batches = False

    def __init__(self, reward: Any, *, num_workers: int, num_batch_workers: int, **others: Any) -> None:
        self.num_workers = num_batch_workers if self.grades_batches else num_workers


class BatchPool(Pool):
    grades_batches = True


def opened(kind: type[Pool], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """Returns the number of workers of a pool on a host with 16 cores for rank 0, and what was said."""
    monkeypatch.setattr(rewards, "RewardPool", kind)
    monkeypatch.setattr(rewards, "describe_tokenizer", lambda tokenizer: "{}")
    lines: list[str] = []
    config = RewardConfig.model_validate(settings)
    pool = open_reward_pool(config, DataConfig(train_files="t"), {}, None, block(2, 4), say=lines.append)
    return pool.num_workers, lines


def test_extras_are_those_of_the_rows_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool gets a reader of the run's data sets, by the names that prompts have."""
    datasets = {}
    for name in ("train/a", "val"):
        path = tmp_path / f"{name.replace('/', '_')}.jsonl"
        rows = [{"problem": "?", "answer": "1", "data_source": f"{name} {row}"} for row in range(2)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        datasets[name] = open_rows(str(path))
    opened: dict[str, Any] = {}
    monkeypatch.setattr(
        rewards, "RewardPool", lambda reward, **settings: opened.update(settings) or Pool(reward, **settings)
    )
    monkeypatch.setattr(rewards, "describe_tokenizer", lambda tokenizer: "{}")
    config = RewardConfig(reward_function="r.py:f")
    open_reward_pool(config, DataConfig(train_files="t"), datasets, None, block(1, 1), say=print)
    assert opened["extras"]("train/a", 1) == RowExtras("train/a 1") and opened["extras"]("val", 0) == RowExtras("val 0")


def test_the_number_is_taken_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(Pool, {}, monkeypatch) == (16, ["reward workers: 16 (reward.num_workers)"])
    assert opened(Pool, {"num_workers": 3}, monkeypatch) == (3, [])


def test_a_batch_function_sees_all_responses_of_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may compare them; with a number that is set, it gets parts."""
    kind = "reward function: f.py:g is called with verl's"
    assert opened(BatchPool, {"reward_function": "f.py:g"}, monkeypatch) == (
        1, [kind, "reward workers: 1 (reward.num_workers)"]
    )  # fmt: skip
    assert opened(BatchPool, {"reward_function": "f.py:g", "num_workers": 3}, monkeypatch) == (3, [kind])


def test_the_reward_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = DataConfig(train_files="lab/shapes@train[:90%]", val_files="held_out.jsonl")
    own = {"reward_function": "mine/r.py:g", "reward_function_kwargs": {"w": 2}, "reward_type": "batch"}
    assert reward_of(RewardConfig.model_validate(own), data) == UserReward(
        file=f"{tmp_path}/mine/r.py", name="g", arguments={"w": 2}, reward_type="batch",
        data_sources={"train": "lab/shapes", "val": "held_out.jsonl"},
    )  # fmt: skip
    alone = {"reward_function": "iou", "iou_threshold": 0.7, "relative_tolerance": 0.1, "absolute_tolerance": 2}
    assert reward_of(RewardConfig.model_validate(alone), data) == BuiltInReward("iou", {"iou": 1.0}, 0.1, 2.0, 0.7)
    parts = {"reward_function": "choice", "parts": {"format": 0.1, "choice": 0.9}}
    assert reward_of(RewardConfig.model_validate(parts), data) == BuiltInReward(
        "choice", {"format": 0.1, "choice": 0.9}, 1e-6, 0.0, 0.5
    )
