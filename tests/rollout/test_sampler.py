"""Several engines, each led by one of several ranks: who samples what, and that all ranks get all of it in order.

The engine of each rank is a stand-in that says which rank it is; the collective around it is real (gloo).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from megatron_vppo.algorithm.types import ImageRef, Prompt
from megatron_vppo.rollout.records import SamplingSettings
from megatron_vppo.rollout.sampler import EngineSampler
from megatron_vppo.system.stop_signals import StopRequested
from tests.gloo import run_gloo
from tests.rollout.stand_in import StandIn

PROMPTS = [Prompt("train", i, "q", "a", (1, 1, i), (1, i), (ImageRef("train", i, 0),), ((1, 2, 2),)) for i in range(5)]


class Engine(StandIn):
    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.received: list[str] = []

    def send_weights(self, weights: Any, *, version: int, verify: bool, kept: Any) -> Any:
        self.received = [f"{name} {verify}" for name, _ in weights] + [f"kept {name}" for name in kept]
        return SimpleNamespace(num_bytes=4, num_tensors=1, checksums_ok=True if verify else None)


def make_sampler(rank: int, store: dist.Store, *, stop_wanted: bool = False) -> EngineSampler:
    leads = rank in (0, 2)
    images = SimpleNamespace(image=lambda ref: Image.new("RGB", (28, 28)))
    return EngineSampler(
        Engine(rank) if leads else None,  # type: ignore[arg-type]
        engine_index=rank // 2 if leads else None,
        num_engines=2,
        images=images,  # type: ignore[arg-type]
        verify="first",
        store=store,
        max_num_seqs=100,
        stop_wanted=lambda: stop_wanted,
    )


def _rank(rank: int, world: int, port: int) -> Any:
    store = dist.TCPStore("localhost", port, is_master=False)
    for asked in (0, 2):  # one rank is asked to stop, and none goes on
        cut = make_sampler(rank, dist.PrefixStore(f"cut {asked}", store), stop_wanted=rank == asked)
        with pytest.raises(StopRequested):
            cut.generate(PROMPTS, seeds=[(1,)] * 5, sampling=SamplingSettings(max_tokens=3))
    sampler = make_sampler(rank, store)
    engine: Any = sampler._engine
    for _ in range(2):
        groups = sampler.generate(
            PROMPTS, seeds=[(10 * i, 10 * i + 1) for i in range(5)], sampling=SamplingSettings(max_tokens=3)
        )
    assert engine is None or (not engine.samples and engine.asked == [[0, 2, 4] if rank == 0 else [1, 3]] * 2)
    drawn = []
    for _ in range(2):
        stream = ((drawn.append(name) or name, torch.ones(1)) for name in ("a", "b"))  # type: ignore[func-returns-value]
        metrics = sampler.send_weights(stream, version=3, kept=("c",))
    seen = [(r.group_id, r.sample, tuple(r.token_ids), r.weight_version) for group in groups for r in group]
    return seen, drawn, None if engine is None else engine.received, metrics


@pytest.mark.distributed
def test_engines_share_the_prompts_and_every_rank_draws_every_weight() -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    unused = store.num_keys()
    ranks = run_gloo(_rank, 4, store.port)
    expected = [
        (i, j, (i, 10 * i + j, 0 if i % 2 == 0 else 2), 7) for i in range(5) for j in range(2)
    ]  # even prompts by rank 0's engine, odd ones by rank 2's
    for rank, (seen, drawn, received, metrics) in enumerate(ranks):
        assert seen == expected
        assert drawn == ["a", "b"] * 2, "a rank that stops drawing would leave the others in a collective"
        if rank in (0, 2):
            assert received == ["a False", "b False", "kept c"], "verified at the first sync only"
            assert "weight_sync/checksums_ok" not in metrics
        else:
            assert received is None and metrics == {}
    assert store.num_keys() == unused, "a run of many steps leaves nothing behind"
