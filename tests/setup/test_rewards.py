"""The number of reward workers follows the cores, where it changes no reward."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_vppo.config.schema import RewardConfig
from megatron_vppo.setup import rewards
from megatron_vppo.setup.places import Place
from megatron_vppo.setup.rewards import fair_workers, open_reward_pool
from tests.setup.test_places import block

BUILT_IN = RewardConfig()


def with_cores(places: list[Place], *cores: range) -> list[Place]:
    return [dataclasses.replace(place, cores=tuple(own)) for place, own in zip(places, cores, strict=True)]


def test_a_fair_share_of_the_cores() -> None:
    assert fair_workers(BUILT_IN, block(2, 4)) == 16, "four ranks of the host share 64 cores"
    assert fair_workers(BUILT_IN, with_cores(block(1, 2), range(8), range(8, 48))) == 8, "rank 0 has cores of its own"
    assert fair_workers(BUILT_IN, with_cores(block(1, 2), range(2), range(2))) == 1
    assert fair_workers(BUILT_IN, with_cores(block(1, 4), *[range(2)] * 4)) == 1
    assert fair_workers(BUILT_IN, block(1, 1)) == 32, "no more than pay"


def test_a_batch_function_sees_all_responses_of_a_round() -> None:
    def own(reward_type: str) -> RewardConfig:
        return RewardConfig.model_validate({"reward_function": "f.py:grade", "reward_type": reward_type})

    assert fair_workers(own("batch"), block(1, 4)) == 1
    assert fair_workers(own("sequential"), block(1, 4)) == 16


@pytest.mark.parametrize(
    ("number", "opened", "said"), [(None, 16, ["reward workers: 16 (reward.num_workers)"]), (3, 3, [])]
)
def test_the_number_is_taken_and_said(
    number: int | None, opened: int, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewards, "RewardPool", lambda function, **options: options["num_workers"])
    monkeypatch.setattr(rewards, "describe_tokenizer", lambda tokenizer: "{}")
    lines: list[str] = []
    config = RewardConfig.model_validate({"num_workers": number})
    pool: Any = open_reward_pool(config, None, block(2, 4), say=lines.append)
    assert (pool, lines) == (opened, said)
