"""The division of a step: prompts, rows, mini-batches and micro-batches of each data-parallel rank, and who is idle."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vppo.algorithm.types import ImageRef, Prompt, Response
from megatron_vppo.config.choices import PerturbUnit
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.parallel.balancing import assign_to_ranks
from megatron_vppo.parallel.micro_batches import Reading, cut_by_rows, fill_by_tokens, groups_of_rank
from megatron_vppo.setup.hardware import shares_prompts
from megatron_vppo.setup.settings import vppo_settings


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


def scoring_per(config: RunConfig) -> PerturbUnit | None:
    """Returns the rows that have a perturbed view in common; None: no perturbed view is scored."""
    return config.algorithm.perturb.per if vppo_settings(config).needs_perturbed_view else None


def update_per(config: RunConfig) -> PerturbUnit | None:
    """Returns the same of the update; None: it reads no perturbed view."""
    return config.algorithm.perturb.per if vppo_settings(config).updates_both_views else None


def scores_to_end(config: RunConfig) -> bool:
    """Returns True if scoring reads the last tokens of responses, too."""
    return vppo_settings(config).needs_visual_focus


def divide_step(config: RunConfig, *, data: int) -> Batches:
    """Divides a step over `data` data-parallel ranks, as rows of equal length are."""
    rollout, actor, parallel = config.rollout, config.actor, config.parallel
    prompts, per, most = config.data.rollout_batch_size, scoring_per(config), actor.max_tokens_per_micro_batch
    update = _share(
        config,
        actor.global_batch_size,
        actor.micro_batch_size_per_device_for_update,
        data=data,
        per=update_per(config),
        most_tokens=most,
    )
    return Batches(
        prompts=prompts,
        rows=prompts * rollout.n,
        mini_batches=prompts // actor.global_batch_size * actor.ppo_epochs,
        score=_share(
            config,
            prompts,
            actor.micro_batch_size_per_device_for_experience,
            data=data,
            per=per,
            most_tokens=None if most is None else most * (1 if per is None else 2),
            to_end=scores_to_end(config),
        ),
        update=update,
        bubble=pipeline_bubble(
            parallel.pipeline_model_parallel_size,
            micro_batches=update.micro_batches,
            virtual_stages=parallel.virtual_pipeline_model_parallel_size,
        ),
    )


def _share(
    config: RunConfig,
    groups: int,
    rows_each: int,
    *,
    data: int,
    per: PerturbUnit | None,
    most_tokens: int | None,
    to_end: bool = False,
) -> RankShare:
    """
    Args:
        per: the rows that have a perturbed view in common; None: no perturbed view is read.
        most_tokens: of a micro-batch, in all its views; None: it has `rows_each` rows.
        to_end: the last tokens of responses are read, too.
    """
    groups_of_ranks, group_rows = assign_to_ranks([1] * groups, num_ranks=data), config.rollout.n
    fullest = max(len(mine) for mine in groups_of_ranks)
    return RankShare(
        rows=fullest * group_rows,
        micro_batches=len(cut_by_rows([tuple(range(group_rows))] * fullest, rows_each=rows_each))
        if most_tokens is None
        else _filled(config, fullest, most_tokens, per=per, to_end=to_end),
        idle=tuple(rank for rank, mine in enumerate(groups_of_ranks) if not mine),
        load=groups / data / fullest,
    )


def _filled(config: RunConfig, groups: int, most_tokens: int, *, per: PerturbUnit | None, to_end: bool) -> int:
    """Counts the micro-batches that groups of the longest rows fill."""
    data = config.data
    reading = Reading(shares_prompts(config), per, patch_work=0.0, to_end=to_end)
    prompt = Prompt("train", 0, "", "", (0,) * data.max_prompt_length, (), (ImageRef("train", 0, 0),), ((1, 1, 1),))
    words, logps = (0,) * data.max_response_length, (0.0,) * data.max_response_length
    samples = range(config.rollout.n)
    rows = [Response(prompt, group, sample, words, logps, "length", 0) for group in range(groups) for sample in samples]
    of_groups = groups_of_rank(rows, data_rank=0, data=1, reading=reading)
    return len(fill_by_tokens(rows, of_groups, most_tokens=most_tokens, reading=reading))


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
