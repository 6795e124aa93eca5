"""Ranks agree on engines that are lost: one starts its own again, all of them give the weights, nobody waits for ever.

The engines are stand-ins that are lost where a test says so; the collectives between the ranks are real (gloo).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vppo.algorithm.types import Prompt
from megatron_vppo.rollout.child import EngineLost
from megatron_vppo.rollout.records import Sampled, SamplingSettings, SyncReport
from megatron_vppo.rollout.recovery import EngineRecovery
from megatron_vppo.rollout.sampler import EngineSampler
from megatron_vppo.system.stop_signals import StopRequested
from tests.gloo import run_gloo
from tests.rollout.stand_in import StandIn

PROMPTS = [Prompt("train", i, "q", "a", (1, i), (1, i), (), ()) for i in range(4)]
NO_IMAGES: Any = SimpleNamespace(image=None)
"""The images of these prompts, which have none."""


class Engine(StandIn):
    """Is lost at the calls whose numbers are named, such as {"take": [2]}: at its second `take`."""

    log_path = Path("engine.log")

    def __init__(self, lost_at: dict[str, list[int]]) -> None:
        super().__init__(at_a_time=1)
        self.lost_at = lost_at
        self.calls: list[str] = []
        self.has_weights = False
        self.version = -1

    def call(self, name: str) -> None:
        self.calls.append(name)
        if self.calls.count(name) in self.lost_at.get(name, ()):
            raise EngineLost(f"lost in {name}", log_end="the log")

    def begin_sampling(self, settings: SamplingSettings) -> None:
        self.call("sample")
        assert self.has_weights
        super().begin_sampling(settings)

    def take(self, seconds: float = 0.0) -> list[Sampled]:
        self.takes = getattr(self, "takes", 0) + 1
        if self.takes in self.lost_at.get("take", ()):
            raise EngineLost("lost in take", log_end="the log")
        return super().take()

    def send_weights(self, stream: Iterator[Any], *, version: int, verify: bool, kept: Any = ()) -> SyncReport:
        received = [name for name, _ in stream]
        self.has_weights = False
        self.call("send")
        assert received == (["head"] if kept else ["tower", "head"])
        self.has_weights, self.version = True, version
        return SyncReport(version, len(received), 4, 1, 0.0, 0.0, 0, True if verify else None)

    def restart(self, *, timeout_seconds: float, stop_wanted: Any) -> None:
        self.has_weights = self.samples = False
        self.left = []
        if stop_wanted():
            raise StopRequested
        self.call("restart")


class Trainer:
    def __init__(self) -> None:
        self.events: list[str] = []

    def make_room(self) -> None:
        self.events.append("make room")

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("tower", "head"):
            self.events.append(name)
            yield name, torch.ones(1)

    def go_on(self) -> None:
        self.events.append("go on")


def make_sampler(rank: int, engine: Engine | None, port: int, **options: Any) -> EngineSampler:
    return EngineSampler(
        engine,  # type: ignore[arg-type]
        engine_index={0: 0, 2: 1}.get(rank), num_engines=2, images=NO_IMAGES,
        store=dist.TCPStore("localhost", port, is_master=False), max_num_seqs=100, **options,
    )  # fmt: skip


def _rank(rank: int, world: int, port: int, lost_at: dict[int, dict[str, list[int]]], rounds: int) -> Any:
    """Rank 1 leads no engine."""
    engine, trainer = Engine(lost_at.get(rank, {})) if rank != 1 else None, Trainer()
    sampler = make_sampler(rank, engine, port, verify="first")
    recovery = EngineRecovery(
        engine,  # type: ignore[arg-type]
        trainer, name=f"engine of {rank}", most_restarts=2, start_timeout_seconds=1,
    )  # fmt: skip
    sampler.recover_with(recovery)
    sampled, restarts, metrics = [], [], []
    for version in range(rounds):
        kept = ("tower",) if version else ()
        stream = ((name, torch.ones(1)) for name in (["head"] if kept else ["tower", "head"]))
        metrics.append(sampler.send_weights(stream, version=version, kept=kept))
        groups = sampler.generate(PROMPTS, seeds=[(10, 11)] * 4, sampling=SamplingSettings(max_tokens=1))
        sampled.append([(tuple(r.token_ids), r.weight_version) for group in groups for r in group])
        assert engine is None or not engine.samples
        restarts.append(sampler.take_restarts())
    return sampled, restarts, trainer.events, engine and engine.calls, metrics


def expected(rounds: int) -> list[Any]:
    return [[((i, seed, 0), version) for i in range(4) for seed in (10, 11)] for version in range(rounds)]


RECOVERY = ["make room", "tower", "head", "go on"]


def run(worker: Any, *arguments: Any) -> list[Any]:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    return run_gloo(worker, 3, store.port, *arguments)


@pytest.mark.distributed
def test_lost_while_sampling_and_while_taking_weights() -> None:
    """Engine 1, of rank 2, when it is to sample first, and in the sync of the second round; engine 0 in the third."""
    found = run(_rank, {2: {"sample": [1], "send": [3]}, 0: {"sample": [3]}}, 3)
    for sampled, restarts, events, _, _ in found:
        assert sampled == expected(3)
        assert restarts == [1, 1, 1]
        assert events == RECOVERY * 3
    assert found[2][3] == [
        "send", "sample", "restart", "send",
        "send", "restart", "send", "sample",
        "send", "sample",
    ], "the other engine has sampled its prompts meanwhile"  # fmt: skip
    assert found[0][3] == [
        "send", "sample", "send", "sample", "send", "sample", "restart", "send",
    ], "an engine that is well gets no weights twice"  # fmt: skip
    assert "weight_sync/checksums_ok" in found[2][4][1], "the first weights of a new process are verified"
    assert "weight_sync/checksums_ok" not in found[0][4][1]


@pytest.mark.distributed
def test_what_is_not_finished_is_sampled_again() -> None:
    """Both engines are lost when they have given three of their four responses."""
    for sampled, restarts, events, calls, _ in run(_rank, {rank: {"take": [4]} for rank in (0, 2)}, 1):
        assert (sampled, restarts, events) == (expected(1), [2], RECOVERY)
        assert calls is None or calls == ["send", "sample", "restart", "send", "sample"]


def _stopped_rank(rank: int, world: int, port: int) -> list[str]:
    """Rank 2 is asked to stop while its engine, which was lost when it was to sample, starts again."""
    engine, trainer = Engine({"sample": [1]} if rank == 2 else {}) if rank != 1 else None, Trainer()
    asked = iter([False, True, True])  # when the engine is lost, while it starts, and after that
    sampler = make_sampler(rank, engine, port, verify="never", stop_wanted=lambda: rank == 2 and next(asked))
    recovery = EngineRecovery(
        engine,  # type: ignore[arg-type]
        trainer, name=f"engine of {rank}", most_restarts=2, start_timeout_seconds=1,
    )  # fmt: skip
    sampler.recover_with(recovery)
    sampler.send_weights(((name, torch.ones(1)) for name in ("tower", "head")), version=0)
    with pytest.raises(StopRequested):
        sampler.generate(PROMPTS, seeds=[(10, 11)] * 4, sampling=SamplingSettings(max_tokens=1))
    return trainer.events


@pytest.mark.distributed
def test_a_stop_does_not_wait_for_an_engine_that_starts_again() -> None:
    assert run(_stopped_rank) == [["make room"]] * 3


@pytest.mark.distributed
def test_both_lost_at_once_and_again_while_they_recover() -> None:
    lost_at = {2: {"sample": [1], "restart": [1]}, 0: {"sample": [1], "send": [2]}}
    for sampled, restarts, events, calls, _ in run(_rank, lost_at, 1):
        assert sampled == expected(1)
        assert restarts == [4], "two each: the start that failed counts"
        assert events == [*RECOVERY[:3], *RECOVERY], "a round more, for the engine that was lost in the first"
        assert calls is None or calls.count("restart") == 2


def _one(lost_at: dict[str, list[int]], most_restarts: int, monkeypatch: pytest.MonkeyPatch) -> EngineRecovery:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda box, this: box.__setitem__(0, this))
    engine: Any = Engine(lost_at)
    return EngineRecovery(engine, Trainer(), name="engine 0", most_restarts=most_restarts, start_timeout_seconds=1)


def test_an_engine_that_keeps_dying_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recovery = _one({"restart": [1, 2]}, 2, monkeypatch)
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError) as error:
        recovery.recover(EngineLost("it died", log_end="end of the log:\n  | a line"), lambda stream: None)
    assert str(error.value) == (
        "engine 0 was started again 2 times, as often as rollout.max_engine_restarts allows, and is lost again: "
        "lost in restart; the log"
    )
    assert not isinstance(error.value, EngineLost)
    assert caplog.messages == [
        "engine 0 is started again (1 of at most 2 times): it died (log: engine.log)",
        "engine 0 is started again (2 of at most 2 times): lost in restart (log: engine.log)",
    ]


def test_without_restarts_the_error_is_the_engines_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"^it died; end of the log$"):
        _one({}, 0, monkeypatch).recover(EngineLost("it died", log_end="end of the log"), lambda stream: None)


def test_without_a_recovery_a_lost_engine_ends_the_run() -> None:
    engine: Any = Engine({"send": [1]})
    sampler = EngineSampler(
        engine, engine_index=0, num_engines=1, images=NO_IMAGES, verify="never", store=dist.HashStore(), max_num_seqs=1
    )
    with pytest.raises(EngineLost, match="lost in send"):
        sampler.send_weights(iter([("tower", torch.ones(1)), ("head", torch.ones(1))]), version=0)
    assert sampler.take_restarts() == 0
