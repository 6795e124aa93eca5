"""The memory of each phase, by hand, and that of a host."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vppo.launching.meta_step import StepBytes
from megatron_vppo.launching.phases import EngineBytes, HostBytes, engine_bytes, fullest_host, fullest_phases
from megatron_vppo.launching.stage_memory import StageReport
from megatron_vppo.planning.activations import MicroBatch, StageActivations
from megatron_vppo.planning.state import StateBytes
from tests.launching.runs import four_layers, run_config

GIB = 2**30
STEP = StepBytes(kept=(0,), output=(0,), batch=MicroBatch(0, 0, 0, 0))
ALL = ["params", "grads", "optimizer"]


def stage(number: int, *, weights: int, score: int, update: int) -> StageReport:
    state = StateBytes(weights=weights * GIB, gradients=2 * weights * GIB, optimizer=10 * GIB)
    activations = [StageActivations(layers=layers * GIB, head=GIB) for layers in (update, score)]
    return StageReport(number, (2,), state, STEP, (1,), *activations)


STAGES = (stage(0, weights=8, score=2, update=9), stage(1, weights=6, score=5, update=3))
ENGINE = EngineBytes(weights=15 * GIB, awake=40 * GIB, sleeps=True, buffers=2 * GIB, on_gpu=True, sequences=9)


def totals(engine: EngineBytes, **sections: Any) -> dict[str, tuple[int, float]]:
    """(stage, GiB) of the fullest GPU of each phase."""
    phases = fullest_phases(run_config(**sections), STAGES, engine)
    return {phase.phase: (phase.pipeline_rank, phase.total / GIB) for phase in phases}


def test_phases_by_hand_without_offload() -> None:
    """State of 8 + 16 + 10 GiB and a reserve of 3; an engine of 15 + 3 loaded, 40 awake, 1 asleep."""
    assert totals(ENGINE) == {
        "sync": (0, 34 + 3 + 18 + 2),
        "sample": (0, 34 + 3 + 40),
        "score": (0, 34 + 3 + 3 + 1),  # of 28 + 3 + 6 + 1 on the second stage
        "update": (0, 34 + 3 + 10 + 1),
    }


def test_phases_by_hand_with_offload() -> None:
    """Scoring needs the weights alone, and is fullest on the second stage: 6 + 6 is more than 8 + 3."""
    assert totals(ENGINE, actor={"offload": ALL}) == {
        "sync": (0, 8 + 3 + 18 + 2),
        "sample": (0, 3 + 40),
        "score": (1, 6 + 3 + 6 + 1),
        "update": (0, 34 + 3 + 10 + 1),
    }
    assert totals(ENGINE, actor={"offload": ["optimizer"]})["sample"] == (0, 24 + 3 + 40)


def test_engines_that_do_not_sleep_hold_their_share_in_every_phase() -> None:
    engine = EngineBytes(weights=15 * GIB, awake=40 * GIB, sleeps=False, buffers=2 * GIB, on_gpu=False, sequences=9)
    assert totals(engine) == {
        "sync": (0, 34 + 3 + 40),
        "sample": (0, 34 + 3 + 40),
        "score": (0, 34 + 3 + 3 + 40),
        "update": (0, 34 + 3 + 10 + 40),
    }


def test_an_engine_by_hand() -> None:
    """Two GPUs, half of 8 GiB each: 100 values a GPU, and keys and values of 4 layers, 1 of 2 heads of 16 values."""
    config = run_config(rollout={"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5})
    engine = engine_bytes(config, four_layers(), parameters=199, gpu_bytes=8 * GIB)
    sequence = (40 + 9) * 2 * 4 * 16 * 2
    assert (engine.weights, engine.awake, engine.sleeps, engine.on_gpu) == (200, 4 * GIB, True, True)
    assert engine.sequences == (4 * GIB - 200 - 3 * GIB) // sequence
    assert engine.buffers == 2 * GIB // 4, "the embedding of 299 x 64 values is smaller"
    large = engine_bytes(config, four_layers(vocab_size=2**22), parameters=199, gpu_bytes=GIB)
    assert (large.buffers, large.sequences) == (2 * 2**22 * 64 * 2, 0)


@pytest.mark.parametrize(
    ("offload", "kl_coef", "sleeps", "on_gpu", "expected"),
    [
        (ALL, 0.0, True, True, HostBytes(18 + 18 + 18 + 18, 0, 2 * 30, 0)),
        (["params"], 0.0, True, False, HostBytes(8 + 8 + 8 + 8, 0, 2 * 30, 2 * 2)),
        (["grads"], 0.0, True, True, HostBytes(0, 0, 0, 0)),
        ([], 0.01, False, False, HostBytes(0, 8 + 8 + 8 + 8, 0, 2 * 2)),
    ],
)
def test_hosts_by_hand(offload: list[str], kl_coef: float, sleeps: bool, on_gpu: bool, expected: HostBytes) -> None:
    """Two hosts of four ranks, one for each stage, with two engines of two GPUs each; gradients are freed."""
    engine = EngineBytes(15 * GIB, 40 * GIB, sleeps=sleeps, buffers=2 * GIB, on_gpu=on_gpu, sequences=9)
    host = fullest_host(
        run_config(actor={"offload": offload}, rollout={"tensor_parallel_size": 2}, algorithm={"kl_coef": kl_coef}),
        STAGES,
        engine,
        stage_of_rank=[0, 0, 0, 0, 1, 1, 1, 1],
        engines_of_host=[2, 2],
        ranks_per_host=4,
    )
    parts = (expected.offloaded, expected.reference, expected.engine_weights, expected.buffers)
    assert host == HostBytes(*(part * GIB for part in parts))
    assert host.total == sum(parts) * GIB
