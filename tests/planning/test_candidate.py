"""The input of a plan, and the memory of a layout in each phase."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vppo.config.choices import MemoryPart
from megatron_vppo.planning.activations import StageActivations
from megatron_vppo.planning.candidate import GIB, Candidate, StageMemory, Workload
from megatron_vppo.planning.state import StateBytes

WORKLOAD = Workload(
    prompt_tokens=4096,
    response_tokens=2048,
    images_per_row=1,
    image_tokens=1280,
    rows_per_micro_batch=1,
    responses_per_prompt=8,
    head_chunk_tokens=1024,
)


def test_a_micro_batch_counts_images_and_views() -> None:
    """Four neighbours of groups of eight lie in two groups at most; the perturbed image of each is its own."""
    workload = replace(WORKLOAD, rows_per_micro_batch=4)
    update = workload.micro_batch(merge=2, context=1, both_views=False)
    score = workload.micro_batch(merge=2, context=1, both_views=True)
    assert (update.tokens, score.tokens) == (4 * 6143, 8 * 6143)
    assert (update.patches, score.patches) == (2 * 5120, 6 * 5120)
    assert (update.image_tokens, update.response_tokens) == (4 * 1280, 4 * 2048)
    assert (
        replace(workload, responses_per_prompt=1).micro_batch(merge=2, context=1, both_views=False).patches == 4 * 5120
    )
    two = workload.micro_batch(merge=2, context=4, both_views=True)
    assert two.patches == 2 * 5120, "six images on four ranks"
    assert WORKLOAD.micro_batch(merge=3, context=1, both_views=False).patches == 1280 * 9
    pair = replace(workload, images_per_row=2).micro_batch(merge=2, context=1, both_views=False)
    assert (pair.image_tokens, pair.patches) == (4 * 2 * 1280, 2 * 2 * 5120)


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (2, 2), (9, 2), (10, 3), (17, 3), (18, 4)])
def test_groups_of_eight_that_neighbours_touch(rows: int, groups: int) -> None:
    """Nine may be the last of a group and a whole one; a tenth is then of a third."""
    batch = replace(WORKLOAD, rows_per_micro_batch=rows).micro_batch(merge=2, context=1, both_views=False)
    assert batch.patches == groups * 5120


def test_images_that_do_not_fit_the_prompt() -> None:
    with pytest.raises(ValueError, match="4 images of 1280 tokens do not fit a prompt of 4096"):
        replace(WORKLOAD, images_per_row=4)
    assert replace(WORKLOAD, image_tokens=4095).image_tokens == 4095
    with pytest.raises(ValueError, match="1 images of 4096 tokens do not fit a prompt of 4096"):
        replace(WORKLOAD, image_tokens=4096)


@pytest.mark.parametrize(
    ("offload", "sampling", "sync"),
    [
        (set(), 45, 45),
        ({"params"}, 40, 45),
        ({"params", "optimizer"}, 14, 21),
        ({"params", "grads", "optimizer"}, 0, 7),
    ],
)
def test_each_phase_has_its_own_fullest_stage(offload: set[MemoryPart], sampling: int, sync: int) -> None:
    """The first holds the larger optimizer, the last the larger weights and activations. 3 GiB are in reserve."""
    c = Candidate(
        tensor=1,
        pipeline=2,
        context=1,
        data=1,
        layers=(1, 1),
        recompute="none",
        stages=(
            StageMemory(StateBytes(weights=5, gradients=10, optimizer=30), StageActivations(layers=1, head=0)),
            StageMemory(StateBytes(weights=7, gradients=14, optimizer=20), StageActivations(layers=2, head=40)),
        ),
        offload=frozenset(offload),
        engine=None,
    )
    reserve = 3 * GIB
    assert (c.trainer_bytes, c.sampling_bytes, c.sync_bytes) == (83 + reserve, sampling + reserve, sync + reserve)
