"""Times the host work of a step that more GPUs do not shorten, and shows it next to the modelled time of the GPUs.

    python tools/bench/scaling.py [--responses 3072] [--tokens 450] [--worlds 2 8 32] [--out FILE]

Rewards, records, and what every rank computes are measured in one process, the gathering of responses over gloo ranks
with fake engines. Prints a table; --out writes one JSON object. tools/bench/README.md explains the numbers. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from bench.machine import commit, hardware, versions
from bench.scaling_ranks import gather_seconds
from bench.scaling_step import Step, make_step, reward_file, tokenizer
from megatron_vppo.algorithm.assemble import assemble
from megatron_vppo.algorithm.mismatch import rollout_mismatch
from megatron_vppo.algorithm.settings import VppoSettings
from megatron_vppo.config.choices import BUILT_IN_REWARD
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data.reward_pool import RewardPool
from megatron_vppo.observability.record_writer import RecordWriter
from megatron_vppo.observability.rollouts import write_rollouts
from megatron_vppo.setup.settings import vppo_settings
from megatron_vppo.system.processes import children_of
from megatron_vppo.trainer.recorder import Recorder

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 2
"""Rounds of sampling in a step: online filtering keeps about half of the groups."""
MANY_WORKERS = 32
"""reward.num_workers on a host of a cluster. What the workers do is measured here, and divided by it."""
WARMUP = 64
"""Responses that are graded before the clock runs."""
GPUS = (8, 64, 512)


@dataclass(frozen=True)
class Model:
    """The modelled GPU time of a step, at 450 tokens a response."""

    gpu_seconds: float
    """The time of all GPUs together, which is divided perfectly."""
    sync_seconds: float
    """The weight sync, the same at any number of GPUs."""

    def seconds(self, gpus: int) -> float:
        return self.gpu_seconds / gpus + self.sync_seconds


MODELS = {"7b": Model(8 * 238.5, 3.5), "32b": Model(32 * 353.0, 9.0)}
"""The roofline model: 259 s on 8 GPUs for Qwen2.5-VL-7B, 379 s on 32 for a 32B, 17 s of host work included."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=3072)
    parser.add_argument("--tokens", type=int, default=450)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--reward-workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    report = measure(
        responses=options.responses, tokens=options.tokens, worlds=options.worlds, workers=options.reward_workers
    )
    print(table(report))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(*, responses: int, tokens: int, worlds: Sequence[int], workers: Sequence[int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    # First, while this process is small: the ranks are forked from it.
    gathers = {world: gather_seconds(world, responses=responses, tokens=tokens) for world in worlds}
    load = os.getloadavg()[0]
    step = make_step(responses, tokens)
    parts = {name: _part(seconds) for name, seconds in {**_computed(step), **_recorded(step)}.items()}
    parts |= _graded(step, workers)
    per_step = _per_step(parts, gathers, workers=max(workers))
    return {
        "sizes": {"responses": responses, "tokens": tokens, "rounds": ROUNDS},
        "parts": parts,
        "gather": {str(world): _part(seconds) for world, seconds in gathers.items()},
        "per_step": per_step,
        "gpu_modelled_s": {name: {str(n): round(model.seconds(n), 1) for n in GPUS} for name, model in MODELS.items()},
        "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
        "hardware": hardware(),
        "versions": versions(),
        **commit(ROOT),
    }


Seconds = tuple[float, float]
"""CPU seconds of this process, and wall seconds."""


def _part(seconds: Seconds) -> dict[str, float]:
    return {"cpu_s": round(seconds[0], 3), "wall_s": round(seconds[1], 3)}


def timed(work: Callable[[], Any]) -> Seconds:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def _computed(step: Step) -> dict[str, Seconds]:
    """Times what every rank computes for itself, and the decoding on rank 0."""
    decode = tokenizer().decode
    return {
        "decode to text": timed(lambda: [decode(r.token_ids, skip_special_tokens=True) for r in step.responses]),
        "mismatch, assemble": timed(
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
        found["records, handed over"] = timed(lambda: recorder.write(2, minibatches, step.groups, step.scores))
        began = time.perf_counter()
        recorder.wait()
        found["records, in their own process meanwhile"] = (0.0, time.perf_counter() - began)
        writer.close()
        records = recorder.step_records(3, minibatches, step.groups, step.scores)
        found["records, if rank 0 wrote them"] = timed(lambda: write_rollouts(folder, 3, records.records()))
    return found


def _graded(step: Step, workers: Sequence[int]) -> dict[str, dict[str, float]]:
    """Times one round of grading."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, function in {"mathruler": BUILT_IN_REWARD, "batch function": reward_file(Path(folder))}.items():
            for count in workers:
                with RewardPool(function, reward_type="batch", num_workers=count, timeout_seconds=60) as pool:
                    pool.grade(step.responses[:WARMUP], step.texts[:WARMUP])  # symbolic algebra loads late
                    before = {pid: _cpu_of(pid) for pid in children_of(os.getpid())}
                    cpu, wall = timed(lambda: pool.grade(step.responses, step.texts))
                    spent = [_cpu_of(pid) - was for pid, was in before.items()]
                found[f"rewards, {name}, {count} workers"] = {
                    **_part((cpu + max(spent), wall)),
                    "own_cpu_s": round(cpu, 3),
                    "workers_cpu_s": round(sum(spent), 3),
                }
    return found


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _per_step(
    parts: dict[str, dict[str, float]], gathers: dict[int, Seconds], *, workers: int
) -> dict[str, dict[str, float]]:
    """Adds up a step at each number of GPUs, with one reward worker and with MANY_WORKERS.

    The gathering goes along a straight line through the measured worlds; everything else is the same.
    """
    graded = parts[f"rewards, mathruler, {workers} workers"]
    worlds, seconds = list(gathers), [cpu for cpu, _ in gathers.values()]
    slope = max(0.0, float(np.polyfit(worlds, seconds, 1)[0])) if len(worlds) > 1 else 0.0
    found = {}
    for gpus in GPUS:
        costs = {
            "gather": ROUNDS * (float(np.mean(seconds)) + slope * (gpus - float(np.mean(worlds)))),
            "decode": ROUNDS * parts["decode to text"]["cpu_s"],
            "mismatch, assemble": parts["mismatch, assemble"]["cpu_s"],
            "records": parts["records, handed over"]["cpu_s"],
        }
        common = sum(costs.values())
        one, many = (ROUNDS * (graded["own_cpu_s"] + graded["workers_cpu_s"] / n) for n in (1, MANY_WORKERS))
        written = parts["records, if rank 0 wrote them"]["cpu_s"]
        costs |= {
            "rewards, 1 worker": one,
            f"rewards, {MANY_WORKERS} workers": many,
            "sum, 1 worker, records written by rank 0": common + one + written,
            "sum, 1 worker": common + one,
            f"sum, {MANY_WORKERS} workers": common + many,
        }
        found[str(gpus)] = {name: round(value, 2) for name, value in costs.items()}
    return found


def table(report: dict[str, Any]) -> str:
    """Formats the report for a terminal."""
    sizes, machine = report["sizes"], report["hardware"]
    low, high = report["load_average"]
    lines = [
        f"{sizes['responses']} responses of {sizes['tokens']} tokens; "
        f"{machine['cpu']}, {machine['cores']} cores, load {low} to {high}",
        "",
        f"{'once':52}{'CPU s':>10}{'wall s':>10}",
    ]
    rows = {**report["parts"], **{f"gather of responses, {w} ranks": row for w, row in report["gather"].items()}}
    lines += [f"{name:52}{row['cpu_s']:>10.2f}{row['wall_s']:>10.2f}" for name, row in rows.items()]
    lines += [
        "",
        f"{'per step, by GPUs (CPU s; ' + str(sizes['rounds']) + ' rounds)':52}" + "".join(f"{n:>10}" for n in GPUS),
    ]
    for name in report["per_step"][str(GPUS[0])]:
        lines.append(f"{name:52}" + "".join(f"{report['per_step'][str(n)][name]:>10.2f}" for n in GPUS))
    for name, seconds in report["gpu_modelled_s"].items():
        lines.append(
            f"{name + ', GPUs, modelled at 450 tokens':52}" + "".join(f"{seconds[str(n)]:>10.1f}" for n in GPUS)
        )
        for total in [row for row in report["per_step"][str(GPUS[0])] if row.startswith("sum")]:
            own = {n: report["per_step"][str(n)][total] for n in GPUS}
            shares = [own[n] / (own[n] + seconds[str(n)]) for n in GPUS]
            lines.append(f"{'  share: ' + total:52}" + "".join(f"{share:>10.1%}" for share in shares))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
