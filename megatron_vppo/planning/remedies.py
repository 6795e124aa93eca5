"""The changes that would make a model fit, for a plan in which nothing does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_vppo.config.choices import MEMORY_PARTS
from megatron_vppo.planning.candidate import PlanRequest
from megatron_vppo.planning.layouts import make_plan

MORE_GPUS = (2, 4, 8, 16, 32)
"""The multiples of the GPUs that are tried. Nodes fill up before there are several."""


def enough_gpus(request: PlanRequest) -> int | None:
    """Returns the smallest number of GPUs in MORE_GPUS that the model fits on; None if none is enough."""
    gpus = request.cluster.gpus
    larger = (replace(request, cluster=replace(request.cluster, gpus=gpus * factor)) for factor in MORE_GPUS)
    return next((asked.cluster.gpus for asked in larger if _fits(asked)), None)


def remedies(request: PlanRequest) -> Iterator[str]:
    """Yields the changes of the command line with which the model fits the same GPUs."""
    workload = request.workload
    changes = {
        "without --rollout-tp": replace(request, rollout_tensor=None),
        "with --rows-per-micro-batch 1": replace(request, workload=replace(workload, rows_per_micro_batch=1)),
        f"with --offload {' '.join(MEMORY_PARTS)}": replace(request, offload=frozenset(MEMORY_PARTS)),
    }
    yield from (text for text, changed in changes.items() if changed != request and _fits(changed))


def _fits(request: PlanRequest) -> bool:
    """Returns True if it fits; False also if engines of `rollout_tensor` GPUs do not divide the larger nodes."""
    try:
        return bool(make_plan(request).fitting)
    except ValueError:
        return False
