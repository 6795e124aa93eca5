"""The digits demo on two SLURM hosts, sent by `vppo slurm`: the same numbers as on one machine.

On its way it is asked to stop, and SLURM starts it again.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_vppo.observability.metrics import read_metrics
from tests.proofs.conftest import make_digits
from tests.proofs.runs import SHORT, exported, train, train_arguments
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import wait_for_end, wait_for_restart, wait_for_text
from tests.slurm.runs import send_script, write_script

TWO_RANKS = (
    *SHORT, "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=1",
    "trainer.total_steps=3", "trainer.save_freq=-1", "trainer.val_freq=1",
)  # fmt: skip
"""One step after the other depends on all weights, and tensor parallelism exchanges activations in every layer.
Checkpoints are written on request alone.
"""
NOT_COMPARED = ("time", "timing_", "perf/", "memory/")
"""Beginnings of the names of metrics that tell of the machine."""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_hosts_and_a_restart_equal_one_machine(cluster: Cluster, tmp_path: Path) -> None:
    digits = make_digits(tmp_path / "digits", "--train-pairs", "64", "--val-pairs", "16")
    script = tmp_path / "two.sbatch"
    words = train_arguments(digits, tmp_path / "runs", "two_hosts", *TWO_RANKS)
    write_script(cluster, script, words, ("--nodes", "2", "--gpus-per-node", "1", "--time", "60"))
    job = send_script(cluster, script, tmp_path / "job.out")
    wait_for_text(cluster, job, "step 1/3", seconds=900)
    cluster.run("scancel", "--signal=USR2", "--batch", job)
    wait_for_text(cluster, job, "status 75: back into the queue, restart 1 of at most 50", seconds=300)
    wait_for_restart(cluster, job, 1)
    done = wait_for_end(cluster, job, seconds=900)
    assert (done.state, done.exit_code, done.restarts) == ("COMPLETED", 0, 1), done.log_text[-5000:]
    assert done.log_text.count("stopped on request (SIGUSR2); the same command goes on from here") == 1

    run = tmp_path / "runs/digits_cpu/two_hosts"
    first, ended, second, last = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert first["start_step"] == 0 < second["start_step"] < 3 and ended["ended"] == "on request"
    assert last["ended"] == "finished"
    assert (run / "do_not_requeue").read_text().startswith("finished")
    whole = train(digits, tmp_path / "runs", "one_machine", *TWO_RANKS)
    two, one = steps_of(run), steps_of(whole)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3], "no gap and no double"
    assert len(two) == len(one) == 3 and len(two[0]) > 30
    weights, expected = exported(run, 3), exported(whole, 3)
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    for here, there in zip(one, two, strict=True):
        assert {name: (value, there.get(name)) for name, value in here.items() if there.get(name) != value} == {}


def steps_of(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics, one per step, without what tells of the machine."""
    lines = [line for line in read_metrics(run) if "actor/pg_loss" in line]
    return [{name: value for name, value in line.items() if not name.startswith(NOT_COMPARED)} for line in lines]
