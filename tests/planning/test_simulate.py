"""The same step on more GPUs: what is divided, and what is not."""

from __future__ import annotations

import pytest

from megatron_vppo.planning.published import PUBLISHED
from megatron_vppo.planning.simulate import SimulatedStep, simulate
from megatron_vppo.planning.timed_layouts import by_seconds, speed_model
from tests.planning.test_timed_layouts import MODEL, SPEED, fitting, request


@pytest.fixture(scope="module")
def steps() -> tuple[SimulatedStep | int, ...]:
    """Replicas of 8 GPUs: 4 of them in the plan, and 1, 4, 16 and 64."""
    asked = request()
    model = speed_model(asked.hf_config, parameters=PUBLISHED[MODEL].parameters)
    first = by_seconds(fitting(asked), model, asked, SPEED)[0]
    assert first.layout.replica_gpus == 8
    return simulate(first, (32, 128, 512, 8), model, asked, SPEED)


def test_gpus_divide_prompts_and_not_the_work_of_rank_zero(steps: tuple[SimulatedStep, ...]) -> None:
    base, more, most = steps[:3]
    assert [step.layout.data for step in (base, more, most)] == [4, 16, 64]
    for step, times in ((more, 4), (most, 16)):
        # 384 and 128 prompts divide. Every rank waits for its first micro-batch, however many follow.
        for phase in ("scoring", "update"):
            whole, part = (getattr(each.seconds, phase) for each in (base, step))
            assert part.language == pytest.approx(whole.language / times)
            assert whole.host <= part.host * (1 + 1e-9) < 0.1, (
                "with more ranks a rank has fewer of its images in memory"
            )
        assert step.divided == pytest.approx(base.seconds.on_gpus / times)
        assert step.seconds.host == base.seconds.host
        # Sampling ends with the longest response of all, wherever it is sampled.
        assert base.seconds.sampling / times < step.seconds.sampling < base.seconds.sampling


def test_exchanges_grow_with_the_ranks(steps: tuple[SimulatedStep, ...]) -> None:
    """0.197 s and 0.0015 s a rank, on the way of every step."""
    assert [step.seconds.collectives for step in steps[:3]] == pytest.approx([0.245, 0.389, 0.965])
    shares = [step.serial_share for step in steps[:3]]
    assert shares == sorted(shares)
    last = steps[2]
    assert last.serial_share == pytest.approx((last.seconds.host + 0.965) / last.seconds.total)


def test_what_perfect_division_would_reach(steps: tuple[SimulatedStep, ...]) -> None:
    base = steps[0]
    assert base.efficiency == pytest.approx(base.seconds.on_gpus / base.seconds.total)
    efficiencies = [step.efficiency for step in steps[:3]]
    assert efficiencies == sorted(efficiencies, reverse=True) and efficiencies[2] < 0.5 < efficiencies[0]


def test_too_few_gpus_for_the_memory(steps: tuple[SimulatedStep | int, ...]) -> None:
    assert steps[3] == 8
