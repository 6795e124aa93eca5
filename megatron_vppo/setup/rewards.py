"""The reward workers of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from megatron_vppo.config.choices import GRADERS, Grader
from megatron_vppo.config.data_files import files_of
from megatron_vppo.config.schema import DataConfig, RewardConfig
from megatron_vppo.data.dataset import VisionDataset
from megatron_vppo.data.graders.weighted import BuiltInReward
from megatron_vppo.data.reward_pool import RewardPool
from megatron_vppo.data.text_decoder import describe_tokenizer
from megatron_vppo.data.user_reward import UserReward
from megatron_vppo.setup.places import Place

MOST_WORKERS = 32
"""The most workers that are started unasked. Each takes 90 MiB; beyond them rank 0 has no more work to save."""


def open_reward_pool(
    config: RewardConfig,
    data: DataConfig,
    datasets: Mapping[str, VisionDataset],
    tokenizer: Any,
    places: Sequence[Place],
    *,
    say: Callable[[str], None],
) -> RewardPool:
    """Starts the reward workers of rank 0, which calls this. Says the kind of a user's function and their number.

    Args:
        datasets: those of `data`, by the names of `files_of`.
        tokenizer: the model's, of transformers.
    """
    pool = RewardPool(
        reward_of(config, data),
        tokenizer=describe_tokenizer(tokenizer),
        num_workers=config.num_workers or fair_workers(places),
        # A function that takes lists may compare all responses that it gets.
        num_batch_workers=config.num_workers or 1,
        timeout_seconds=config.timeout_seconds,
        extras=lambda split, row: datasets[split].extras(row),
    )
    if has_user_function(config):
        say(f"reward function: {config.reward_function} is called with {pool.convention}")
    if config.num_workers is None:
        say(f"reward workers: {pool.num_workers} (reward.num_workers)")
    return pool


def has_user_function(config: RewardConfig) -> bool:
    """Returns True if rewards come from a function of the user's, not from a grader of ours."""
    return config.reward_function not in GRADERS


def reward_of(config: RewardConfig, data: DataConfig) -> BuiltInReward | UserReward:
    """Returns the reward that the settings ask for."""
    if not has_user_function(config):
        main = cast(Grader, config.reward_function)
        return BuiltInReward(
            main=main,
            weights=config.parts or {main: 1.0},
            relative_tolerance=config.relative_tolerance,
            absolute_tolerance=config.absolute_tolerance,
            iou_threshold=config.iou_threshold,
        )
    file, _, name = config.reward_function.rpartition(":")
    files = {**files_of(data, "train"), **files_of(data, "val")}
    return UserReward(
        file=str(Path(file).absolute()),
        name=name,
        arguments=config.reward_function_kwargs,
        reward_type=config.reward_type,
        data_sources={name: file.path.partition("@")[0] for name, file in files.items()},
    )


def fair_workers(places: Sequence[Place]) -> int:
    """Returns the number of workers where none is set: one per core of rank 0's fair share, up to MOST_WORKERS."""
    mine = places[0]
    sharing = sum(place.host == mine.host and bool({*place.cores} & {*mine.cores}) for place in places)
    return min(MOST_WORKERS, max(1, len(mine.cores) // sharing))
