"""Ranks of several hosts find each other on a real SLURM, without a line about it in the batch script."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import submit, wait_for_end
from tests.slurm.steps import SRUN, read_steps, run_steps, train, write_script

pytestmark = pytest.mark.distributed


def test_two_hosts_and_variables_that_cannot_be_right(cluster: Cluster, tmp_path: Path) -> None:
    commands = [
        train(SRUN),
        train(""),
        train(SRUN, MASTER_ADDR=""),
        train(SRUN, MASTER_ADDR="no-such-host"),
        train(SRUN, MASTER_ADDR="localhost"),
        train(SRUN, MASTER_ADDR="n2"),
        train(SRUN, WORLD_SIZE="4"),
        train(SRUN, MASTER_PORT="x"),
    ]
    steps = run_steps(cluster, write_script(tmp_path, *commands), "--nodes=2", "--ntasks-per-node=1")
    assert [step.status for step in steps] == [0] + [93] * 7
    trained = steps[0].text
    first, second = cluster.address("n1"), cluster.address("n2")
    assert re.match(r"2 hosts, 2 ranks; store at n1:\d+; gloo and NCCL use eth0\n", trained), trained
    assert f"0      n1    {first} (eth0)" in trained and f"1      n2    {second} (eth0)" in trained
    assert re.search(r"^all-reduce of 4 MiB over 2 ranks: .* GB/s\ntrained on 2 ranks$", trained, re.MULTILINE)
    said = [" | ".join(dict.fromkeys(step.messages)) for step in steps[1:]]
    expected = [
        r"this job has 2 hosts, and without srun only this one would work\. .*: srun --kill-on-bad-exit=1 ",
        r"has MASTER_ADDR='';",
        r"MASTER_ADDR='no-such-host', and the name 'no-such-host' is not known on n[12] .*address of n1 that every",
        r"MASTER_ADDR='localhost', and that is each host itself, while the step has 2",
        r"MASTER_ADDR='n2', and (SLURM_STEP_NODELIST begins with n1, .* is no|on n2 that means .* n2 itself)",
        r"has WORLD_SIZE='4' and SLURM_STEP_NUM_TASKS=2",
        r"has MASTER_PORT='x'",
    ]
    for message, pattern in zip(said, expected, strict=True):
        assert re.search(pattern, message), (pattern, message)


@pytest.mark.extended
def test_an_array_on_the_same_hosts(cluster: Cluster, tmp_path: Path) -> None:
    """Two trainings at once: each finds its own ranks. With one port for both, the second names it."""
    name = "trainer.experiment_name=seed-$SLURM_ARRAY_TASK_ID"
    once = train(SRUN, name, VPPO_TEST_SECONDS="5")
    fixed = train(SRUN, name, VPPO_TEST_SECONDS="10", MASTER_PORT="29500")
    script = write_script(tmp_path, once, fixed)
    options = ("--array=1-2", "--nodes=2", "--ntasks-per-node=1", "--output=%a.log")
    job = submit(cluster, script, *options)
    for task in (1, 2):
        wait_for_end(cluster, f"{job}_{task}", seconds=300)
    logs = [read_steps((tmp_path / f"{task}.log").read_text()) for task in (1, 2)]
    assert [log[0].status for log in logs] == [0, 0]
    assert all("trained on 2 ranks" in log[0].text for log in logs)
    refused = [log[1] for log in logs if log[1].status]
    assert len(refused) == 1
    assert refused[0].status in (93, 143), "of rank 0, or of the other one, which srun ended while it looked for rank 0"
    assert "rank 0 cannot listen on n1, port 29500: Address already in use; unset MASTER_PORT" in refused[0].text


@pytest.mark.extended
def test_torchrun_under_srun(cluster: Cluster, tmp_path: Path) -> None:
    """One torchrun per host starts the ranks, as many sites are used to."""
    torchrun = f"{SRUN} {sys.executable} -m torch.distributed.run --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d"
    (step,) = run_steps(
        cluster,
        write_script(tmp_path, train(f"{torchrun} --rdzv-endpoint=n1 --rdzv-id=$SLURM_JOB_ID --no-python")),
        "--nodes=2",
        "--ntasks-per-node=1",
    )
    assert step.status == 0, step.text
    assert re.search(r"^2 hosts, 4 ranks; store at ", step.text, re.MULTILINE), step.text
    assert "trained on 4 ranks" in step.text
