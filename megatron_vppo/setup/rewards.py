"""The reward workers of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_vppo.config.choices import BUILT_IN_REWARD
from megatron_vppo.config.schema import RewardConfig
from megatron_vppo.data.reward_pool import RewardPool
from megatron_vppo.data.text_decoder import describe_tokenizer
from megatron_vppo.setup.places import Place

MOST_WORKERS = 32
"""The most workers that are started unasked. Each takes 90 MiB; beyond them rank 0 has no more work to save."""


def open_reward_pool(
    config: RewardConfig, tokenizer: Any, places: Sequence[Place], *, say: Callable[[str], None]
) -> RewardPool:
    """Starts the reward workers of rank 0, which calls this, and says how many they are where none is set.

    Args:
        tokenizer: the model's, of transformers.
    """
    num_workers = config.num_workers
    if num_workers is None:
        num_workers = fair_workers(config, places)
        say(f"reward workers: {num_workers} (reward.num_workers)")
    return RewardPool(
        config.reward_function,
        tokenizer=describe_tokenizer(tokenizer),
        reward_type=config.reward_type,
        num_workers=num_workers,
        timeout_seconds=config.timeout_seconds,
    )


def fair_workers(config: RewardConfig, places: Sequence[Place]) -> int:
    """Returns the number of workers where none is set: one per core of rank 0's fair share, up to MOST_WORKERS.

    A batch function has one: it may compare all responses that it gets.
    """
    if config.reward_function != BUILT_IN_REWARD and config.reward_type == "batch":
        return 1
    mine = places[0]
    sharing = sum(place.host == mine.host and bool({*place.cores} & {*mine.cores}) for place in places)
    return min(MOST_WORKERS, max(1, len(mine.cores) // sharing))
