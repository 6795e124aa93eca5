"""The order by seconds, and the numbers that a plan hands to the model of speed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vppo.planning.candidate import GIB, Candidate, Cluster, PlanRequest
from megatron_vppo.planning.gpus import GPUS
from megatron_vppo.planning.layouts import make_plan
from megatron_vppo.planning.published import PUBLISHED, published_config
from megatron_vppo.planning.step_flops import StepWork
from megatron_vppo.planning.step_model import EngineLayout, Machine, TrainerLayout
from megatron_vppo.planning.step_seconds import step_seconds
from megatron_vppo.planning.timed_layouts import SpeedRequest, by_seconds, seconds_of, speed_model, with_gpus
from tests.planning.test_candidate import WORKLOAD

MODEL = "qwen2.5-vl-32b"
SPEED = SpeedRequest(
    StepWork(
        prompts=384, responses=8, drawn=2.0, minibatches=3, prompt_tokens=1400, response_tokens=450,
        longest_response=2048, images=1, patches=5120, rows_per_update=4, rows_per_scoring=4,
    ),
    Machine(GPUS["h800"]),
    max_sequences=256,
    eager=True,
)  # fmt: skip


def request() -> PlanRequest:
    cluster = Cluster(gpus=32, gpu_bytes=80 * GIB, gpus_per_node=8)
    workload = replace(WORKLOAD, rows_per_micro_batch=4)
    return PlanRequest(published_config(MODEL), cluster, workload, engine_sequences=16)


def fitting(asked: PlanRequest) -> tuple[Candidate, ...]:
    return make_plan(asked).fitting


def sizes(layout: Candidate) -> tuple[int, int, int, int]:
    return layout.tensor, layout.pipeline, layout.context, layout.data


def test_what_a_model_is_made_of() -> None:
    """Seven tensors and two or three biases or norms a layer; the 7B has no tied output layer."""
    model = speed_model(published_config("qwen2.5-vl-7b"), parameters=PUBLISHED["qwen2.5-vl-7b"].parameters)
    assert (model.layers, model.hidden, model.vocabulary) == (28, 3584, 152_064)
    assert model.kv_values == 2 * 4 * 128 and model.kv_bytes == 28 * 2048
    assert model.vision_layers == 32
    assert model.tensors == 729, "of the released checkpoint's index"
    # Two bytes for each parameter but the embedding, of which a token reads one row, and the tower.
    towers = 676_550_144
    assert model.decoded_bytes == pytest.approx(2 * (model.parameters - towers - 3584 * 152_064), rel=0.01)


def test_the_fastest_first() -> None:
    """Links of 160 GB/s make four tensor ranks with all layers recomputed slow, and two with four stages fast."""
    asked = request()
    plain = fitting(asked)
    timed = by_seconds(plain, speed_model(asked.hf_config, parameters=PUBLISHED[MODEL].parameters), asked, SPEED)
    seconds = [each.seconds.total for each in timed]
    assert seconds == sorted(seconds) and len(timed) == len(plain)
    order = [sizes(each.layout) for each in timed]
    assert sizes(plain[0]) == (4, 1, 1, 8) and order[0] == (2, 4, 1, 4)
    assert order.index((2, 4, 1, 4)) < order.index((4, 1, 1, 8))


def test_a_layout_is_timed_as_it_is() -> None:
    """The KV cache has room for 40 sequences of full length; optimizer state goes to the host and back."""
    asked = request()
    model = speed_model(asked.hf_config, parameters=PUBLISHED[MODEL].parameters)
    layout = replace(fitting(asked)[0], offload=frozenset({"grads", "optimizer"}))
    engine = EngineLayout(tensor=8, kv_tokens=40 * 6144, max_sequences=256, eager=True)
    trainer = TrainerLayout(tensor=4, pipeline=1, context=1, data=8, recompute="full", node_gpus=8)
    offloaded = layout.fullest.state.optimizer
    expected = step_seconds(model, SPEED.work, trainer, engine, SPEED.machine, offloaded_bytes=offloaded)
    assert seconds_of(layout, model, asked, SPEED) == expected
    assert expected.sync > seconds_of(replace(layout, offload=frozenset()), model, asked, SPEED).sync


def test_a_link_that_was_not_measured() -> None:
    asked = request()
    model = speed_model(asked.hf_config, parameters=PUBLISHED[MODEL].parameters)
    alone = replace(SPEED, machine=Machine(replace(GPUS["h800"], network=None)))
    with pytest.raises(ValueError, match=r"^--gpu: network_gb_per_s is null, but there are 4 hosts; put its speed"):
        by_seconds((), model, asked, alone)


def test_more_and_fewer_replicas() -> None:
    """Sixteen ranks with TP 4 hold the optimizer in quarters, which do not fit; 64 hold it in sixteenths."""
    asked = request()
    layout = fitting(asked)[0]
    larger = with_gpus(layout, 64, asked)
    assert larger is not None and sizes(larger) == (4, 1, 1, 16)
    assert larger.fullest.state.optimizer == pytest.approx(layout.fullest.state.optimizer / 2, rel=0.01)
    assert with_gpus(layout, 8, asked) is None
    with pytest.raises(ValueError, match="--simulate 30: the first layout has replicas of 4 GPUs; give multiples"):
        with_gpus(layout, 30, asked)
