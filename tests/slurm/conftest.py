"""A SLURM cluster of two nodes for the tests of this folder."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Site

MAY_NOT = 3
"""The exit status of tools/install/slurm.sh where this machine may not run a cluster."""


@pytest.fixture(scope="session")
def slurm_installed(repo_root: Path) -> None:
    """Installs SLURM if it is missing. Skips where that may not be; fails where it should work and does not."""
    done = subprocess.run([repo_root / "tools/install/slurm.sh"], capture_output=True, text=True)
    if done.returncode == MAY_NOT:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def cluster(slurm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, n1 and n2, that share this machine's files. A test leaves both up, and no job running."""
    with Cluster(tmp_path_factory.mktemp("slurm"), Site(nodes=2, kill_wait=2, node_timeout=5)) as cluster:
        yield cluster
