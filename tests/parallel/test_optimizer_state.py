"""The count of updates, which torch's Adam keeps per parameter and a fused one per group.

Where the state of each parameter lies is shown by what is saved and loaded (tests/proofs/test_resume_layouts.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vppo.parallel.layout import single_rank
from megatron_vppo.parallel.optimizer_state import allocate_state, only_optimizer, set_updates, updates_of
from megatron_vppo.parallel.training import Trainable
from tests.models.tiny import save_tiny_model, tiny_config
from tests.parallel.policy_rig import OPTIM, make_policy


class FusedAdam(torch.optim.Optimizer):
    """One count in each group that has parameters, and none before the first update, as TransformerEngine's has it."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 1.0})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1


@pytest.fixture
def trainable(tmp_path: Path) -> Iterator[Trainable]:
    save_tiny_model(tmp_path, tiny_config(tied=False, vocab=61))
    with single_rank() as layout:
        ordinary = dataclasses.replace(OPTIM, use_distributed_optimizer=False)
        yield make_policy(tmp_path, layout, rows=2, optim=ordinary).trainable


def test_torch_counts_for_each_parameter(trainable: Trainable) -> None:
    allocate_state(trainable)
    assert updates_of(trainable) == 0
    set_updates(trainable, 3)
    adam = only_optimizer(trainable).optimizer
    steps = [moments["step"] for moments in adam.state.values()]
    assert len({id(step) for step in steps}) == len(steps) > 10 and {float(step) for step in steps} == {3.0}
    steps[0] += 1
    with pytest.raises(AssertionError, match=r"different numbers of updates: \[3, 4\]"):
        updates_of(trainable)


def test_what_is_there_is_not_allocated_again(trainable: Trainable) -> None:
    adam = only_optimizer(trainable).optimizer
    first = adam.param_groups[0]["params"][0]
    adam.state[first] = {
        "exp_avg": torch.ones_like(first),
        "exp_avg_sq": torch.ones_like(first),
        "step": torch.ones(()),
    }
    allocate_state(trainable)
    assert adam.state[first]["exp_avg"].all() and all(len(moments) == 3 for moments in adam.state.values())


def test_a_fused_one_counts_for_each_group(trainable: Trainable) -> None:
    part = only_optimizer(trainable)
    empty = {"params": [], "lr": 1.0}
    part.optimizer = FusedAdam([{"params": group["params"]} for group in part.optimizer.param_groups])
    part.optimizer.param_groups.append(empty)
    allocate_state(trainable)
    assert all(moments.keys() == {"exp_avg", "exp_avg_sq"} for moments in part.optimizer.state.values())
    assert updates_of(trainable) == 0
    part.optimizer.step()
    assert updates_of(trainable) == 1
    set_updates(trainable, 5)
    assert [group["step"] for group in part.optimizer.param_groups] == [5, 5, 5]
    part.optimizer.step()
    assert updates_of(trainable) == 6
