"""Seconds of sampling, on engines small enough to be played by hand."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from megatron_vppo.planning.assumptions import Assumptions, HostTimes, Shares
from megatron_vppo.planning.gpus import GpuCeilings
from megatron_vppo.planning.sampling_seconds import decode_step_seconds, response_lengths, sampling_seconds
from megatron_vppo.planning.step_model import EngineLayout, Machine, SpeedModel
from tests.planning.test_step_flops import COST, WORK

UNIT = GpuCeilings("unit", 1000.0, 1000.0, memory=100.0, node=50.0, network=10.0, to_host=5.0, is_measured=True)
"""1,000 FLOP/s, 100 bytes/s of memory."""
ALL = Shares(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
NO_HOST = HostTimes(**dict.fromkeys(HostTimes.__dataclass_fields__, 0))
NO_HOST = replace(NO_HOST, fill_buffer=1e30, bundle_bytes=1e30)
MACHINE = Machine(UNIT, Assumptions(ALL, NO_HOST))
"""Every ceiling is reached, and the host takes no time."""
MODEL = SpeedModel(
    cost=COST,
    parameters=1000,
    tensors=10,
    layers=2,
    hidden=4,
    vocabulary=25,
    kv_values=8,
    vision_layers=3,
)
ENGINE = EngineLayout(tensor=1, kv_tokens=10**9, max_sequences=10**9, eager=False)


def step(
    engine: EngineLayout = ENGINE, machine: Machine = MACHINE, *, responses: int = 1, kv_tokens: float = 0
) -> float:
    return decode_step_seconds(MODEL, engine, machine, responses=responses, kv_tokens=kv_tokens)


def test_a_decode_step_by_hand() -> None:
    """Weights of 150 bytes at 100 bytes/s are 1.5 s; 24 x 25 bytes of logits for each response are 6 s; products are
    0.15 s a response; a cached token is 2 x 2 layers x 8 values = 32 bytes."""
    assert step() == pytest.approx(1.5 + 6)
    assert step(responses=4, kv_tokens=10) == pytest.approx(1.5 + 24 + 3.2)
    assert step(responses=20) == pytest.approx(3.0 + 120), "20 x 0.15 s of products are more than the weights"
    two = replace(ENGINE, tensor=2)
    # Half of each, and four sums of 4 values of 2 bytes, of which one of two ranks moves 2 x 1/2: 8 bytes at 50.
    assert step(two) == pytest.approx((1.5 + 6) / 2 + 4 * 8 / 50)


def test_a_host_that_is_slower_than_the_device() -> None:
    """Two layers of 20 s are more than 1.1 x 7.5 s; two of 1 s are not. With graphs a step takes 3 s more."""
    for layer, seconds in ((20.0, 40.0), (1.0, 2 * 7.5)):
        host = replace(NO_HOST, eager_layer=layer, eager_device=2.0, graph_step=3.0)
        machine = Machine(UNIT, Assumptions(ALL, host))
        assert step(replace(ENGINE, eager=True), machine) == pytest.approx(seconds)
        assert step(ENGINE, machine) == pytest.approx(10.5)


def test_responses_of_one_length_by_hand() -> None:
    """Eight responses of a prompt, all 9 tokens long: nine steps, with 6 + 4.5 cached tokens each."""
    work = replace(WORK, prompts=1, response_tokens=10**6, drawn=1.0)
    prefill = work.prompt_tokens * 100 + 2 * 36 + 136
    expected = 9 * step(responses=8, kv_tokens=8 * 10.5) + prefill / 1000
    assert sampling_seconds(MODEL, work, ENGINE, MACHINE, gpus=1) == pytest.approx(expected)
    # Four at a time: twice as many steps of four.
    waves = 2 * 9 * step(responses=4, kv_tokens=4 * 10.5) + prefill / 1000
    four = replace(ENGINE, max_sequences=4)
    assert sampling_seconds(MODEL, work, four, MACHINE, gpus=1) == pytest.approx(waves)
    # Two for each of four prompts on two engines: four prompts each.
    eight = replace(work, prompts=4, drawn=2.0)
    both = 9 * step(responses=32, kv_tokens=32 * 10.5) + 4 * prefill / 1000
    assert sampling_seconds(MODEL, eight, ENGINE, MACHINE, gpus=2) == pytest.approx(both)


def test_a_small_cache_takes_waves() -> None:
    """Room for two of 6/8 + 5/2 tokens: four responses in pairs."""
    work = replace(WORK, prompts=1, responses=4, response_tokens=4, longest_response=8, drawn=1.0)
    room = 2 * (6 / 4 + 4 / 2) + 1
    small = sampling_seconds(MODEL, work, replace(ENGINE, kv_tokens=int(room)), MACHINE, gpus=1)
    pairs = sampling_seconds(MODEL, work, replace(ENGINE, max_sequences=2), MACHINE, gpus=1)
    assert small == pytest.approx(pairs)
    assert small > sampling_seconds(MODEL, work, ENGINE, MACHINE, gpus=1)


def test_images_are_read_before_the_first_request() -> None:
    slow = Machine(UNIT, Assumptions(ALL, replace(NO_HOST, decode_image=100.0)))
    times = (sampling_seconds(MODEL, WORK, ENGINE, machine, gpus=2) for machine in (slow, MACHINE))
    assert next(times) - next(times) == pytest.approx(4 * 2 * 100.0), "4 prompts of an engine, 2 images"


def test_lengths_have_the_mean_and_the_limit() -> None:
    work = replace(WORK, response_tokens=450, longest_response=2048)
    lengths = response_lengths(20_000, work, seed=1)
    assert statistics.mean(lengths) == pytest.approx(450, rel=0.02)
    assert max(lengths) == 2048 and min(lengths) >= 8
    assert lengths == response_lengths(20_000, work, seed=1) != response_lengths(20_000, work, seed=2)
