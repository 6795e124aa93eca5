"""Rows, micro-batches and waiting, by hand and by the figures of the field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_vppo.launching.batches import RankShare, divide_step, in_flight, pipeline_bubble, scoring_per
from megatron_vppo.models.build import build_model
from megatron_vppo.models.layers.packed import PackedBatch
from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.options import ModelOptions
from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.parallel.layout import init_layout
from tests.gloo import run_gloo
from tests.launching.runs import four_layers, run_config


def test_a_step_over_three_ranks_by_hand() -> None:
    """Four groups of three rows: one rank has two groups, six rows in three micro-batches of two."""
    batches = divide_step(run_config(actor={"ppo_epochs": 2}), data=3)
    assert (batches.prompts, batches.rows, batches.mini_batches) == (8, 24, 4)
    assert batches.update == RankShare(rows=6, micro_batches=3, idle=(), load=pytest.approx(12 / 18))
    # Eight groups: three, three and two; nine rows are three micro-batches of three.
    assert batches.score == RankShare(rows=9, micro_batches=3, idle=(), load=pytest.approx(24 / 27))
    assert batches.bubble == 0


def test_one_view_suffices_where_nothing_is_perturbed() -> None:
    unfiltered = {"use_vppo_on_perception": False, "use_advantage_shaping": False}
    assert scoring_per(run_config(algorithm={"perturb": {"per": "row"}})) == "row"
    assert scoring_per(run_config(algorithm={"dependency": "visual_focus"})) is None
    assert scoring_per(run_config(algorithm=unfiltered)) is None


def test_more_ranks_than_groups_leave_the_last_ones_idle() -> None:
    batches = divide_step(run_config(), data=6)
    assert batches.update == RankShare(rows=3, micro_batches=2, idle=(4, 5), load=pytest.approx(4 / 6))
    assert batches.score.idle == ()


def test_both_views_in_the_update_fill_more_micro_batches() -> None:
    """Groups of three rows are 40 + 3 x 8 = 64 tokens, in both views 128: of 256 tokens there are two groups and four.

    Scoring reads the original views alone: 8 groups, four to a micro-batch.
    """
    papo = {"use_vppo_on_perception": False, "use_advantage_shaping": False, "perception_loss_coef": 0.01}
    actor = {"max_tokens_per_micro_batch": 256}
    both = divide_step(run_config(actor=actor, algorithm=papo), data=1)
    assert (both.update.micro_batches, both.score.micro_batches) == (2, 2)
    constant = {**papo, "perception_gradient": "original_view"}
    once = divide_step(run_config(actor=actor, algorithm=constant), data=1)
    assert (once.update.micro_batches, once.score.micro_batches) == (1, 2), "both scored: twice the limit"


def test_scoring_that_reads_the_last_tokens_fills_more_micro_batches() -> None:
    """With them a group is 40 + 3 x 9 = 67 tokens: three, not four, to 256 tokens. The update goes without."""
    config = run_config(actor={"max_tokens_per_micro_batch": 256}, algorithm={"dependency": "visual_focus"})
    batches = divide_step(config, data=1)
    assert (batches.update.micro_batches, batches.score.micro_batches) == (1, 3)


@pytest.mark.parametrize(
    ("data", "two_stages", "four_stages"), [(4, 2, 4), (16, 6, 16), (32, 11, 27), (64, 20, 43), (128, 33, 60)]
)
def test_bubbles_in_percent(data: int, two_stages: int, four_stages: int) -> None:
    """128 groups of eight, four rows to a micro-batch: 256 / data micro-batches, and p - 1 more turns."""
    percent = [
        round(100 * pipeline_bubble(pipeline, micro_batches=256 // data, virtual_stages=1)) for pipeline in (2, 4)
    ]
    assert percent == [two_stages, four_stages]


def test_the_bubble_of_a_step() -> None:
    config = run_config(parallel={"pipeline_model_parallel_size": 2})
    assert divide_step(config, data=2).bubble == pytest.approx(1 / (3 + 1))  # two groups, six rows, three micro-batches


def test_virtual_stages_divide_the_bubble() -> None:
    assert pipeline_bubble(4, micro_batches=6, virtual_stages=2) == pytest.approx(1.5 / 7.5)


def test_micro_batches_in_flight() -> None:
    plain = [in_flight(3, rank=rank, micro_batches=6, virtual_stages=1) for rank in range(3)]
    assert plain == [(3,), (2,), (1,)]
    assert in_flight(3, rank=0, micro_batches=2, virtual_stages=1) == (2,), "there are no more"


def test_micro_batches_in_flight_of_virtual_stages_by_hand() -> None:
    """Two ranks of two virtual stages run two micro-batches of the first stage, two of the second, and so on.

    Rank 0 runs 2 (2 - 0 - 1) + (2 - 1) 2 = 4 parts before the first backward pass of which one is to come: five.
    """
    assert in_flight(2, rank=0, micro_batches=8, virtual_stages=2) == (3, 2)
    assert in_flight(2, rank=1, micro_batches=8, virtual_stages=2) == (2, 1)
    assert in_flight(2, rank=0, micro_batches=2, virtual_stages=2) == (2, 2)


# --- Real ranks -------------------------------------------------------------------------------------------------------


def most_in_flight(rank: int, world_size: int, micro_batches: int, virtual_stages: int) -> tuple[int, ...]:
    """The most micro-batches that each virtual stage of this rank has run forward and not yet backward, at the moment
    when the rank holds most in all.
    """
    layout = init_layout(tensor=1, pipeline=world_size, virtual_stages=virtual_stages, timeout_seconds=60)
    stages = [
        build_model(
            four_layers(),
            groups=layout.groups,
            vision_groups=layout.vision_groups,
            dtype=torch.float32,
            device=layout.device,
            options=ModelOptions(virtual_stages=virtual_stages),
            virtual_stage=number,
        )
        for number in range(virtual_stages)
    ]
    for parameter in (parameter for stage in stages for parameter in stage.parameters()):
        torch.nn.init.constant_(parameter, 0.01)
    running, fullest = [0] * virtual_stages, [0] * virtual_stages

    def step(data: Iterator[int], stage: QwenVLModel) -> Any:
        nonlocal fullest
        next(data)
        ids, nothing = torch.arange(5), torch.zeros(0, dtype=torch.int64)
        output = stage(stage.plan(PackedBatch(ids, ids.expand(3, 5), Packing((5,)), nothing, nothing)))
        number = stage.vp_stage
        running[number] += 1
        fullest = max(fullest, list(running), key=sum)

        def finished(grad: torch.Tensor) -> None:
            running[number] -= 1

        output.register_hook(finished)
        return output, lambda hidden: (hidden.sum(), {})

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(range(micro_batches)) for _ in stages],
        model=stages,
        num_microbatches=micro_batches,
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    assert running == [0] * virtual_stages
    return tuple(fullest)


@pytest.mark.distributed
@pytest.mark.extended
@pytest.mark.parametrize("micro_batches", [2, 8])
def test_micro_batches_in_flight_of_megatrons_interleaved_schedule(micro_batches: int) -> None:
    expected = [in_flight(2, rank=rank, micro_batches=micro_batches, virtual_stages=2) for rank in range(2)]
    assert run_gloo(most_in_flight, 2, micro_batches, 2) == expected
