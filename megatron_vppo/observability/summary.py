"""The outcome of a run in a few numbers, as `vppo summary` prints them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_vppo.observability.metrics import read_metrics


def summarize(run_dir: Path) -> dict[str, Any]:
    """Sums up metrics.jsonl: validation accuracy at both ends, the seconds, and whether trainer and engine agreed.

    `weight_checksums_ok` is None if no weight sync was verified. `seconds_rl` adds up the steps, with their validation
    and weight syncs but without checkpoints.

    Raises:
        ValueError: the folder has no metrics.
    """
    lines = read_metrics(run_dir)
    if not lines:
        raise ValueError(f"{run_dir} has no metrics.jsonl with a step in it; it is written as steps end")
    validations = {int(line["step"]): line["val/accuracy"] for line in lines if "val/accuracy" in line}
    differences = [line["training/rollout_logp_diff_max"] for line in lines if "training/rollout_logp_diff_max" in line]
    checks = [line["weight_sync/checksums_ok"] for line in lines if "weight_sync/checksums_ok" in line]
    report = run_dir / "report.html"
    return {
        "val_accuracy_start": validations.get(0),
        "val_accuracy_end": validations[max(validations)] if validations else None,
        "steps": int(lines[-1]["step"]),
        "seconds_rl": round(sum(line.get("timing_s/step", 0.0) for line in lines), 1),
        # max() alone would drop or keep a NaN by its position.
        "max_rollout_logprob_diff": max(differences, key=lambda value: (math.isnan(value), value), default=None),
        "weight_checksums_ok": all(check == 1.0 for check in checks) if checks else None,
        "report": str(report) if report.exists() else None,
    }
