"""Bars 8 and 16 of waste.py: the operations that packing takes on the host, and the token counts of micro-batches.

Token counts are those of a rank of four over a few steps of 384 prompts with 8 responses each. Prompts have one image
of 64 to 1,280 tokens, responses are log-normal with a mean of about 450 tokens. Models play no part in it.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from bench.pretend_device import PretendDevice
from bench.waste_bars import Bar, Case
from bench.waste_policy import (
    IMAGE_TOKEN,
    Images,
    make_policy,
    make_responses,
    make_settings,
    make_stage,
    on_pretended_device,
    small_config,
)
from megatron_vppo.algorithm.types import ImageRef, PerturbKey, Prompt, Response
from megatron_vppo.parallel.batching import View
from megatron_vppo.parallel.layout import Layout, single_rank
from megatron_vppo.parallel.micro_batches import Rows, packed_tokens
from megatron_vppo.parallel.schedule import ScheduleRunner

ROWS = 32
OPERATIONS = 60

STEPS, MINIBATCHES, PROMPTS, RESPONSES, RANKS = 3, 3, 128, 8, 4
"""Steps of a run, mini-batches of a step, prompts of a mini-batch, responses to each, data-parallel ranks."""
MOST_TOKENS = (24_576, 40_960)
"""Limits that examples/ set for a micro-batch."""
COUNTS, PADDING = 4, 0.03


def packing() -> list[Bar]:
    """Counts bars 8 and 16."""
    with single_rank() as layout:
        operations, more = _operations_of_pack(layout), _operations_of_micro_batch(layout)
        counts = [case for most in MOST_TOKENS for case in _token_counts(layout, most)]
    words = "Operations of torch on the host to pack the views of an update"
    return [
        Bar(
            8,
            words,
            (Case(f"{ROWS} rows", operations, OPERATIONS),),
            {f"one more micro-batch of {ROWS} rows in two views, everything on the host": more},
        ),
        Bar(16, "Different numbers of tokens of a run's micro-batches, and the share of padding", tuple(counts)),
    ]


# --- Operations -------------------------------------------------------------------------------------------------------


def _operations_of_pack(layout: Layout) -> int:
    rows = _rows(1)
    with PretendDevice() as device:
        runner = _runner(on_pretended_device(layout), Images(), most_tokens=None)
        device.restart()
        runner.packer.pack(rows, [View(row, None) for row in range(len(rows))])
        return device.tally.host_operations.total()


def _operations_of_micro_batch(layout: Layout) -> int:
    """Counts operations on the host in two scoring passes, one with a micro-batch more."""
    found = []
    with PretendDevice() as device:
        policy = make_policy(
            small_config("qwen2.5-vl"), on_pretended_device(layout), per="image", images=Images(), rows_each=ROWS
        )
        for micro_batches in (3, 2, 3):  # the first is left out: something is done once
            device.restart()
            policy.score(_rows(micro_batches), step=1, views="both")
            found.append(device.tally.host_operations.total())
    return found[2] - found[1]


def _rows(micro_batches: int) -> list[Response]:
    return make_responses(micro_batches * ROWS // 8)


def _runner(layout: Layout, images: Images, *, most_tokens: int | None) -> ScheduleRunner:
    config = small_config("qwen2.5-vl")
    settings = make_settings("image", max_tokens=most_tokens)
    stage = make_stage(config, layout)
    return ScheduleRunner([stage], hf_config=config, layout=layout, settings=settings, pixels=images)


# --- Token counts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """The tokens of a micro-batch."""

    tokens: int
    padding: int


def _token_counts(layout: Layout, most: int) -> list[Case]:
    # The last of two pipeline stages, which needs no pixels.
    one_of_four = dataclasses.replace(layout, data=RANKS, pipeline=2, pipeline_rank=1)
    runner = _runner(one_of_four, Images(), most_tokens=most)
    draw = random.Random(most)
    update: list[Packed] = []
    score: list[Packed] = []
    for _ in range(STEPS):
        step = [draw_responses(draw, range(n * PROMPTS, (n + 1) * PROMPTS)) for n in range(MINIBATCHES)]
        update += [packed for rows in step for packed in _update(runner, rows)]
        score += _score(runner, [row for rows in step for row in rows])
    cases = []
    for phase, found in (("update", update), ("score", score)):
        name = f"{phase}, {most} tokens, {len(found)} micro-batches"
        counts = len({packed.tokens for packed in found})
        padding = sum(packed.padding for packed in found) / sum(packed.tokens for packed in found)
        cases += [Case(f"{name}: token counts", counts, COUNTS), Case(f"{name}: padding", padding, PADDING)]
    return cases


def _update(runner: ScheduleRunner, rows: Sequence[Response]) -> list[Packed]:
    return [
        _pack(runner, rows, of_micro_batch, both_views=False) for of_micro_batch in runner.update_micro_batches(rows)
    ]


def _score(runner: ScheduleRunner, rows: Sequence[Response]) -> list[Packed]:
    micro_batches = runner.scoring_micro_batches(rows, both_views=True)
    return [_pack(runner, rows, of_micro_batch, both_views=True) for of_micro_batch in micro_batches]


def _pack(runner: ScheduleRunner, rows: Sequence[Response], members: Rows, *, both_views: bool) -> Packed:
    views = [View(row, None) for row in members]
    if both_views:
        views += [View(row, PerturbKey.of(rows[row], 1, per="image")) for row in members]
    limit = runner.scoring_limit(both_views=True) if both_views else runner.update_limit
    tokens = len(runner.packer.pack(rows, views, limit=limit).packed.token_ids_K)
    return Packed(tokens, tokens - packed_tokens(rows, members, reading=runner.reading(both_views=both_views)))


def draw_responses(draw: random.Random, groups: range) -> list[Response]:
    """Draws groups of realistic lengths, with these numbers."""
    made = []
    for group in groups:
        side = round(math.sqrt(min(1280.0, max(64.0, draw.lognormvariate(math.log(600), 0.7)))))
        grid = (1, 2 * side, 2 * side)
        ids = (IMAGE_TOKEN,) * side**2 + (7,) * draw.randint(40, 250)
        prompt = Prompt("train", group, "", "", ids, (), (ImageRef("train", group, 0),), (grid,))
        for sample in range(RESPONSES):
            length = min(4096, max(16, round(draw.lognormvariate(math.log(380), 0.6))))
            made.append(Response(prompt, group, sample, (8,) * length, (0.0,) * length, "stop", 0))
    return made
