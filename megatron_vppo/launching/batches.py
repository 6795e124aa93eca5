"""The division of a step: prompts, rows, mini-batches and micro-batches of each data-parallel rank, and who is idle."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.parallel.balancing import assign_to_ranks


@dataclass(frozen=True)
class RankShare:
    """The rows that data-parallel ranks have of one batch. Whole groups go to a rank, so ranks may differ by one."""

    rows: int
    """The rows of the fullest data-parallel rank."""
    micro_batches: int
    """The micro-batches of that rank, which the others wait for."""
    idle: tuple[int, ...]
    """The data-parallel ranks that have none."""
    load: float
    """The rows of an average rank over those of the fullest: the share of time in which ranks compute."""


@dataclass(frozen=True)
class Batches:
    prompts: int
    """The prompts of a step that are kept. Filtering may leave fewer."""
    rows: int
    mini_batches: int
    """The optimizer steps of a step, those of further passes over the same rows (actor.ppo_epochs) included."""
    score: RankShare
    update: RankShare
    """The share of one mini-batch."""
    bubble: float
    """The share of an update's time in which a pipeline stage waits for others; 0 without a pipeline."""


def divide_step(config: RunConfig, *, data: int) -> Batches:
    """Divides a step over `data` data-parallel ranks, as rows of equal length are."""
    rollout, actor, parallel = config.rollout, config.actor, config.parallel
    prompts = config.data.rollout_batch_size
    update = _share(actor.global_batch_size, rollout.n, actor.micro_batch_size_per_device_for_update, data=data)
    return Batches(
        prompts=prompts,
        rows=prompts * rollout.n,
        mini_batches=prompts // actor.global_batch_size * actor.ppo_epochs,
        score=_share(prompts, rollout.n, actor.micro_batch_size_per_device_for_experience, data=data),
        update=update,
        bubble=pipeline_bubble(
            parallel.pipeline_model_parallel_size,
            micro_batches=update.micro_batches,
            virtual_stages=parallel.virtual_pipeline_model_parallel_size,
        ),
    )


def _share(groups: int, group_rows: int, rows_each: int, *, data: int) -> RankShare:
    groups_of_ranks = assign_to_ranks([1] * groups, num_ranks=data)
    fullest = max(len(mine) for mine in groups_of_ranks) * group_rows
    return RankShare(
        rows=fullest,
        micro_batches=-(-fullest // rows_each),
        idle=tuple(rank for rank, mine in enumerate(groups_of_ranks) if not mine),
        load=groups * group_rows / data / fullest,
    )


def pipeline_bubble(pipeline: int, *, micro_batches: int, virtual_stages: int) -> float:
    """Returns the share of time in which a stage waits, if all stages and micro-batches take equally long.

    With p stages a rank waits p - 1 times for as long as a micro-batch takes it. With v virtual stages on each rank it
    waits for one of v parts each time.
    """
    waiting = (pipeline - 1) / virtual_stages
    return waiting / (micro_batches + waiting)


def in_flight(pipeline: int, *, rank: int, micro_batches: int, virtual_stages: int) -> tuple[int, ...]:
    """Returns how many micro-batches each virtual stage of a pipeline rank has run forward and not yet backward, at
    most.

    Without virtual stages these are the p - s of stage s. With them, Megatron's interleaved schedule runs
    2 (p - s - 1) + (v - 1) p parts before the first backward pass, p micro-batches of a virtual stage after the other.
    """
    if virtual_stages == 1:
        return (min(pipeline - rank, micro_batches),)
    parts = min(2 * (pipeline - rank - 1) + (virtual_stages - 1) * pipeline + 1, micro_batches * virtual_stages)
    order = [part // pipeline % virtual_stages for part in range(parts)]
    return tuple(order.count(stage) for stage in range(virtual_stages))
