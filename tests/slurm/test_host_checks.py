"""The mistakes of one of several hosts are said once, in seconds, before a model loads: on a real SLURM."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Site
from tests.slurm.steps import SRUN, run_steps, train, write_script

pytestmark = pytest.mark.distributed


@pytest.fixture
def odd_cluster(slurm_installed: None, tmp_path: Path) -> Iterator[Cluster]:
    """Two hosts that know their own names as 127.0.1.1, as Debian's installer writes it, and have a disk each."""
    site = Site(loopback_names=True, private=(str(tmp_path / "disk"),), kill_wait=2, node_timeout=5)
    with Cluster(tmp_path / "cluster", site) as cluster:
        yield cluster


@pytest.mark.extended
def test_what_settings_say_is_checked_by_one_rank(cluster: Cluster, tmp_path: Path) -> None:
    """Each message comes once, without a traceback, and every rank ends with the status of a mistake."""
    commands = [
        train(SRUN, "parallel.tensor_model_parallel_size=8"),
        train(SRUN, VPPO_TEST_PREFLIGHT="real"),
    ]
    steps = run_steps(cluster, write_script(tmp_path, *commands), "--nodes=2", "--ntasks-per-node=2")
    assert [step.status for step in steps] == [93, 93]
    assert not any("Traceback" in step.text for step in steps)
    messages = [step.messages for step in steps]
    assert [len(said) for said in messages] == [1, 1]
    assert "tensor_model_parallel_size 8 x" in messages[0][0] and "does not divide 4 ranks" in messages[0][0]
    assert re.match(rf"vppo: rank 0 on n1: model\.path={tmp_path}/model: no such folder", messages[1][0])
    assert not [*(tmp_path / "project" / "run").glob(".host_check*")]


@pytest.mark.extended
def test_a_folder_that_is_not_shared_and_names_that_mean_oneself(odd_cluster: Cluster, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    commands = [
        train(SRUN),
        train(SRUN, f"trainer.runs_dir={disk}"),
        f"srun --nodes=1 --ntasks=1 --nodelist=n1 touch {disk}/rows.jsonl",
        train(SRUN, f"data.train_files={disk}/rows.jsonl"),
    ]
    script = write_script(tmp_path / "job", *commands)
    steps = run_steps(odd_cluster, script, "--nodes=2", "--ntasks-per-node=1")
    assert [step.status for step in steps] == [0, 93, 0, 93]
    assert "gloo and NCCL use eth0" in steps[0].text and "trained on 2 ranks" in steps[0].text
    (unshared,), (missing,) = steps[1].messages, steps[3].messages
    assert f"n2: does not see what rank 0's host writes into {disk}/project/run (waited 15 s)" in unshared
    assert "trainer.runs_dir has to lie on a file system that all hosts share" in unshared
    assert f"n2: data.train_files={disk}/rows.jsonl is not there, other hosts have it" in missing
