"""Seconds of whole steps: by hand, for the released models, and in the right direction."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vppo.planning.assumptions import CAUTIOUS, HOPEFUL, LIKELY, Assumptions, SerialWork
from megatron_vppo.planning.gpus import GPUS, SHEETS, Reached, gpu_of_sheet
from megatron_vppo.planning.published import PUBLISHED, published_config
from megatron_vppo.planning.step_flops import StepWork
from megatron_vppo.planning.step_model import EngineLayout, Machine, SpeedModel, TrainerLayout
from megatron_vppo.planning.step_seconds import (
    StepSeconds,
    collective_seconds,
    grading_seconds,
    serial_seconds,
    step_seconds,
    sync_seconds,
)
from megatron_vppo.planning.timed_layouts import speed_model
from tests.planning.test_sampling_seconds import ALL, ENGINE, MACHINE, MODEL, NO_HOST, UNIT
from tests.planning.test_step_flops import WORK
from tests.planning.test_training_seconds import ONE

STUDY = StepWork(
    prompts=384, responses=8, drawn=2.0, minibatches=3, prompt_tokens=1400, response_tokens=450, longest_response=2048,
    images=1, patches=5120, rows_per_update=4, rows_per_scoring=8,
)  # fmt: skip
"""One image of 1,280 tokens, and the settings' own micro-batches."""
SEVEN = TrainerLayout(tensor=2, pipeline=1, context=1, data=4, recompute="none", node_gpus=8)
SEVEN_ENGINE = EngineLayout(tensor=1, kv_tokens=404_000, max_sequences=256, eager=True)


GUESSED = Reached(product=0.728, memory=0.9)
GUESSES = Assumptions(
    replace(LIKELY.shares, training=0.72, vision=0.40, hidden_gradients=0.0), replace(LIKELY.host, bundle_bytes=2**28)
)
"""The numbers of the other model, made before any GPU had measured some of them, and before gradients were summed
during the backward pass."""


def guessed(name: str, assumed: Assumptions = GUESSES) -> Machine:
    return Machine(gpu_of_sheet(SHEETS[name][0], GUESSED), assumed)


def released(name: str) -> SpeedModel:
    return speed_model(published_config(name), parameters=PUBLISHED[name].parameters)


def seven(**changes: object) -> StepSeconds:
    given = {"trainer": SEVEN, "engine": SEVEN_ENGINE, "machine": Machine(GPUS["h100"]), "work": STUDY, **changes}
    return step_seconds(released("qwen2.5-vl-7b"), **given)  # type: ignore[arg-type]


def test_sync_by_hand() -> None:
    """2,000 bytes: half of them from the other tensor rank at 50 bytes/s, then half of 1,000 from the other stage. Four
    bundles of 500 bytes and ten tensors."""
    host = replace(NO_HOST, bundle_bytes=500.0, send_bundle=1.0, load_tensor=0.5, sync_start=0.25, wake=0.125)
    machine = Machine(UNIT, Assumptions(ALL, host))
    fixed = 4 + 5 + 0.25 + 0.125
    assert sync_seconds(MODEL, ONE, machine) == pytest.approx(fixed)
    layout = replace(ONE, tensor=2)
    assert sync_seconds(MODEL, layout, machine) == pytest.approx(fixed + 1000 / 50)
    assert sync_seconds(MODEL, replace(layout, pipeline=2), machine) == pytest.approx(fixed + 1000 / 50 + 500 / 50)
    away = replace(layout, pipeline=2, node_gpus=2)
    assert sync_seconds(MODEL, away, machine) == pytest.approx(fixed + 1000 / 50 + 500 / 10)


def test_serial_work_by_hand() -> None:
    """32 rows of 5 tokens are recorded and assembled. Twice as many are graded, while others are sampled."""
    serial = SerialWork(
        grade_response=1.0, record_token=10.0, assemble_row=100.0, collectives=7.0, collectives_rank=0.5
    )
    machine = Machine(UNIT, Assumptions(ALL, NO_HOST, serial))
    assert serial_seconds(WORK, machine) == 32 * (50 + 100)
    assert grading_seconds(WORK, machine) == 64
    for slower, host in ((1.0, 32 * 150), (1000.0, 32 * 150 + 64_000)):
        graded = Machine(UNIT, Assumptions(ALL, NO_HOST, replace(serial, grade_response=slower)))
        took = step_seconds(MODEL, WORK, ONE, ENGINE, graded)
        assert took.host == pytest.approx(max(host - took.sampling, 32 * 150)), "what takes longer than sampling"
    assert [collective_seconds(ranks, machine) for ranks in (1, 2, 32)] == [0.0, 8.0, 23.0]


