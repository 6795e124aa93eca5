"""The collectives of a round of sampling over gloo ranks for scaling.py: the real sampler and grader between an engine
per rank and reward workers that are fake."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from bench.scaling_step import GROUP, make_prompts, random_tokens
from megatron_vppo.algorithm.types import Prompt, Reward
from megatron_vppo.parallel.collective import from_rank_zero
from megatron_vppo.rollout.records import Completion, SamplingSettings
from megatron_vppo.rollout.sampler import EngineSampler
from megatron_vppo.trainer.grader import Grader

VOCABULARY = 150_000
CHARACTERS_PER_TOKEN = 5
REPEATS = 3
"""The number of times that something is done. The least counts: processes on the same cores disturb one another."""
TIMEOUT_SECONDS = 600.0

Seconds = tuple[float, float]
"""CPU seconds of one process, and wall seconds."""


class FakeEngine:
    """An engine whose responses were made before."""

    def __init__(self, made: list[list[Completion]]) -> None:
        self._made = made

    def generate(self, requests: Sequence[Any], sampling: SamplingSettings, **options: Any) -> list[list[Completion]]:
        return self._made


class FakePool:
    """Reward workers whose verdicts were made before."""

    def __init__(self, made: list[tuple[str, Reward]]) -> None:
        self._made = made

    def grade(self, responses: Sequence[Any]) -> list[tuple[str, Reward]]:
        return self._made


def collective_seconds(world: int, *, responses: int, tokens: int) -> dict[str, Seconds]:
    """Returns the seconds of the busiest rank in each collective over `world` ranks, the least of REPEATS."""
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
            seconds: dict[str, Seconds] = receiver.recv()
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
    pool: Any = FakePool([_verdict(number, tokens) for number in range(len(prompts) * GROUP)])
    sampler = EngineSampler(engine, engine_index=rank, num_engines=world, images=images, verify="never")
    grader = Grader(pool, max_error_share=1.0)
    found: dict[str, list[Seconds]] = {"prompts": [], "responses": [], "rewards": []}
    for _ in range(REPEATS):
        mine = _timed(found["prompts"], lambda: from_rank_zero(lambda: prompts))
        groups = _timed(found["responses"], lambda mine=mine: _sample(sampler, mine, tokens))
        sampled = [response for group in groups for response in group]
        graded = _timed(found["rewards"], lambda sampled=sampled: grader.grade(sampled))
        assert len(graded) == len(prompts) * GROUP
    least = [tuple(map(min, zip(*rounds, strict=True))) for rounds in found.values()]
    slowest = torch.tensor(least)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    if rank == 0:
        sender.send({name: tuple(seconds) for name, seconds in zip(found, slowest.tolist(), strict=True)})
    dist.barrier()
    dist.destroy_process_group()


def _timed(found: list[Seconds], collective: Callable[[], Any]) -> Any:
    """Adds the seconds of a collective that all ranks begin together. Returns its result."""
    dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    result = collective()
    found.append((time.process_time() - cpu, time.perf_counter() - wall))
    return result


def _sample(sampler: EngineSampler, prompts: Sequence[Prompt], tokens: int) -> list[list[Any]]:
    seeds = [(None,) * GROUP for _ in prompts]
    return sampler.generate(prompts, seeds=seeds, sampling=SamplingSettings(max_tokens=tokens))


def _sampled(seed: int, tokens: int) -> Completion:
    ids, logps = random_tokens(tokens, seed=seed, vocabulary=VOCABULARY)
    return Completion(token_ids=tuple(ids), logps=tuple(logps), finish_reason="stop", weight_version=0)


def _verdict(number: int, tokens: int) -> tuple[str, Reward]:
    right = float(number % 2)
    text = f"{number} ".ljust(CHARACTERS_PER_TOKEN * tokens, "x")
    return text, Reward(right, right, {"format": 1.0})
