"""The test cluster of tests/slurm/."""

from tests.slurm.conftest import cluster, slurm_installed  # noqa: F401 (fixtures, shared)
