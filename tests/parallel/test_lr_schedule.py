"""The learning rate against transformers' schedules, whose warm-up begins at 0; ours begins with its first step."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from megatron_vppo.config.choices import LrScheduleKind
from megatron_vppo.parallel.lr_schedule import LrSchedule

PEAK, WARMUP, TOTAL = 3e-4, 4, 30


def transformers_rates(kind: LrScheduleKind, warmup: int) -> list[float]:
    """The rate after 0, 1, ... TOTAL scheduler steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = {
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, warmup),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warmup, TOTAL),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warmup, TOTAL),
    }[kind]()
    rates = []
    for _ in range(TOTAL + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_rates_are_those_of_transformers(kind: LrScheduleKind, warmup: int) -> None:
    expected = transformers_rates(kind, warmup)
    schedule = LrSchedule(peak=PEAK, kind=kind, warmup_steps=warmup, total_steps=TOTAL, min_ratio=0.0)
    rates = [schedule.at(step) for step in range(1, TOTAL + 1)]
    assert rates[:warmup] == pytest.approx(expected[1 : warmup + 1], rel=1e-12)
    assert rates[warmup:] == pytest.approx(expected[warmup:TOTAL], rel=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_floor_is_a_share_of_the_peak(kind: LrScheduleKind) -> None:
    floored = LrSchedule(peak=1.0, kind=kind, warmup_steps=0, total_steps=10, min_ratio=0.1)
    falling = LrSchedule(peak=1.0, kind=kind, warmup_steps=0, total_steps=10, min_ratio=0.0)
    assert floored.at(1) == 1.0
    assert floored.at(11) == pytest.approx(0.1, abs=1e-15)
    assert [floored.at(s) for s in range(1, 11)] == pytest.approx([0.1 + 0.9 * falling.at(s) for s in range(1, 11)])


def test_a_run_that_is_all_warm_up() -> None:
    schedule = LrSchedule(peak=1.0, kind="linear", warmup_steps=5, total_steps=5, min_ratio=0.0)
    assert [schedule.at(s) for s in range(1, 6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
