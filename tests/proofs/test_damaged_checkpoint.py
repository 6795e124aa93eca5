"""A run whose newest checkpoint is damaged goes on from an older one, by the setting that its message offers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_vppo.observability.rollouts import rollout_steps
from tests.proofs.runs import ROOT, SHORT, VPPO, exported, train, train_arguments

KEPT = (*SHORT, "trainer.save_limit=2")
TIMES = re.compile(r"time|timing_s/|perf/|memory")
"""The metrics that differ between two runs of the same."""


@pytest.mark.slow
@pytest.mark.extended
def test_the_offered_checkpoint_leads_to_the_undisturbed_run(digits: Path, tmp_path: Path) -> None:
    straight = train(digits, tmp_path, "straight", *KEPT)
    damaged = Path(shutil.copytree(straight, straight.with_name("damaged")))
    checkpoints = damaged / "checkpoints"
    file = next((checkpoints / "global_step_4" / "dist_ckpt").glob("*.distcp"))
    file.write_bytes(b"")
    shutil.rmtree(damaged / "huggingface")
    (damaged / "rollouts" / "step_4.jsonl.zst").write_bytes(b"of the run before")

    refused = subprocess.run(
        [*VPPO, *train_arguments(digits, tmp_path, "damaged", *KEPT)], cwd=ROOT, capture_output=True, text=True
    )
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr[-2000:]
    assert str(file) in refused.stderr
    (setting,) = re.findall(r"trainer\.resume_step=\d+", refused.stderr)
    assert setting == "trainer.resume_step=2"
    train(digits, tmp_path, "damaged", *KEPT, setting)

    expected, found = exported(straight, 4), exported(damaged, 4)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert numbers(damaged) == numbers(straight)
    assert rollout_steps(damaged) == [1, 2, 3, 4]
    assert records(damaged, 4) == records(straight, 4)
    names = {path.name for path in checkpoints.iterdir() if path.is_dir()}
    assert names == {"global_step_2", "global_step_4", "set_aside_global_step_4"}
    assert (checkpoints / "set_aside_global_step_4" / "dist_ckpt" / file.name).read_bytes() == b""
    train(digits, tmp_path, "damaged", *KEPT)  # has ended: finds the new checkpoint of step 4, and trains nothing
    assert numbers(damaged) == numbers(straight)


def numbers(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not TIMES.search(name)} for line in lines]


def records(run: Path, step: int) -> bytes:
    return (run / "rollouts" / f"step_{step}.jsonl.zst").read_bytes()
