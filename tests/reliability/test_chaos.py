"""Each part of `make chaos`, as short as it can be."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import pytest

from tests.proofs.conftest import make_digits
from tests.proofs.runs import train
from tests.reliability import requeues, seeds
from tests.reliability.kills import KINDS, SETTINGS, Disturber
from tests.reliability.settings import TWO_RANKS
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.extended]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("pairs"), "--train-pairs", "256", "--val-pairs", "16")


def test_one_kill_of_each_kind(cluster: Cluster, pairs: Path, tmp_path: Path) -> None:
    expected = train(pairs, tmp_path / "runs", "undisturbed", *TWO_RANKS, *SETTINGS)
    disturber = Disturber(
        cluster,
        digits=pairs,
        expected=expected,
        scratch=tmp_path,
        rng=random.Random(0),
        gap_seconds=(5, 35),
        tell=print,
    )
    this = disturber.run(1, most_kills=len(KINDS))
    assert this.faults == []
    assert len(this.kills) >= len(KINDS) // 2


def test_two_time_limits(slurm_installed: None, pairs: Path, tmp_path: Path) -> None:
    _, faults = requeues.run(argparse.Namespace(requeues=2, steps=60), pairs, tmp_path / "requeues")
    assert faults == []


def test_two_seeds_on_one_head_node(slurm_installed: None, pairs: Path, tmp_path: Path) -> None:
    _, faults = seeds.run(argparse.Namespace(seeds=2), pairs, tmp_path / "seeds")
    assert faults == []
