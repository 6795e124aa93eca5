"""Adds up what scaling.py measures to a step at several numbers of GPUs, and prints it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

GPUS = (8, 64, 512)
ROUNDS = 2
"""Rounds of sampling in a step: online filtering keeps about half of the groups."""
MANY_WORKERS = 32
"""reward.num_workers on a host of a cluster. What the workers do is measured here, and divided by it."""
COLLECTIVES = {
    "responses": "responses, gathered",
    "rewards": "texts and rewards, broadcast",
}
RANK_ZERO, ALL = f"rank 0 alone, {MANY_WORKERS} workers", f"rank 0 and every rank, {MANY_WORKERS} workers"

Part = Mapping[str, float]


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


def cost_per_step(
    parts: Mapping[str, Part], collectives: Mapping[int, Mapping[str, Part]], *, workers: int
) -> dict[str, dict[str, float]]:
    """Adds up a step at each number of GPUs, in CPU seconds, with one reward worker and with MANY_WORKERS.

    Collectives go along a straight line through the measured numbers of ranks; everything else is the same.

    Args:
        workers: the number of reward workers with which the grading was measured.
    """
    graded = parts[f"rewards, mathruler, {workers} workers"]
    one, many = (ROUNDS * (graded["own_cpu_s"] + graded["workers_cpu_s"] / n) for n in (1, MANY_WORKERS))
    records = parts["records, handed over"]["cpu_s"]
    found = {}
    for gpus in GPUS:
        exchanged = {
            label: ROUNDS * _along_a_line({world: each[name]["cpu_s"] for world, each in collectives.items()}, gpus)
            for name, label in COLLECTIVES.items()
        }
        every_rank = {**exchanged, "mismatch, assemble": parts["mismatch, assemble"]["cpu_s"]}
        costs = {
            **every_rank,
            "records": records,
            "texts and rewards, 1 worker": one,
            f"texts and rewards, {MANY_WORKERS} workers": many,
            "rank 0 and every rank, 1 worker": sum(every_rank.values()) + records + one,
            ALL: sum(every_rank.values()) + records + many,
            RANK_ZERO: records + many,
        }
        found[str(gpus)] = {name: round(value, 3) for name, value in costs.items()}
    return found


def _along_a_line(seconds: Mapping[int, float], ranks: int) -> float:
    """Returns the seconds of `ranks` ranks, by the line through those of other numbers; no line falls."""
    worlds, measured = list(seconds), list(seconds.values())
    slope = max(0.0, float(np.polyfit(worlds, measured, 1)[0])) if len(worlds) > 1 else 0.0
    return float(np.mean(measured)) + slope * (ranks - float(np.mean(worlds)))


def table(report: dict[str, Any]) -> str:
    """Formats the report for a terminal."""
    sizes, machine = report["sizes"], report["hardware"]
    low, high = report["load_average"]
    once = {
        **report["parts"],
        **{
            f"{COLLECTIVES[name]}, {world} ranks": row
            for world, each in report["collectives"].items()
            for name, row in each.items()
        },
    }
    lines = [
        f"{sizes['responses']} responses of {sizes['tokens']} tokens; "
        f"{machine['cpu']}, {machine['cores']} cores, load {low} to {high}",
        "",
        f"{'once a round or step':52}{'CPU s':>10}{'wall s':>10}",
        *(f"{name:52}{row['cpu_s']:>10.2f}{row['wall_s']:>10.2f}" for name, row in once.items()),
        "",
        f"{'per step, by GPUs (CPU s; ' + str(sizes['rounds']) + ' rounds)':52}" + "".join(f"{n:>10}" for n in GPUS),
        *_lines_by_gpus(report),
        "",
        f"{'at start, ' + str(sizes['rows']) + ' rows':52}{'CPU s':>10}{'wall s':>10}{'workers':>10}{'rows/s':>10}",
    ]
    for name, row in report["start"].items():
        lines.append(
            f"{name:52}{row['cpu_s']:>10.2f}{row['wall_s']:>10.2f}{row['workers_cpu_s']:>10.2f}{row['rows_per_s']:>10}"
        )
    return "\n".join(lines)


def _lines_by_gpus(report: dict[str, Any]) -> list[str]:
    costs = report["per_step"]
    lines = [f"{name:52}" + "".join(f"{costs[str(n)][name]:>10.2f}" for n in GPUS) for name in costs[str(GPUS[0])]]
    for model, seconds in report["gpu_modelled_s"].items():
        lines.append(
            f"{model + ', GPUs, modelled at 450 tokens':52}" + "".join(f"{seconds[str(n)]:>10.1f}" for n in GPUS)
        )
        for name in (RANK_ZERO, ALL):
            shares = [costs[str(n)][name] / (costs[str(n)][ALL] + seconds[str(n)]) for n in GPUS]
            lines.append(f"{'  share: ' + name:52}" + "".join(f"{share:>10.1%}" for share in shares))
    return lines
