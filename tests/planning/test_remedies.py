"""The changes that are named where nothing fits."""

from __future__ import annotations

from dataclasses import replace

from megatron_vppo.planning.candidate import GIB, Cluster, PlanRequest
from megatron_vppo.planning.layouts import make_plan
from megatron_vppo.planning.published import published_config
from megatron_vppo.planning.remedies import remedies
from tests.planning.test_candidate import WORKLOAD


def test_only_what_helps_is_named() -> None:
    """On one GPU of 48 GiB, 2.1 B values take 36 GiB while the trainer computes, and one row of 12,288 tokens fits next
    to them. Two do not, even if nothing of the trainer is there while the engine samples."""
    cluster, workload = Cluster(gpus=1, gpu_bytes=48 * GIB, gpus_per_node=1), replace(WORKLOAD, response_tokens=8192)
    request = PlanRequest(published_config("qwen3-vl-2b"), cluster, workload, engine_sequences=1)
    assert make_plan(request).fitting
    two = replace(request, workload=replace(workload, rows_per_micro_batch=2))
    assert not make_plan(two).fitting
    assert list(remedies(two)) == ["with --rows-per-micro-batch 1"]
