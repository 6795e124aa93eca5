"""The exchange of a step's sampling over gloo ranks for scaling.py: the real sampler, and an engine per rank that is
fake. Its groups and their rewards go to every rank as in a step."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from bench.scaling_step import GROUP, make_prompts, random_tokens
from megatron_vppo.algorithm.types import Prompt, Reward
from megatron_vppo.parallel.collective import from_rank_zero
from megatron_vppo.rollout.records import Completion, Sampled, SamplingSettings
from megatron_vppo.rollout.sampler import EngineSampler
from megatron_vppo.trainer.grader import graded_groups

VOCABULARY = 150_000
CHARACTERS_PER_TOKEN = 5
REPEATS = 3
"""The number of times that something is done. The least counts: processes on the same cores disturb one another."""
TIMEOUT_SECONDS = 600.0

Seconds = tuple[float, float]
"""CPU seconds of one process, and wall seconds."""


class FakeEngine:
    """An engine whose responses were made before, by the number of their prompt."""

    def __init__(self, made: Mapping[int, list[Completion]]) -> None:
        self._made = made
        self._ended: list[Sampled] = []
        self._never_readable, self._other_end = os.pipe()

    def begin_sampling(self, settings: SamplingSettings) -> None:
        pass

    def ask(self, requests: Mapping[int, Any]) -> None:
        for number in requests:
            self._ended += [Sampled(number, sample, one) for sample, one in enumerate(self._made[number])]

    def take(self, seconds: float = 0.0) -> list[Sampled]:
        ended, self._ended = self._ended, []
        return ended

    def fileno(self) -> int:
        return self._never_readable

    def end_sampling(self) -> list[Sampled]:
        return []


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
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    store = dist.TCPStore("localhost", _port(folder, rank), is_master=rank == 0, wait_for_workers=False)
    if rank == 0:
        (Path(folder) / "port.part").write_text(str(store.port))
        (Path(folder) / "port.part").rename(Path(folder) / "port")
    prompts = make_prompts(responses // GROUP)
    made = {
        row: [_sampled(row * GROUP + sample, tokens) for sample in range(GROUP)]
        for row in range(rank, len(prompts), world)  # the draw deals as cards are dealt
    }
    engine: Any = FakeEngine(made)
    images: Any = SimpleNamespace(image=None)  # is not called, since the prompts have none
    verdicts = [_verdict(number, tokens) for number in range(len(prompts) * GROUP)]
    sampler = EngineSampler(
        engine, engine_index=rank, num_engines=world, images=images, verify="never", store=store,
        max_num_seqs=len(prompts) * GROUP,
    )  # fmt: skip
    found: dict[str, list[Seconds]] = {"responses": [], "rewards": []}
    for _ in range(REPEATS):
        groups = _timed(found["responses"], lambda: _sample(sampler, prompts, tokens))
        received = _timed(found["rewards"], lambda: from_rank_zero(lambda: verdicts))
        assert sum(map(len, graded_groups(groups, received))) == len(prompts) * GROUP
    least = [tuple(map(min, zip(*rounds, strict=True))) for rounds in found.values()]
    slowest = torch.tensor(least)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    if rank == 0:
        sender.send({name: tuple(seconds) for name, seconds in zip(found, slowest.tolist(), strict=True)})
    dist.barrier()
    dist.destroy_process_group()


def _port(folder: str, rank: int) -> int:
    """Returns the port of rank 0's store; 0 on rank 0, which opens it on any."""
    file = Path(folder) / "port"
    while rank != 0 and not file.exists():
        time.sleep(0.01)
    return 0 if rank == 0 else int(file.read_text())


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
