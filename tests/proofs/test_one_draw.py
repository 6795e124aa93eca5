"""The draw of a step is the same however engines get on: their number and their speed change no bit of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vppo.observability.metrics import read_metrics
from megatron_vppo.observability.rollouts import read_rollouts, rollout_path
from tests.proofs.runs import SHORT, exported, train

STEPS = 3
FILTERED = (
    *SHORT, "algorithm.online_filtering=true", "algorithm.max_try_make_batch=4", f"trainer.total_steps={STEPS}",
    "trainer.save_freq=-1", "data.max_response_length=8",
    "reward.reward_function=tests/proofs/rewards.py:one_starts_small", "reward.reward_type=sequential",
)  # fmt: skip
SLOW_AND_MANY = ("rollout.num_engines=2", "rollout.max_num_seqs=4", "reward.num_workers=1")
"""A group in each of two engines at a time: responses come in another order, and from another place."""


@pytest.mark.slow
@pytest.mark.extended
def test_engines_decide_nothing(digits: Path, tmp_path: Path) -> None:
    one = train(digits, tmp_path, "one", *FILTERED)
    two = train(digits, tmp_path, "two", *FILTERED, *SLOW_AND_MANY)
    for step in range(1, STEPS + 1):
        expected, found = (
            [(r["row"], r["sample"], r["token_ids"], r["reward"]) for r in read_rollouts(rollout_path(run, step))]
            for run in (one, two)
        )
        assert len(expected) == 8 * 4 and found == expected
    lines, others = read_metrics(one), read_metrics(two)
    assert [line["rollout/sampled_groups"] for line in lines] == [line["rollout/sampled_groups"] for line in others]
    assert sum(line["rollout/sampled_groups"] for line in lines) > 8 * STEPS, "groups were dropped, and more drawn"
    assert (tmp_path / "digits_cpu" / "two" / "logs" / "attempt_1" / "engine_1.log").is_file()
    first, second = exported(one, STEPS), exported(two, STEPS)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
