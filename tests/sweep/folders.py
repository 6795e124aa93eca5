"""Sweeps of these tests, and run folders as `vppo train` leaves them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_vppo.config.load import save_resolved
from megatron_vppo.observability.validations import VALIDATIONS
from megatron_vppo.setup.attempts import FINISHED, end_attempt
from megatron_vppo.sweep.plan import Sweep, SweepRun, plan_sweep
from megatron_vppo.sweep.sweep_file import read_sweep_file

CONFIG = "data: {train_files: rows.jsonl}\nmodel: {path: model}\n"
SWEEP = """
name: study
config: base.yaml
seeds: [1, 2]
variants:
  vppo: []
  dapo: [algorithm.use_vppo_on_perception=false, algorithm.use_advantage_shaping=false]
baseline: dapo
"""


def make_sweep(folder: Path, text: str = SWEEP, *overrides: str) -> Sweep:
    (folder / "base.yaml").write_text(CONFIG)
    (folder / "sweep.yaml").write_text(text)
    return plan_sweep(read_sweep_file(folder / "sweep.yaml"), [f"trainer.runs_dir={folder / 'runs'}", *overrides])


def write_run(
    run: SweepRun, accuracies: Mapping[int, Sequence[float]], *, finished: bool = True, recorded: bool = True
) -> None:
    """Writes a run whose validations have one response per question, with these accuracies by step."""
    run.folder.mkdir(parents=True, exist_ok=True)
    save_resolved(run.config, run.folder / "config.yaml")
    lines = []
    for step, answers in accuracies.items():
        mean = sum(answers) / len(answers)
        lines.append({"step": step, "val/accuracy": mean, "val/reward_score": mean / 2})
        records = [
            {"split": "val", "row": row, "sample": 0, "problem": f"question {row}", "answer": "8", "accuracy": accuracy}
            for row, accuracy in enumerate(answers)
        ]
        if recorded:
            VALIDATIONS.write(run.folder, step, records)
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        end_attempt(run.folder, FINISHED)
