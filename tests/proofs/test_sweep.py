"""A sweep of real runs: killed in the middle of the second, started again, and its results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_vppo.observability.metrics import read_metrics
from megatron_vppo.observability.step_files import read_records
from megatron_vppo.observability.validations import VALIDATIONS
from tests.proofs.runs import ROOT, SHORT, VPPO, vppo
from tests.system.marked import processes_with, wait_until_gone

SWEEP = """
name: study
config: {config}
overrides: {overrides}
seeds: [5]
variants:
  vppo: []
  dapo: [algorithm.use_vppo_on_perception=false, algorithm.use_advantage_shaping=false]
baseline: dapo
"""
OWN = ("trainer.total_steps=2", "trainer.save_freq=1", "trainer.val_before_train=true", "trainer.save_hf=false")
QUESTIONS = 8
"""Held-out rows of SHORT."""


@pytest.mark.slow
@pytest.mark.extended
def test_a_sweep_that_was_killed_goes_on_and_compares(digits: Path, tmp_path: Path) -> None:
    """SIGKILL to the sweep alone, after the first step of its second run: the run ends with it, and goes on later."""
    files = (f"data.train_files={digits}/data/train.parquet", f"data.val_files={digits}/data/val.parquet",
             f"model.path={digits}/model", f"trainer.runs_dir={tmp_path / 'runs'}")  # fmt: skip
    sweep = tmp_path / "sweep.yaml"
    config = ROOT / "examples" / "digits_cpu" / "config.yaml"
    sweep.write_text(SWEEP.format(config=config, overrides=json.dumps([*SHORT, *OWN, *files])))
    study, mark = tmp_path / "runs" / "study", f"mark of {tmp_path}"
    with subprocess.Popen(
        [*VPPO, "sweep", str(sweep)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "VPPO_TEST_MARK": mark},
    ) as process:  # fmt: skip
        _wait_for(study / "dapo-seed5" / "checkpoints" / "global_step_1", process)
        assert len(processes_with(mark)) >= 4, "the sweep, the launcher, two ranks at least"
        process.send_signal(signal.SIGKILL)
    wait_until_gone(mark)
    assert "vppo-seed5  finished, step 2" in vppo("sweep", sweep, "--list")
    assert "dapo-seed5  unfinished, step 1" in vppo("sweep", sweep, "--list")
    attempts = (study / "vppo-seed5" / "attempts.jsonl").read_text()

    said = vppo("sweep", sweep)
    assert "sweep: 1 of 2 runs are to do, 1 are finished" in said
    assert (study / "vppo-seed5" / "attempts.jsonl").read_text() == attempts, "a finished run is left alone"
    lines = [json.loads(line) for line in (study / "dapo-seed5" / "attempts.jsonl").read_text().splitlines()]
    assert [line.get("start_step") for line in lines] == [0, 1, None] and lines[-1]["ended"] == "finished"

    means = {}
    for name in ("vppo", "dapo"):
        run = study / f"{name}-seed5"
        accuracy = {line["step"]: line["val/accuracy"] for line in read_metrics(run) if "val/accuracy" in line}
        assert list(accuracy) == [0, 2] and VALIDATIONS.steps(run) == [0, 2]
        for step, mean in accuracy.items():
            records = list(read_records(VALIDATIONS.path(run, int(step))))
            assert len({(record["split"], record["row"]) for record in records}) == len(records) == QUESTIONS
            assert sum(record["accuracy"] for record in records) / QUESTIONS == pytest.approx(mean, abs=1e-12)
        means[name] = accuracy[2]
    results = json.loads((study / "results.json").read_text())
    test = results["variants"][0]["difference"]["test"]
    assert test["questions"] == QUESTIONS
    assert test["difference"] == pytest.approx(means["vppo"] - means["dapo"], abs=1e-12)
    assert "<h1>study</h1>" in (study / "report.html").read_text()


def _wait_for(folder: Path, process: subprocess.Popen[bytes], timeout_seconds: float = 900) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not folder.exists():
        assert process.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline, "the sweep did not get so far"
        time.sleep(0.05)
