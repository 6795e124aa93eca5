"""The outcome of a run in one JSON object: `python -m megatron_vppo.trainer.summary RUN_DIR`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vppo.observability.metrics import read_metrics


def summarize(run_dir: Path) -> dict[str, Any]:
    """Validation before and after, and whether the engine always held the trainer's weights.

    `weight_checksums_ok` is None where no sync was verified; a failed one ends the run. Seconds are those of the steps,
    validation and weight syncs included, checkpoints not.

    Raises:
        ValueError: the folder has no metrics.
    """
    lines = read_metrics(run_dir)
    if not lines:
        raise ValueError(f"{run_dir} has no metrics.jsonl with a step in it; has the run ended its first step?")
    validations = {int(line["step"]): line["val/accuracy"] for line in lines if "val/accuracy" in line}
    differences = [line["training/rollout_logp_diff_max"] for line in lines if "training/rollout_logp_diff_max" in line]
    checks = [line["weight_sync/checksums_ok"] for line in lines if "weight_sync/checksums_ok" in line]
    report = run_dir / "report.html"
    return {
        "val_accuracy_start": validations.get(0),
        "val_accuracy_end": validations[max(validations)] if validations else None,
        "steps": int(lines[-1]["step"]),
        "seconds_rl": round(sum(line["timing_s/step"] for line in lines), 1),
        "max_rollout_logprob_diff": max(differences, default=None),
        "weight_checksums_ok": all(check == 1.0 for check in checks) if checks else None,
        "report": str(report) if report.exists() else None,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--seconds-rl", type=float, help="wall-clock seconds of the whole command, start-up included")
    options = parser.parse_args(arguments)
    summary = summarize(options.run_dir)
    if options.seconds_rl is not None:
        summary["seconds_rl"] = options.seconds_rl
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
