"""The run that everything in this folder disturbs: the digits example, so small that a step takes seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_vppo.observability.metrics import read_metrics
from tests.proofs.runs import SHORT, train_arguments

TWO_RANKS = (
    *SHORT, "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=1",
)  # fmt: skip
"""One rank on each of two hosts, which exchange activations in every layer; rank 0 has an engine."""
PATIENT = ("trainer.max_attempts_without_progress=1000", "rollout.max_engine_restarts=1000")
"""Settings of a run that is killed on purpose: it does not give up."""
PROJECT = "digits_cpu"
OF_THE_MACHINE = ("time", "timing_", "perf/", "memory/", "rollout/engine_restarts")
"""Beginnings of the names of metrics that tell of the machine, and of what befell it."""


def arguments(digits: Path, runs: Path, name: str, *overrides: str) -> list[str]:
    """Returns the arguments of `vppo train` for a run with two ranks."""
    return train_arguments(digits, runs, name, *TWO_RANKS, *overrides)


def long_settings(steps: int) -> tuple[str, ...]:
    """Returns the settings of a run of many steps, with 30 checkpoints.

    Every validated step is saved, so that a checkpoint on request is no further candidate for the best one.
    """
    often = max(1, steps // 30)
    return (f"trainer.total_steps={steps}", f"trainer.save_freq={often}", f"trainer.val_freq={2 * often}")


def numbers_of(run: Path) -> list[dict[str, float]]:
    """Reads the lines of a run's metrics as they stand there, without what tells of the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(OF_THE_MACHINE)} for line in lines]


def last_step(run: Path) -> int:
    """Returns the last step of a run that has a line of metrics; 0 if there is none."""
    if not (run / "metrics.jsonl").is_file():
        return 0
    return max((int(line["step"]) for line in read_metrics(run)), default=0)


def size_on_two_hosts(*, hours: int = 10) -> Sequence[str]:
    """Returns the options of `vppo slurm` for one rank on each of two hosts."""
    return ("--nodes", "2", "--gpus-per-node", "1", "--time", f"{hours}:00:00", "--max-restarts", "1000")
