"""The gathering of responses over gloo ranks for scaling.py: the real sampler, and an engine per rank that is fake."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from bench.scaling_step import GROUP, make_prompts, random_tokens
from megatron_vppo.algorithm.types import Prompt
from megatron_vppo.rollout.records import Completion, SamplingSettings
from megatron_vppo.rollout.sampler import EngineSampler

VOCABULARY = 150_000
REPEATS = 3
"""The number of gatherings. The least counts: the ranks are more than the cores, and disturb one another."""
TIMEOUT_SECONDS = 600.0


class FakeEngine:
    """An engine whose responses were made before."""

    def __init__(self, made: list[list[Completion]]) -> None:
        self._made = made

    def generate(self, requests: Sequence[Any], sampling: SamplingSettings, **options: Any) -> list[list[Completion]]:
        return self._made


def gather_seconds(world: int, *, responses: int, tokens: int) -> tuple[float, float]:
    """Returns (CPU seconds of rank 0, wall seconds) of gathering over `world` ranks, the least of REPEATS."""
    context = multiprocessing.get_context("fork")  # spawned ranks would import torch for minutes
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, world, folder, responses, tokens, sender), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        sender.close()
        try:
            if not receiver.poll(TIMEOUT_SECONDS):
                raise TimeoutError(f"{world} ranks did not gather within {TIMEOUT_SECONDS:.0f} s")
            seconds: tuple[float, float] = receiver.recv()
            for process in ranks:
                process.join()
        finally:
            for process in ranks:
                process.kill()
    return seconds


def _rank(rank: int, world: int, folder: str, responses: int, tokens: int, sender: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    prompts = make_prompts(responses // GROUP)
    made = [
        [_sampled(row * GROUP + sample, tokens) for sample in range(GROUP)] for row in range(rank, len(prompts), world)
    ]
    engine: Any = FakeEngine(made)
    images: Any = None  # the prompts have none
    sampler = EngineSampler(engine, engine_index=rank, num_engines=world, images=images, verify="never")
    found = []
    for _ in range(REPEATS):
        dist.barrier()
        cpu, wall = time.process_time(), time.perf_counter()
        groups = sampler.generate(prompts, seeds=_seeds(prompts), sampling=SamplingSettings(max_tokens=tokens))
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
        assert sum(map(len, groups)) == len(prompts) * GROUP
    seconds = tuple(min(values) for values in zip(*found, strict=True))
    if rank == 0:
        sender.send(seconds)
    dist.barrier()
    dist.destroy_process_group()


def _seeds(prompts: Sequence[Prompt]) -> list[tuple[None, ...]]:
    return [(None,) * GROUP for _ in prompts]


def _sampled(seed: int, tokens: int) -> Completion:
    ids, logps = random_tokens(tokens, seed=seed, vocabulary=VOCABULARY)
    return Completion(token_ids=tuple(ids), logps=tuple(logps), finish_reason="stop", weight_version=0)
