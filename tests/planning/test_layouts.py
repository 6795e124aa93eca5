"""The search for layouts: which are looked at, what they need, which come first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_vppo.config.choices import MemoryPart, ModelPart
from megatron_vppo.planning.activations import Kernels, LayerSplit, MicroBatch, score_activations, update_activations
from megatron_vppo.planning.candidate import GIB, TRAINER_RESERVE, Candidate, Cluster, PlanRequest, Workload
from megatron_vppo.planning.engine_share import ENGINE_RESERVE, SLEEPING_ENGINE
from megatron_vppo.planning.layouts import RECOMPUTES, LayoutPlan, make_plan, near_even
from megatron_vppo.planning.published import PUBLISHED, published_config
from megatron_vppo.planning.sizes import language_sizes, vision_sizes
from tests.planning.test_candidate import WORKLOAD

NODE = Cluster(gpus=8, gpu_bytes=80 * GIB, gpus_per_node=8)


def plan_of(
    name: str,
    cluster: Cluster = NODE,
    workload: Workload = WORKLOAD,
    *,
    rollout_tensor: int | None = None,
    sequences: int = 16,
    frozen: frozenset[ModelPart] = frozenset(),
    offload: frozenset[MemoryPart] = frozenset(),
) -> LayoutPlan:
    return make_plan(
        PlanRequest(
            published_config(name),
            cluster,
            workload,
            rollout_tensor=rollout_tensor,
            engine_sequences=sequences,
            frozen=frozen,
            offload=offload,
        )
    )


def sizes_of(c: Candidate) -> tuple[int, int, int, int]:
    return c.tensor, c.pipeline, c.context, c.data


def sizes(plan: LayoutPlan) -> list[tuple[int, int, int, int]]:
    return [sizes_of(c) for c in plan.fitting]


def test_state_of_a_real_size() -> None:
    """bfloat16 weights, fp32 gradients, 12 bytes of optimizer over data-parallel ranks; 1 % for what is not split."""
    for c in plan_of("qwen2.5-vl-7b").fitting:
        if c.pipeline == 1:
            values = PUBLISHED["qwen2.5-vl-7b"].parameters / c.tensor
            assert c.fullest.state.weights == pytest.approx(2 * values, rel=0.01)
            assert c.fullest.state.gradients == 2 * c.fullest.state.weights
            assert c.fullest.state.optimizer == 6 * c.fullest.state.weights // (c.data * c.context)
            assert c.tensor * c.pipeline * c.context * c.data == 8


def test_everything_that_fits_is_there_and_sorted() -> None:
    plan = plan_of("qwen2.5-vl-7b")
    assert {(t, p) for t, p, _, _ in sizes(plan)} <= {(t, p) for t in (1, 2, 4) for p in (1, 2, 4, 8)}
    order = [(RECOMPUTES.index(c.recompute), c.tensor * c.pipeline * c.context, c.pipeline) for c in plan.fitting]
    assert order == sorted(order)
    assert len(set(sizes(plan))) == len(plan.fitting) > 3
    (refused,) = plan.refused
    assert refused.startswith("TP 8: 28 attention heads")
    for c in plan.fitting:
        assert c.engine is not None
        assert len(c.stages) == min(c.pipeline, 3)
        assert (
            c.trainer_bytes
            == c.fullest.state.total + c.fullest.activations.layers + c.fullest.activations.head + TRAINER_RESERVE
        )
        assert c.trainer_bytes + SLEEPING_ENGINE <= 80 * GIB
        assert c.fullest.state.total + TRAINER_RESERVE + c.engine.utilization * 80 * GIB <= 80 * GIB


def test_layers_that_do_not_divide_are_shared_out_nearly_evenly() -> None:
    """The ends get less: they hold the vision tower and the head."""
    assert near_even(28, 8) == (3, 4, 4, 4, 4, 3, 3, 3)
    assert near_even(36, 8) == (4, 5, 5, 5, 5, 4, 4, 4)
    assert near_even(7, 4) == (1, 2, 2, 2)
    assert near_even(5, 2) == (2, 3)
    eight = [c for c in plan_of("qwen2.5-vl-7b").fitting if c.pipeline == 8]
    assert [c.layers for c in eight] == [(3, 4, 4, 4, 4, 3, 3, 3)]
    nine = next(c for c in plan_of("qwen2.5-vl-7b", replace(NODE, gpus=9, gpus_per_node=9)).fitting if c.pipeline == 9)
    assert nine.layers == (3, 4, *[3] * 7)
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    assert nine.stages[1].state.weights == pytest.approx(2 * 4 * layer, rel=0.001), "the second stage"
    few = plan_of("qwen2.5-vl-7b", replace(NODE, gpus=32))
    assert any("28 layers are too few for 32" in reason for reason in few.refused)


def test_a_replica_within_a_node_comes_first() -> None:
    fitting = plan_of("qwen2.5-vl-32b", replace(NODE, gpus=32), replace(WORKLOAD, rows_per_micro_batch=4)).fitting
    across = [c.tensor * c.pipeline * c.context > 8 for c in fitting]
    assert across == sorted(across) and any(across) and not all(across)
    assert fitting[0].recompute == "full" and "none" in {c.recompute for c in fitting}


def test_the_fullest_stage_counts() -> None:
    """With tied weights of 151,936 x 2,048 on both ends and four micro-batches in flight, the first is fullest."""
    c = next(c for c in plan_of("qwen3-vl-2b").fitting if (c.tensor, c.pipeline) == (1, 4))
    assert c.fullest.activations.head == 0
    layer = 2048 * 2048 * 2 + 2 * 2048 * 1024 + 3 * 2048 * 6144
    tower = 24 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * (4096**2 + 4096 * 2048) + 2304 * 1024 + 1536 * 1024
    assert c.fullest.state.weights == pytest.approx(2 * (7 * layer + 151_936 * 2048 + tower), rel=0.005)


def test_an_engine_holds_what_it_is_said_to_hold() -> None:
    c = plan_of("qwen2.5-vl-7b", rollout_tensor=2).fitting[0]
    assert c.engine is not None and c.engine.tensor == 2
    per_sequence = 2 * 28 * (4 // 2) * 128 * 2 * (4096 + 2048)
    room = c.engine.utilization * 80 * GIB - PUBLISHED["qwen2.5-vl-7b"].parameters - ENGINE_RESERVE
    assert c.engine.sequences == int(room / per_sequence)
    more = plan_of("qwen2.5-vl-7b", rollout_tensor=2, sequences=c.engine.sequences + 1)
    assert (c.tensor, c.pipeline, c.context, c.data) not in [
        s for s, kept in zip(sizes(more), more.fitting, strict=True) if kept.recompute == c.recompute
    ]


def test_offload_makes_room_for_engines_and_none_for_the_trainer() -> None:
    """On one GPU of 141 GiB a 7B is 139 GiB with its gradients and optimizer, 8.29 B values at 2 + 4 + 12 bytes; on two
    of them, with TP 2, the engine gets what each part leaves."""
    cluster = Cluster(gpus=2, gpu_bytes=141 * GIB, gpus_per_node=2)
    parts: tuple[frozenset[MemoryPart], ...] = (
        frozenset(),
        frozenset({"optimizer"}),
        frozenset({"optimizer", "grads", "params"}),
    )
    plans = [plan_of("qwen2.5-vl-7b", cluster, rollout_tensor=2, offload=offload) for offload in parts]
    ours = [next(c for c in plan.fitting if (c.tensor, c.pipeline) == (2, 1)) for plan in plans]
    values = PUBLISHED["qwen2.5-vl-7b"].parameters / 2 / GIB
    for c, bytes_per_value in zip(ours, (2 + 4 + 12, 2 + 4, 0), strict=True):
        assert c.trainer_bytes == ours[0].trainer_bytes and c.recompute == ours[0].recompute
        assert c.engine is not None
        left = min(0.9, (141 - 3 - bytes_per_value * values) / 141)
        assert c.engine.utilization == pytest.approx(left, abs=0.015)
    assert not plan_of("qwen2.5-vl-7b", replace(cluster, gpus=1), offload=parts[2]).fitting, "the trainer alone"


def test_weights_on_their_way_have_to_fit_as_well() -> None:
    """A GPU that holds the trainer's update and, in its turn, the engine, but not both models with the buffers between
    them."""
    c = plan_of("qwen2.5-vl-7b", rollout_tensor=1, sequences=1, offload=frozenset({"params", "grads", "optimizer"}))
    engine = 2 * PUBLISHED["qwen2.5-vl-7b"].parameters + ENGINE_RESERVE
    buffers = 2 * 152_064 * 3584 * 2
    for layout in c.fitting:
        assert layout.fullest.state.weights + TRAINER_RESERVE + engine + buffers <= 80 * GIB
    layout = next(found for found in c.fitting if (found.tensor, found.pipeline) == (2, 1))
    assert layout.sync_bytes == layout.fullest.state.weights + TRAINER_RESERVE
    resident = replace(layout, offload=frozenset({"params"}))
    assert resident.sync_bytes == layout.fullest.state.total + TRAINER_RESERVE
    assert resident.sampling_bytes == layout.fullest.state.gradients + layout.fullest.state.optimizer + TRAINER_RESERVE


def test_a_layout_is_left_out_if_only_the_weights_on_their_way_do_not_fit() -> None:
    """A 7B on two stages: the first leaves room for an engine of four GPUs and one sequence, not for the buffers too.

    Each of its values takes 9 bytes: 2, 4, and 12 over 4 ranks.
    """
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    tower = 32 * (4 * 1280**2 + 3 * 1280 * 3420) + 5120**2 + 5120 * 3584 + 1176 * 1280
    trainer = 9 * (14 * layer + 152_064 * 3584 + tower) + TRAINER_RESERVE
    engine = 2 * PUBLISHED["qwen2.5-vl-7b"].parameters // 4 + ENGINE_RESERVE
    sequence = 2 * 28 * (4 // 4) * 128 * 2 * (4096 + 2048)
    buffers = 2 * 152_064 * 3584 * 2
    assert trainer + engine + sequence < 47.7 * GIB and 49 * GIB < trainer + engine + buffers < 50 * GIB
    nodes = (replace(NODE, gpu_bytes=size * GIB) for size in (48, 51))
    fitting, more = (
        {(c.tensor, c.pipeline) for c in plan_of("qwen2.5-vl-7b", node, sequences=1).fitting} for node in nodes
    )
    assert (1, 2) in more
    assert (1, 2) not in fitting and (1, 4) in fitting


def test_what_would_need_more() -> None:
    plan = plan_of("qwen2.5-vl-72b")
    assert not plan.fitting and plan.closest is not None
    assert plan.closest.trainer_bytes > 80 * GIB
    assert (plan.closest.recompute, plan.closest.tensor * plan.closest.pipeline) == ("full", 8)
    assert plan_of("qwen2.5-vl-72b", replace(NODE, gpus=64)).fitting


def test_a_node_is_the_bound_of_tensor_parallelism_and_of_engines() -> None:
    plan = plan_of("qwen2.5-vl-32b", Cluster(gpus=64, gpu_bytes=80 * GIB, gpus_per_node=4))
    assert plan.fitting
    assert max(c.tensor for c in plan.fitting) == 4
    assert max(c.engine.tensor for c in plan.fitting if c.engine) <= 4


def test_context_and_sequence_parallelism() -> None:
    found = {(c.tensor, c.pipeline, c.context): c for c in plan_of("qwen3-vl-8b").fitting}
    assert all(c.sequence_parallel == (c.tensor > 1) for c in found.values())
    one, two = found[4, 1, 1], found[4, 1, 2]
    assert (one.data, two.data) == (2, 1)
    assert two.fullest.state == one.fullest.state, "sharded over data x context"
    if one.recompute == two.recompute:
        assert two.fullest.activations.layers < one.fullest.activations.layers


def test_a_frozen_tower_has_neither_gradients_nor_activations() -> None:
    parts: frozenset[ModelPart] = frozenset({"vision_tower", "projector"})
    whole, frozen = (plan_of("qwen3-vl-8b", frozen=parts).fitting for parts in (frozenset(), parts))
    a, b = (next(c for c in fitting if (c.tensor, c.pipeline, c.context) == (4, 1, 1)) for fitting in (whole, frozen))
    assert a.recompute == b.recompute
    tower = 27 * (4 * 1152**2 + 2 * 1152 * 4304) + 4 * (4608**2 + 4608 * 4096)
    assert a.fullest.state.gradients - b.fullest.state.gradients == pytest.approx(4 * tower / 4, rel=0.05)
    assert a.fullest.state.weights == pytest.approx(b.fullest.state.weights, rel=1e-5)
    assert b.fullest.activations.layers < a.fullest.activations.layers


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_update_or_scoring_whichever_needs_more(tensor: int) -> None:
    """Four rows of one image, on four stages of seven layers. Scoring reads both views of them, but keeps one layer: on
    the first stage the update needs more, with four micro-batches in flight, on the others scoring."""
    config, workload = published_config("qwen2.5-vl-7b"), replace(WORKLOAD, rows_per_micro_batch=4)
    sizes = language_sizes(config), vision_sizes(config)
    one_view, both_views = (MicroBatch(n * 6143, n * 2048, n * 1280, images * 5120) for n, images in ((4, 2), (8, 6)))
    shared: dict[str, Any] = {
        "split": LayerSplit(tensor, 1, sequence_parallel=tensor == 2),
        "kernels": Kernels(2, fused_rms_norm=True),
        "chunk": 1024,
    }
    update, score = (
        [
            update_activations(*sizes, one_view, stage=stage, stage_layers=(7,) * 4, recompute="full", **shared)
            for stage in (0, 1, 3)
        ],
        [score_activations(*sizes, both_views, stage=stage, stages=4, **shared) for stage in (0, 1, 3)],
    )
    assert [a.total > b.total for a, b in zip(update, score, strict=True)] == [True, False, False]
    fitting = plan_of("qwen2.5-vl-7b", workload=workload).fitting
    c = next(c for c in fitting if (c.tensor, c.pipeline, c.context) == (tensor, 4, 1))
    assert c.recompute == "full"
    assert [stage.activations for stage in c.stages] == [update[0], score[1], score[2]]


def test_a_perturbed_view_in_the_update_is_kept_for_its_backward_pass() -> None:
    """One stage of 28 layers, and then scoring needs less: both views of four rows of one image."""
    config = published_config("qwen2.5-vl-7b")
    workload = replace(WORKLOAD, rows_per_micro_batch=4, scores_both_views=False, updates_both_views=True)
    expected = update_activations(
        language_sizes(config),
        vision_sizes(config),
        MicroBatch(8 * 6143, 8 * 2048, 8 * 1280, 6 * 5120),
        stage=0,
        stage_layers=(28,),
        recompute="full",
        split=LayerSplit(2, 1, sequence_parallel=True),
        kernels=Kernels(2, fused_rms_norm=True),
        chunk=1024,
    )
    (c,) = (c for c in plan_of("qwen2.5-vl-7b", workload=workload).fitting if sizes_of(c) == (2, 1, 1, 4))
    assert c.recompute == "full"
    assert [stage.activations for stage in c.stages] == [expected]


def test_engines_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"^--rollout-tp 3: 8 GPUs do not divide into engines of 3"):
        plan_of("qwen2.5-vl-7b", rollout_tensor=3)
