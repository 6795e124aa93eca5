"""Memory while an engine is started again, in each phase in which it can be lost; the device only counts bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vppo.trainer.placement import Placement
from megatron_vppo.trainer.policy_side import PolicySide
from tests.trainer.test_placement import ALL, Device, Engine, Trainer


def begin(*, sleeps: bool) -> tuple[PolicySide, Placement, Device]:
    device = Device(engine_awake=not sleeps)
    trainer: Any = Trainer(device)
    placement = Placement(
        trainer, Engine(device), offloads=ALL if sleeps else (), engines_sleep=sleeps,
        barrier=lambda: device.events.append("barrier"),
    )  # fmt: skip
    policy: Any = SimpleNamespace(hf_weights=lambda: iter([("all", None)]))
    placement.syncing()
    return PolicySide(policy, placement), placement, device


def test_lost_while_sampling_on_gpus() -> None:
    """Everything leaves the device, as far as it may, before vLLM measures its free memory; then a sync as ever."""
    side, placement, device = begin(sleeps=True)
    placement.sampling()
    device.events.clear()
    side.make_room()
    assert device.held == {}, "what vLLM finds when it starts"
    assert next(side.weights()) == ("all", None)
    assert device.held.keys() == {"params", "weights"}
    side.go_on()
    assert device.held.keys() == {"weights", "kv_cache"} and placement.phase == "sample"
    assert device.events == [
        "sleep", "barrier", "barrier", "barrier", "reload params", "wake weights",
        "offload params", "barrier", "wake kv_cache",
    ]  # fmt: skip
    placement.scoring()


def test_lost_in_a_sync_and_again_while_it_recovers() -> None:
    side, placement, device = begin(sleeps=True)
    for _ in range(2):
        side.make_room()
        assert device.held == {}
        side.weights()
    side.go_on()
    assert device.held.keys() == {"params", "weights"} and placement.phase == "sync"
    placement.sampling()


def test_without_sleep_nothing_moves() -> None:
    side, placement, device = begin(sleeps=False)
    placement.sampling()
    device.events.clear()
    side.make_room()
    side.weights()
    side.go_on()
    assert device.events == ["barrier"] and placement.phase == "sample"


def test_engines_are_not_started_again_while_the_trainer_computes() -> None:
    side, placement, _ = begin(sleeps=True)
    placement.sampling()
    placement.scoring()
    with pytest.raises(RuntimeError, match="'restart' cannot follow"):
        side.make_room()
