"""Seconds of scoring and update, by hand on a machine of round numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vppo.planning.assumptions import Assumptions
from megatron_vppo.planning.step_model import Machine, TrainerLayout
from megatron_vppo.planning.training_seconds import optimizer_seconds, scoring_seconds, update_seconds
from tests.planning.test_sampling_seconds import ALL, MACHINE, MODEL, NO_HOST, UNIT
from tests.planning.test_step_flops import WORK

ONE = TrainerLayout(tensor=1, pipeline=1, context=1, data=1, recompute="none", node_gpus=8)


def test_products_by_hand() -> None:
    """A group: 9,600 FLOPs of layers, 1,600 of them attention, and 2,000 of the head in each view; 68 of an image."""
    scoring, update = (phase(MODEL, WORK, ONE, MACHINE) for phase in (scoring_seconds, update_seconds))
    assert scoring.language == pytest.approx(4 * 2 * (9600 + 2000) / 1000)
    assert scoring.vision == pytest.approx(4 * 18 * 68 / 1000)
    assert update.language == pytest.approx(4 * (3 * 9600 + 4 * 2000) / 1000), "the head's logits are made twice"
    assert update.vision == pytest.approx(4 * 3 * 2 * 68 / 1000)
    assert scoring.exchange == update.exchange == scoring.bubble == update.bubble == 0
    assert scoring.total == scoring.language + scoring.vision and scoring.host == 0
    for recompute, again, tower in (("selective", 1600, 3), ("full", 9600, 4)):
        layout = replace(ONE, recompute=recompute)
        assert scoring_seconds(MODEL, WORK, layout, MACHINE) == scoring
        more = update_seconds(MODEL, WORK, layout, MACHINE)
        assert more.language == pytest.approx(4 * (3 * 9600 + 4 * 2000 + again) / 1000)
        assert more.vision == pytest.approx(4 * tower * 2 * 68 / 1000)


def test_ranks_divide_the_products() -> None:
    once = update_seconds(MODEL, WORK, ONE, MACHINE)
    for axis in ("tensor", "pipeline", "context", "data"):
        two = update_seconds(MODEL, WORK, replace(ONE, **{axis: 2}), MACHINE)
        assert two.language == pytest.approx(once.language / 2), axis
        # The tower runs on the first stage alone.
        assert two.vision == pytest.approx(once.vision / (1 if axis == "pipeline" else 2)), axis
    eight = scoring_seconds(MODEL, WORK, replace(ONE, data=8), MACHINE)
    assert eight.language == scoring_seconds(MODEL, WORK, replace(ONE, data=4), MACHINE).language, "4 prompts"


def test_exchanges_by_hand() -> None:
    """80 tokens of 4 values of 2 bytes are 640 bytes, of which one of two ranks moves half; 2 layers, 50 bytes/s."""
    two = replace(ONE, tensor=2)
    assert scoring_seconds(MODEL, WORK, two, MACHINE).exchange == pytest.approx(4 * 2 * 2 * 4 * 320 / 50)
    assert update_seconds(MODEL, WORK, two, MACHINE).exchange == pytest.approx(4 * 2 * (4 + 6) * 320 / 50)
    full = replace(two, recompute="full")
    assert update_seconds(MODEL, WORK, full, MACHINE).exchange == pytest.approx(4 * 2 * (4 + 4 + 6) * 320 / 50)
    # Keys and values: 80 tokens of 8 values of 2 bytes, of which half comes from the other rank; there and back.
    context = replace(ONE, context=2)
    assert scoring_seconds(MODEL, WORK, context, MACHINE).exchange == pytest.approx(4 * 2 * 2 * 640 / 50)
    assert update_seconds(MODEL, WORK, context, MACHINE).exchange == pytest.approx(4 * 2 * 2 * 640 / 50)
    away = replace(context, node_gpus=1)
    assert scoring_seconds(MODEL, WORK, away, MACHINE).exchange == pytest.approx(4 * 2 * 2 * 640 / 10)


def test_bubbles_and_messages_by_hand() -> None:
    """Two mini-batches of four micro-batches each over four stages: 3/4 of the time is added. 8 micro-batches have four
    messages each in the update; 4 have two in scoring."""
    host = replace(NO_HOST, stage_message=1.0)
    machine = Machine(UNIT, Assumptions(ALL, host))
    four = replace(ONE, pipeline=4)
    update, scoring = (phase(MODEL, WORK, four, machine) for phase in (update_seconds, scoring_seconds))
    assert update.bubble == pytest.approx(3 / 4 * (update.language + update.vision))
    assert scoring.bubble == pytest.approx(3 / 4 * (scoring.language + scoring.vision))
    assert (update.exchange, scoring.exchange) == (32.0, 8.0)


def test_what_the_device_waits_for_by_hand() -> None:
    """Four groups have two images of 4 patches each, which are read in scoring alone. Scoring has 4 micro-batches and
    reads 160 tokens of a group, the update 8 in two mini-batches and 80 tokens."""
    host = replace(NO_HOST, decode_image=1.0, process_image=10.0, bytes_per_patch=5.0, fill_buffer=10.0,
                   pack_token=0.25)  # fmt: skip
    machine = Machine(UNIT, Assumptions(ALL, host))
    scoring, update = (phase(MODEL, WORK, ONE, machine) for phase in (scoring_seconds, update_seconds))
    filling = 4 * 2 * 4 * 5 / 10
    scoring_packed, update_packed = 4 * 2 * 11 + filling + 4 * 160 * 0.25, filling + 4 * 80 * 0.25
    busy = scoring.language + scoring.vision
    assert scoring_packed > busy, "the device waits for the thread"
    assert scoring.host == pytest.approx(scoring_packed / 4 + 3 / 4 * (scoring_packed - busy))
    busy = update.language + update.vision
    assert update_packed < busy, "the thread waits for the device"
    assert update.host == pytest.approx(update_packed * 2 / 8)


def test_a_tower_with_little_to_do_waits_for_its_launches() -> None:
    """Three layers of 1 s are more than the 1.2 s of 18 images; backward 1.5 times that."""
    host = replace(NO_HOST, launch_layer=1.0, launch_backward=1.5)
    machine = Machine(UNIT, Assumptions(ALL, host))
    assert scoring_seconds(MODEL, WORK, ONE, machine).vision == pytest.approx(4 * 3.0)
    assert update_seconds(MODEL, WORK, ONE, machine).vision == pytest.approx(8 * (3.0 + 4.5))
    assert update_seconds(MODEL, WORK, replace(ONE, recompute="full"), machine).vision == pytest.approx(8 * 10.5)


def test_the_optimizer_by_hand() -> None:
    """1,000 parameters over two tensor ranks: 500 x 6 bytes, of which 3/4 move between four data ranks. The eight GPUs
    of one host have 50 bytes/s, of two hosts 10. Gradients are 4 of the 6 bytes."""
    host = replace(NO_HOST, optimizer_step=2.0, optimizer_bytes=20.0)
    machine = Machine(UNIT, Assumptions(replace(ALL, hidden_gradients=0.0), host))
    layout = replace(ONE, tensor=2, data=4)
    own = 2.0 + 500 / 4 * 20 / 100
    assert optimizer_seconds(MODEL, layout, machine, backward=9.0) == pytest.approx(own + 0.75 * 3000 / 50)
    two_hosts = replace(layout, node_gpus=4)
    assert optimizer_seconds(MODEL, two_hosts, machine, backward=9.0) == pytest.approx(own + 0.75 * 3000 / 10)
    half = Machine(UNIT, Assumptions(replace(ALL, hidden_gradients=0.5), host))
    assert optimizer_seconds(MODEL, layout, half, backward=99.0) == pytest.approx(own + 0.75 * 2000 / 50)
    assert optimizer_seconds(MODEL, layout, half, backward=9.0) == pytest.approx(own + 0.75 * 3000 / 50 - 9)
    # Two mini-batches are two steps; context ranks share the optimizer, too.
    work = replace(WORK, prompts=8)
    update = update_seconds(MODEL, work, replace(layout, data=2, context=2), machine)
    assert update.optimizer == pytest.approx(2 * (own + 0.75 * 3000 / 50))
    # Of eight micro-batches each mini-batch has a last one, and two thirds of its products are backward.
    behind = update_seconds(MODEL, work, replace(layout, data=2, context=2), half)
    hidden = 2 / 3 * (update.language + update.vision) / 8
    assert hidden < 0.5 * 0.75 * 2000 / 50
    assert behind.optimizer == pytest.approx(update.optimizer - 2 * hidden)
