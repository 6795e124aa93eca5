"""Times the host work of a step that more GPUs do not shorten, and shows it next to the modelled time of the GPUs.

    python tools/bench/scaling.py [--responses 3072] [--tokens 450] [--worlds 2 8 32] [--rows 38870] [--out FILE]

Rewards, records, and what every rank computes are measured in one process, the collectives of sampling over gloo ranks
with fake engines, and in a place of its own the check of all rows at the start of a run. Prints a table; --out writes
one JSON object. tools/bench/README.md explains the numbers. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from bench.machine import commit, hardware, versions
from bench.scaling_cost import GPUS, MANY_WORKERS, MODELS, ROUNDS, cost_per_step, table
from bench.scaling_ranks import REPEATS, Seconds, collective_seconds
from bench.scaling_rows import row_check_seconds
from bench.scaling_step import Step, make_step, reward_file, tokenizer
from megatron_vppo.algorithm.assemble import assemble
from megatron_vppo.algorithm.mismatch import rollout_mismatch
from megatron_vppo.algorithm.settings import VppoSettings
from megatron_vppo.algorithm.types import Response
from megatron_vppo.config.schema import DataConfig, RewardConfig, RunConfig
from megatron_vppo.data.reward_pool import RewardPool
from megatron_vppo.data.text_decoder import describe_tokenizer
from megatron_vppo.observability.record_writer import RecordWriter
from megatron_vppo.observability.rollouts import write_rollouts
from megatron_vppo.setup.rewards import reward_of
from megatron_vppo.setup.settings import vppo_settings
from megatron_vppo.system.processes import children_of
from megatron_vppo.trainer.recorder import Recorder

ROOT = Path(__file__).resolve().parents[2]
WARMUP = 8
"""Responses for each worker that are graded before the clock runs."""
REAL_ROWS = 38_870
"""The rows of the paper's training data."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=3072)
    parser.add_argument("--tokens", type=int, default=450)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--reward-workers", type=int, nargs="+", default=[1, MANY_WORKERS])
    parser.add_argument("--rows", type=int, default=REAL_ROWS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    report = measure(
        responses=options.responses,
        tokens=options.tokens,
        worlds=options.worlds,
        workers=options.reward_workers,
        rows=options.rows,
    )
    print(table(report))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(*, responses: int, tokens: int, worlds: Sequence[int], workers: Sequence[int], rows: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    # First, while this process is small: the ranks are forked from it.
    collectives = {
        world: {name: _part(seconds) for name, seconds in of_world.items()}
        for world in worlds
        for of_world in [collective_seconds(world, responses=responses, tokens=tokens)]
    }
    load = os.getloadavg()[0]
    step = make_step(responses, tokens)
    parts = {name: _part(seconds) for name, seconds in {**_computed(step), **_recorded(step)}.items()}
    parts |= _graded(step, workers)
    return {
        "sizes": {"responses": responses, "tokens": tokens, "rounds": ROUNDS, "rows": rows},
        "parts": parts,
        "collectives": {str(world): of_world for world, of_world in collectives.items()},
        "per_step": cost_per_step(parts, collectives, workers=max(workers)),
        "gpu_modelled_s": {name: {str(n): round(model.seconds(n), 1) for n in GPUS} for name, model in MODELS.items()},
        "start": row_check_seconds(rows),
        "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
        "hardware": hardware(),
        "versions": versions(),
        **commit(ROOT),
    }


def _part(seconds: Seconds) -> dict[str, float]:
    return {"cpu_s": round(seconds[0], 3), "wall_s": round(seconds[1], 3)}


def timed(work: Callable[[], Any]) -> Seconds:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def least(work: Callable[[], Any]) -> Seconds:
    """Times work that can be done again, the least of REPEATS."""
    found = [timed(work) for _ in range(REPEATS)]
    return min(cpu for cpu, _ in found), min(wall for _, wall in found)


def _computed(step: Step) -> dict[str, Seconds]:
    """Times what every rank computes for itself, and what rank 0 once did for its reward workers."""
    decode = tokenizer().decode
    return {
        "texts, if rank 0 decoded them": least(
            lambda: [decode(r.token_ids, skip_special_tokens=True) for r in step.responses]
        ),
        "mismatch, assemble": least(
            lambda: (rollout_mismatch(step.responses, step.scores, bound=0.05), _assemble(step)),
        ),
    }


def _settings() -> VppoSettings:
    return vppo_settings(RunConfig.model_validate({"data": {"train_files": "x"}, "model": {"path": "y"}}))


def _assemble(step: Step) -> Any:
    per_minibatch = max(8, len(step.responses) // 3)
    return assemble(step.graded, step.scores, settings=_settings(), responses_per_minibatch=per_minibatch)


def _recorded(step: Step) -> dict[str, Seconds]:
    """Times the records: written by this process, and handed over to the writer."""
    images: Any = None  # the prompts have none
    minibatches = _assemble(step)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        writer = RecordWriter(Path(folder))
        recorder = Recorder(tokenizer(), images, perturb_per="row", writer=writer)
        recorder.write(1, minibatches, step.groups, step.scores)  # decodes the tokens, which a run does once
        recorder.wait()
        _, waited = timed(lambda: recorder.write(2, minibatches, step.groups, step.scores))
        cpu, meanwhile = timed(recorder.wait)
        found["records, handed over"] = (cpu, waited)
        found["records, in their own process meanwhile"] = (0.0, meanwhile)
        recorder.close()
        records = recorder.step_records(3, minibatches, step.groups, step.scores)
        found["records, if rank 0 wrote them"] = timed(lambda: write_rollouts(folder, 3, records.records()))
    return found


def _graded(step: Step, workers: Sequence[int]) -> dict[str, dict[str, float]]:
    """Times one round of decoding and grading."""
    found = {}
    words = describe_tokenizer(tokenizer())
    with tempfile.TemporaryDirectory() as folder:
        rewards = {
            "mathruler": RewardConfig(reward_function="mathruler"),
            "batch function": RewardConfig(reward_function=reward_file(Path(folder))),
        }
        for name, config in rewards.items():
            for count in workers:
                with RewardPool(
                    reward_of(config, DataConfig(train_files="none")),
                    tokenizer=words,
                    num_workers=count,
                    num_batch_workers=count,
                    timeout_seconds=60,
                ) as pool:
                    _grade(pool, step.responses[: WARMUP * count])  # symbolic algebra loads late
                    before = {pid: _cpu_of(pid) for pid in children_of(os.getpid())}
                    cpu, wall = timed(lambda: _grade(pool, step.responses))
                    spent = [_cpu_of(pid) - was for pid, was in before.items()]
                found[f"rewards, {name}, {count} workers"] = {
                    **_part((cpu + max(spent), wall)),
                    "own_cpu_s": round(cpu, 3),
                    "workers_cpu_s": round(sum(spent), 3),
                }
    return found


def _grade(pool: RewardPool, responses: Sequence[Response]) -> None:
    left = set(pool.submit(responses))
    while left:
        left -= set(pool.take(1.0))


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
