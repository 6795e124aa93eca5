"""The part of `vppo plan` that `--gpu` adds: the modelled seconds of a step, as text."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_vppo.config.schema import (
    ActorConfig,
    AlgorithmConfig,
    DataConfig,
    ParallelConfig,
    PerturbConfig,
)
from megatron_vppo.planning.assumptions import CAUTIOUS, HOPEFUL, Assumptions
from megatron_vppo.planning.candidate import PlanRequest
from megatron_vppo.planning.gpus import GpuCeilings, gpu_named
from megatron_vppo.planning.simulate import SimulatedStep
from megatron_vppo.planning.step_flops import StepWork
from megatron_vppo.planning.step_model import Machine, SpeedModel
from megatron_vppo.planning.timed_layouts import SpeedRequest, TimedLayout, seconds_of
from megatron_vppo.setup.by_machine import ON_GPU

FILTERED_DRAW = 2.0
"""Prompts that online filtering samples for each one that is trained on: it keeps about half of the groups. A guess."""
TEXT_TOKENS = 120
"""Tokens of a mean prompt besides its images. A guess."""
MEAN_RESPONSE = 450
"""Tokens of a mean response. A guess."""


def speed_request(options: argparse.Namespace, request: PlanRequest) -> SpeedRequest | None:
    """Returns what the seconds depend on, with the settings' defaults; None without `--gpu`.

    Raises:
        ValueError: an unknown GPU, options that need `--gpu`, or means above the longest lengths.
    """
    if options.gpu is None:
        given = [flag for flag in ("mean_prompt_tokens", "mean_response_tokens", "simulate") if getattr(options, flag)]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} is about seconds; name the GPU with --gpu")
        return None
    workload, data = request.workload, DataConfig.model_fields
    image_tokens = workload.images_per_row * workload.image_tokens
    prompt = options.mean_prompt_tokens or min(image_tokens + TEXT_TOKENS, workload.prompt_tokens)
    response = options.mean_response_tokens or min(MEAN_RESPONSE, workload.response_tokens)
    for mean, longest, kind in (
        (prompt, workload.prompt_tokens, "prompt"),
        (response, workload.response_tokens, "response"),
    ):
        if mean > longest:
            raise ValueError(f"--mean-{kind}-tokens {mean} is more than --{kind}-tokens {longest}, the longest")
    if prompt <= image_tokens:
        raise ValueError(f"--mean-prompt-tokens {prompt}: the images of a prompt alone have {image_tokens} tokens")
    prompts = data["rollout_batch_size"].default
    merge = request.hf_config.vision_config.spatial_merge_size
    return SpeedRequest(
        work=StepWork(
            prompts=prompts,
            responses=workload.responses_per_prompt,
            drawn=FILTERED_DRAW if AlgorithmConfig.model_fields["online_filtering"].default else 1.0,
            minibatches=-(-prompts // ActorConfig.model_fields["global_batch_size"].default),
            prompt_tokens=prompt,
            response_tokens=response,
            longest_response=workload.response_tokens,
            images=workload.images_per_row,
            patches=workload.image_tokens * merge**2,
            rows_per_update=workload.rows_per_micro_batch,
            rows_per_scoring=workload.rows_per_micro_batch,
            perturbed_per_row=PerturbConfig.model_fields["per"].default == "row",
            shared_prefix=ParallelConfig.model_fields["shared_prefix"].default,
            scores_both_views=workload.scores_both_views,
            updates_both_views=workload.updates_both_views,
        ),
        machine=Machine(gpu_named(options.gpu)),
        max_sequences=ON_GPU.max_num_seqs,
        eager=ON_GPU.enforce_eager,
    )


# --- Text -------------------------------------------------------------------------------------------------------------

HEADERS = (
    "                           | seconds of a step, modelled                      | per GPU",
    "  TP  PP  CP  DP recompute |   step sampling scoring update   sync  rank 0    | tok/s    MFU",
)
ORDER = "by the modelled seconds of a step. Memory decides only what fits."
LEGEND = {
    "step": "the sum of the phases, one after the other, as they run today.",
    "sync": "weights to the engines, engines to sleep and awake, offloaded state there and back.",
    "rank 0": "records and advantages on the hosts, and exchanges of all ranks.",
    "tok/s": "tokens of prompts and trained responses over the step.",
    "MFU": "the update's least arithmetic (nothing computed twice) over its seconds and the peak of the GPU.",
}
CAVEAT = (
    "Modelled, not measured: a GPU has measured shares of scoring, none a whole step. Published runs of others took "
    "0.94 to 1.6 times what such a model said of them. Differences between layouts are safer than sums (docs/plan.md)."
)


def speed_header(speed: SpeedRequest, width: int) -> Iterator[str]:
    work = speed.work
    lines = [
        f"Ceilings: {_ceilings(speed.machine.gpu)}",
        f"Step: {work.prompts} prompts of {work.prompt_tokens} tokens, {work.responses} responses of "
        f"{work.response_tokens} each on average, {work.drawn:g} prompts sampled for each, {work.minibatches} "
        f"mini-batches, {_views_read(work)}",
    ]
    return (textwrap.fill(line, width=width, subsequent_indent="  ") for line in lines)


def _views_read(work: StepWork) -> str:
    return "both views " + ("scored" if work.scores_both_views else "in the update, the original ones scored")


def _ceilings(gpu: GpuCeilings) -> str:
    links = (("within a host", gpu.node), ("between hosts", gpu.network))
    speeds = [
        f"products {gpu.product_flops / 1e12:.3g} TFLOP/s",
        f"memory {gpu.memory / 1e9:.4g} GB/s",
        *(f"{name} {speed / 1e9:.3g} GB/s" for name, speed in links if speed is not None),
    ]
    source = "measured by tools/bench/ceilings.py" if gpu.is_measured else "assumed shares of the data sheet"
    return f"{gpu.name}, {source}: {', '.join(speeds)}"


def seconds_table(timed: Sequence[TimedLayout], *, most: int, width: int) -> Iterator[str]:
    yield "\nModelled seconds of a step with these layouts, in the same order."
    yield from HEADERS
    for each in timed[:most]:
        layout, took = each.layout, each.seconds
        yield (
            f"{layout.tensor:4}{layout.pipeline:4}{layout.context:4}{layout.data:4} {layout.recompute:9} |"
            f" {took.total:6.1f} {took.sampling:8.1f} {took.scoring.total:7.1f} {took.update.total:6.1f}"
            f" {took.sync:6.1f} {took.host + took.collectives:7.1f}    |"
            f" {took.tokens_per_gpu:5.0f} {100 * took.mfu:4.0f} %"
        )
    if len(timed) > most:
        yield f"  and {len(timed) - most} more"
    yield ""
    for term, meaning in LEGEND.items():
        yield textwrap.fill(f"{term:10} {meaning}", width=width, subsequent_indent=" " * 11)


def range_line(first: TimedLayout, model: SpeedModel, request: PlanRequest, speed: SpeedRequest, width: int) -> str:
    """Says how far the guesses move the first layout."""

    def total(assumed: Assumptions) -> float:
        changed = replace(speed, machine=replace(speed.machine, assumed=assumed))
        return seconds_of(first.layout, model, request, changed).total

    text = (
        f"First layout: {first.seconds.total:.0f} s, and {total(HOPEFUL):.0f} to {total(CAUTIOUS):.0f} s with the "
        f"guesses at the ends of their ranges. {CAVEAT}"
    )
    return textwrap.fill(text, width=width)


GROWTH_HEADER = "  GPUs   DP |   step sampling scoring update   sync rank 0 exchange | divided  reached  share"
GROWTH_LEGEND = {
    "divided": "sampling, scoring and update of the plan, if GPUs only divided them.",
    "reached": "that over the step. Sampling ends with its longest response, and rank 0's work does not shrink.",
    "share": "of the step for rank 0's work and the exchanges, whose time beyond 32 ranks is an extrapolation.",
}


def growth_table(steps: Sequence[SimulatedStep | int], *, width: int) -> Iterator[str]:
    yield "\nThe same step with more or fewer replicas of the first layout. Modelled, not measured."
    yield GROWTH_HEADER
    for step in steps:
        if isinstance(step, int):
            yield f"{step:6}      | does not fit the memory"
            continue
        took = step.seconds
        yield (
            f"{step.gpus:6}{step.layout.data:5} | {took.total:6.1f} {took.sampling:8.1f} {took.scoring.total:7.1f}"
            f" {took.update.total:6.1f} {took.sync:6.1f} {took.host:6.2f} {took.collectives:8.2f} | {step.divided:7.1f}"
            f" {step.efficiency:8.0%} {step.serial_share:6.1%}"
        )
    for term, meaning in GROWTH_LEGEND.items():
        yield textwrap.fill(f"{term:10} {meaning}", width=width, subsequent_indent=" " * 11)
