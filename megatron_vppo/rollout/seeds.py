"""The seeds that responses are sampled with."""

from __future__ import annotations

import hashlib
import json

from megatron_vppo.config.choices import SeedKind

SEED_BITS = 63
"""vLLM keeps a seed as a signed 64-bit integer and reads -1 as 'none'. torch's CPU generator uses the low 32 bits."""


def sample_seed(*, run_seed: int, step: int, attempt: int, split: str, row: int, sample: int) -> int:
    """Returns the seed of one response, in [0, 2**63): the first 8 bytes of BLAKE2b over the six values.

    So any two responses have unrelated seeds, also those of another step, another round of the same step or another
    run, and the order in which prompts are drawn or spread over engines does not matter.
    """
    text = f"{run_seed}/{step}/{attempt}/{split}/{row}/{sample}"
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"vppo-seed").digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)


def question_seed(*, run_seed: int, benchmark: str, question: str, sample: int) -> int:
    """Returns the seed of one response of an evaluation, in [0, 2**63).

    It depends on the names of the benchmark and the question alone: a subset of a benchmark, or another order, gives
    each question the same seeds.
    """
    text = json.dumps([run_seed, benchmark, question, sample])
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"vppo-evaluation").digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)


def continued_seed(seed: int | None, *, tokens: int) -> int | None:
    """Returns the seed with which a response goes on that has some tokens already, in [0, 2**63).

    With its own seed it would repeat the random numbers of its beginning.
    """
    if seed is None or tokens == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{tokens}".encode(), digest_size=8, person=b"vppo-go-on").digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)


def sample_seeds(
    kind: SeedKind,
    *,
    n: int,
    run_seed: int,
    step: int,
    attempt: int,
    split: str,
    row: int,
) -> tuple[int | None, ...]:
    """Returns the seeds of the n responses to one prompt.

    - 'independent': `sample_seed` of each.
    - 'shared': 1 to n for every prompt of every step, as in the authors' code. It passes seed=1 and n in one request,
      and vLLM's `ParentRequest._get_child_sampling_params` gives response i the seed 1 + i.
    - 'engine': None, which takes the engine's generator. Results then depend on what else is in the batch.
    """
    if kind == "independent":
        return tuple(
            sample_seed(run_seed=run_seed, step=step, attempt=attempt, split=split, row=row, sample=sample)
            for sample in range(n)
        )
    if kind == "shared":
        return tuple(range(1, n + 1))
    if kind == "engine":
        return (None,) * n
    raise ValueError(f"rollout.seeds = {kind!r}; use 'independent', 'shared' or 'engine'")
