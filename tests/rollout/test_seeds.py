"""Seeds: pinned values (they are part of a run's reproducibility), independence, the authors' mode."""

from __future__ import annotations

import hashlib
import itertools

import pytest

from megatron_vppo.rollout.seeds import continued_seed, question_seed, sample_seed, sample_seeds

PLACE = {"run_seed": 1, "step": 2, "attempt": 0, "split": "train", "row": 17}


def test_independent_seeds_follow_the_documented_hash() -> None:
    hashed = hashlib.blake2b(b"1/2/0/train/17/3", digest_size=8, person=b"vppo-seed").digest()
    assert sample_seed(**PLACE, sample=3) == int.from_bytes(hashed, "little") >> 1
    assert sample_seeds("independent", n=4, **PLACE)[3] == sample_seed(**PLACE, sample=3)


def test_independent_seeds_differ_in_every_argument_also_in_the_low_32_bits() -> None:
    seeds = [
        sample_seed(run_seed=run, step=step, attempt=attempt, split=split, row=row, sample=sample)
        for run, step, attempt, split, row, sample in itertools.product(
            (1, 2), (1, 11), (0, 1), ("train", "val"), (1, 11, 111), range(8)
        )
    ]
    assert len(set(seeds)) == len(seeds)
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_shared_and_engine_seeds() -> None:
    assert sample_seeds("shared", n=3, **PLACE) == (1, 2, 3)
    assert sample_seeds("engine", n=2, **PLACE) == (None, None)
    with pytest.raises(ValueError, match=r"rollout\.seeds = 'same'"):
        sample_seeds("same", n=2, **PLACE)  # type: ignore[arg-type]


def test_a_response_that_goes_on_has_a_seed_of_its_own() -> None:
    hashed = hashlib.blake2b(b"5/40", digest_size=8, person=b"vppo-go-on").digest()
    assert continued_seed(5, tokens=40) == int.from_bytes(hashed, "little") >> 1
    assert continued_seed(5, tokens=0) == 5 and continued_seed(None, tokens=40) is None
    assert len({continued_seed(seed, tokens=tokens) for seed in (1, 2) for tokens in (0, 1, 2)}) == 6


def test_seeds_of_an_evaluation_follow_the_documented_hash_and_differ_in_every_argument() -> None:
    hashed = hashlib.blake2b(b'[1, "Geo3K", "7", 2]', digest_size=8, person=b"vppo-evaluation").digest()
    expected = int.from_bytes(hashed, "little") >> 1
    assert question_seed(run_seed=1, benchmark="Geo3K", question="7", sample=2) == expected
    seeds = [
        question_seed(run_seed=run, benchmark=benchmark, question=question, sample=sample)
        for run, benchmark, question, sample in itertools.product((1, 11), ("a", "b"), ("1", "11"), range(12))
    ]
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)