def test_a_step_is_the_sum_of_its_phases() -> None:
    took = step_seconds(MODEL, WORK, ONE, ENGINE, MACHINE, offloaded_bytes=10)
    phases = took.sampling + took.scoring.total + took.update.total + took.sync + took.host + took.collectives
    assert took.total == pytest.approx(phases) and took.collectives == 0
    assert took.sync == pytest.approx(2 * 10 / 5), "10 bytes there and back at 5 bytes/s"
    assert took.tokens_per_gpu == pytest.approx(32 * 11 / took.total)
    assert took.mfu == pytest.approx(3 * 4 * (8 * 1450 + 136) / took.update.total / 1000)


def test_today_on_eight_h100() -> None:
    """Qwen2.5-VL-7B, TP 2, DP 4. Another model of this code, from before rank 0's work left the way, says 205.1 s with
    one draw, images and packing ahead, and padded widths: 63 of sampling, 51.4 of scoring, 70.8 of update, 3.5 of sync,
    and 16.5 of grading and host work, of which 0.4 is left."""
    took = seven(machine=guessed("h100"))
    assert took.sampling == pytest.approx(62.9, rel=0.03)
    assert took.scoring.total == pytest.approx(51.4, rel=0.01)
    assert took.update.total == pytest.approx(70.8, rel=0.01)
    assert took.sync == pytest.approx(3.5, abs=0.1)
    assert took.host + took.collectives == pytest.approx(0.4, abs=0.1)
    assert took.total + 16.5 - 0.4 == pytest.approx(205.1, rel=0.01)
    assert took.mfu == pytest.approx(0.43, abs=0.01)


def test_today_on_32_h800() -> None:
    """Qwen2.5-VL-32B, TP 4, DP 8, all layers recomputed: the other model says 373 s. TP 2, PP 4, DP 4: 285 s."""
    model, machine = released("qwen2.5-vl-32b"), guessed("h800")
    first = TrainerLayout(tensor=4, pipeline=1, context=1, data=8, recompute="full", node_gpus=8)
    engine = EngineLayout(tensor=8, kv_tokens=249_000, max_sequences=256, eager=True)
    took = step_seconds(model, STUDY, first, engine, machine)
    assert took.total + 16.5 - 0.4 == pytest.approx(373.1, rel=0.02)
    assert (took.scoring.total, took.update.total) == pytest.approx((64.0, 128.6), rel=0.01)
    piped = replace(first, tensor=2, pipeline=4, data=4, recompute="none")
    roomy = replace(engine, tensor=4, kv_tokens=600_000)
    better = step_seconds(model, STUDY, piped, roomy, machine, offloaded_bytes=12 * 2**30)
    assert better.total + 16.5 - 0.4 == pytest.approx(285.4, rel=0.02)


@pytest.mark.parametrize("name", ["product_flops", "memory", "node", "network", "to_host"])
def test_a_faster_machine_is_never_slower(name: str) -> None:
    """Twice each ceiling, on layouts that use every link."""
    gpu, across = GPUS["h100"], replace(SEVEN, tensor=4, pipeline=2, context=2, data=2)
    engine = replace(SEVEN_ENGINE, tensor=2)
    for trainer in (SEVEN, across):
        faster = Machine(replace(gpu, **{name: 2 * getattr(gpu, name)}))
        slow = seven(trainer=trainer, engine=engine, offloaded_bytes=2**30)
        fast = seven(trainer=trainer, engine=engine, offloaded_bytes=2**30, machine=faster)
        for phase in ("sampling", "sync", "total"):
            assert getattr(fast, phase) <= getattr(slow, phase)
        assert fast.scoring.total <= slow.scoring.total and fast.update.total <= slow.update.total
    assert fast.total < slow.total, "the second layout uses each of them"


def test_guesses_at_their_ends() -> None:
    """With the other model's guesses it says 186 and 248 s, 16.1 s of host work more."""
    hopeful, cautious = (seven(machine=Machine(GPUS["h100"], assumed)).total for assumed in (HOPEFUL, CAUTIOUS))
    assert hopeful < seven().total < cautious
    fast = replace(HOPEFUL.shares, training=0.78, vision=0.50)
    slow = replace(CAUTIOUS.shares, training=0.60, vision=0.30)
    ends = (Assumptions(fast, HOPEFUL.host), Assumptions(slow, replace(CAUTIOUS.host, launch_layer=0.0007)))
    hopeful, cautious = (seven(machine=guessed("h100", assumed)).total for assumed in ends)
    assert (hopeful + 16.1, cautious + 16.1) == pytest.approx((185.6, 247.8), rel=0.03)


def test_more_work_takes_longer() -> None:
    longer = replace(STUDY, response_tokens=900)
    assert seven(work=longer).total > seven().total
    assert seven(work=replace(STUDY, perturbed_per_row=False)).scoring.total < seven().scoring.total
    assert seven(engine=replace(SEVEN_ENGINE, eager=False)).sampling < seven().sampling
