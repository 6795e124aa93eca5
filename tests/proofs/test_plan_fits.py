"""Every row of a plan fits every GPU of its layout in every phase: each pipeline stage is counted here, one by one."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache

import pytest

from megatron_vppo.config.choices import MemoryPart
from megatron_vppo.models.families import family_of, weight_map
from megatron_vppo.planning.activations import Kernels, LayerSplit, update_activations
from megatron_vppo.planning.candidate import Candidate, Cluster, PlanRequest
from megatron_vppo.planning.layouts import make_plan
from megatron_vppo.planning.published import PUBLISHED, published_config
from megatron_vppo.planning.sizes import language_sizes, stage_values, vision_sizes
from megatron_vppo.planning.state import StageValues, StateBytes, state_bytes
from megatron_vppo.weights.entries import Entry
from tests.models.tiny import tiny_config
from tests.planning.test_candidate import WORKLOAD as ONE_ROW

GIB = 2**30
RESERVE, ENGINE_RESERVE, SLEEPING_ENGINE = 3 * GIB, 3 * GIB, GIB
WORKLOAD = replace(ONE_ROW, image_tokens=980, rows_per_micro_batch=4)
ROW = (1, 2, 4)


config_of = cache(published_config)


@cache
def entries_of(name: str) -> tuple[Entry, ...]:
    config = config_of(name)
    return tuple(weight_map(config, family=family_of(config)))


@cache
def values_of(name: str, layers: tuple[int, ...], stage: int, tensor: int) -> StageValues:
    return stage_values(entries_of(name), stage_layers=layers, stage=stage, tensor=tensor)


@cache
def state_of(name: str, layers: tuple[int, ...], stage: int, tensor: int, replicas: int) -> StateBytes:
    values = values_of(name, layers, stage, tensor)
    return state_bytes(values, dtype_bytes=2, replicas=replicas, distributed=True)


def rows(
    name: str, gpus: int, memory: int, *, sequences: int = 16, offload: frozenset[MemoryPart] = frozenset()
) -> tuple[Candidate, ...]:
    cluster = Cluster(gpus=gpus, gpu_bytes=memory * GIB, gpus_per_node=min(gpus, 8))
    request = PlanRequest(config_of(name), cluster, WORKLOAD, engine_sequences=sequences, offload=offload)
    return make_plan(request).fitting


def activations_of(name: str, c: Candidate, stage: int) -> int:
    config = config_of(name)
    return update_activations(
        language_sizes(config),
        vision_sizes(config),
        WORKLOAD.micro_batch(merge=2, context=c.context, both_views=False),
        stage=stage,
        stage_layers=c.layers,
        split=LayerSplit(tensor=c.tensor, context=c.context, sequence_parallel=c.tensor > 1),
        kernels=Kernels(dtype_bytes=2, fused_rms_norm=True),
        recompute=c.recompute,
        chunk=WORKLOAD.head_chunk_tokens,
    ).total


CLUSTERS = ((4, 80), (8, 24), (8, 48), (8, 80), (16, 40), (32, 48), (64, 80))
OFFLOADS: tuple[frozenset[MemoryPart], ...] = (
    frozenset(),
    frozenset({"optimizer"}),
    frozenset({"params", "grads", "optimizer"}),
)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_stage_fits_in_every_phase(name: str) -> None:
    text = config_of(name).text_config
    buffers = 2 * 2 * text.vocab_size * text.hidden_size
    for (gpus, memory), offload in itertools.product(CLUSTERS, OFFLOADS):
        gpu = memory * GIB
        fitting = rows(name, gpus, memory, offload=offload)
        # 2 + 4 + 12 bytes of state a value: where they take at most half of all memory, the rest holds all else.
        assert fitting or 18 * PUBLISHED[name].parameters / gpus > gpu / 2, f"nothing fits {gpus} GPUs of {memory} GiB"
        for c in fitting:
            assert c.engine is not None
            weights = 2 * PUBLISHED[name].parameters / c.engine.tensor
            for stage in range(c.pipeline):
                state = state_of(name, c.layers, stage, c.tensor, c.data * c.context)
                parts = {"params": state.weights, "grads": state.gradients, "optimizer": state.optimizer}
                kept = sum(size for part, size in parts.items() if part not in offload)
                sent = state.weights if "params" in offload else 0
                where = f"{gpus} GPUs of {memory} GiB: {c.tensor} x {c.pipeline} x {c.context}, stage {stage}"
                assert state.total + activations_of(name, c, stage) + RESERVE + SLEEPING_ENGINE <= gpu, where
                assert kept + RESERVE + c.engine.utilization * gpu <= gpu, where
                assert kept + sent + RESERVE + weights + ENGINE_RESERVE + buffers <= gpu, where


def test_the_stage_that_computes_with_most_need_not_hold_most() -> None:
    """Two stages of an 8B, each of 18 layers and 151,936 x 4,096 values of embedding or head. The last computes with
    most, for the logits; the first holds the tower as well, 9 bytes a value (2, 4, and 12 over 4 ranks).
    """
    found = {
        c.recompute: c for c in rows("qwen3-vl-8b", 8, 50, sequences=1) if (c.tensor, c.pipeline, c.context) == ROW
    }
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288
    last = 18 * layer + 151_936 * 4096
    first = last + 27 * (4 * 1152**2 + 2 * 1152 * 4304) + 4 * (4608**2 + 4608 * 4096) + (2304 + 1536) * 1152
    assert 9 * first > 39 * GIB and 9 * last < 35 * GIB
    c = found["full"]
    assert c.engine is not None
    assert c.engine.utilization == math.floor(100 * (50 - 3 - 9 * first / GIB) / 50) / 100 == 0.15
    assert c.fullest.state.weights == pytest.approx(2 * last, rel=0.001), "what the table shows"
    assert c.sampling_bytes == c.sync_bytes == pytest.approx(9 * first + RESERVE, rel=0.001)
    away = replace(c, offload=frozenset({"params", "optimizer"}))
    assert away.trainer_bytes == c.trainer_bytes
    assert away.sampling_bytes == pytest.approx(4 * first + RESERVE, rel=0.001)
    assert away.sync_bytes == pytest.approx(6 * first + RESERVE, rel=0.001)


def test_a_stage_in_the_middle_may_hold_most() -> None:
    """Five layers on four stages, the second with two of them; a layer outweighs the tower and 299 embeddings."""
    config = tiny_config(tied=False, vocab=299, num_hidden_layers=5, intermediate_size=4096)
    cluster = Cluster(gpus=4, gpu_bytes=40 * GIB, gpus_per_node=4)
    fitting = make_plan(PlanRequest(config, cluster, WORKLOAD, engine_sequences=1)).fitting
    c = next(c for c in fitting if c.pipeline == 4)
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 4096
    assert c.layers == (1, 2, 1, 1)
    assert c.sampling_bytes - RESERVE == c.sync_bytes - RESERVE == pytest.approx(18 * 2 * layer, rel=0.01)
