"""The changes of the settings with which a run would fit the memory of its GPUs, each tried out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vppo.config.choices import MEMORY_PARTS
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.launching.batches import divide_step, scoring_per, update_per
from megatron_vppo.launching.dry_run import DryRun, report_stages
from megatron_vppo.launching.longest_rows import IMAGES_PER_ROW, image_tokens
from megatron_vppo.launching.phases import EngineBytes, PhaseBytes, engine_bytes, fullest_phases
from megatron_vppo.launching.stage_memory import StageReport
from megatron_vppo.observability.phases import SAMPLE
from megatron_vppo.planning.candidate import Candidate, Cluster, PlanRequest, Workload
from megatron_vppo.planning.layouts import make_plan
from megatron_vppo.planning.remedies import enough_gpus
from megatron_vppo.setup.by_machine import by_machine

OFFLOAD_ALL = f"actor.offload=[{','.join(MEMORY_PARTS)}]"
_ONE_ROW: dict[str, int | None] = {
    "micro_batch_size_per_device_for_update": 1,
    "micro_batch_size_per_device_for_experience": 1,
}


@dataclass(frozen=True)
class _Change:
    text: str
    """The settings, as on the command line; '' for none."""
    config: RunConfig

    def then(self, section: str, text: str, **values: Any) -> _Change:
        """Returns this change and another one."""
        changed = getattr(self.config, section).model_copy(update=values)
        return _Change(f"{self.text} {text}".strip(), self.config.model_copy(update={section: changed}))


def remedies(found: DryRun) -> Iterator[str]:
    """Yields changes with which the run fits, each tried out, those that cost least first: memory that waits in host
    memory, and smaller engines; then more recomputation and smaller micro-batches, which run on meta again; and the
    layout that `vppo plan` would take.
    """
    for change in _offloads(_Change("", found.config)):
        if fit := _made_to_fit(found, change, found.stages):
            yield fit
            return
    for step in _smaller_steps(_Change("", found.config)):
        batches = divide_step(step.config, data=found.data_ranks)
        stages = report_stages(step.config, found.model.hf_config, batches, world_size=found.cluster.ranks)
        fits = [fit for change in _offloads(step) if (fit := _made_to_fit(found, change, stages))]
        if fits:
            yield fits[0]
            break
    yield from _another_layout(found)


def _offloads(change: _Change) -> Iterator[_Change]:
    """Yields the change as it is, and with the trainer's whole state away while engines sample."""
    yield change
    config = change.config
    if config.rollout.free_cache_engine is not False and set(config.actor.offload) != set(MEMORY_PARTS):
        yield change.then("actor", OFFLOAD_ALL, offload=MEMORY_PARTS)


def _smaller_steps(change: _Change) -> Iterator[_Change]:
    """Yields the change with recomputation, with micro-batches of one row, and with both."""
    one_row = dict(_ONE_ROW)
    if change.config.actor.max_tokens_per_micro_batch is not None:
        one_row["max_tokens_per_micro_batch"] = None
    text = " ".join(f"actor.{name}={'null' if value is None else value}" for name, value in one_row.items())
    if change.config.parallel.recompute != "full":
        recomputing = change.then("parallel", "parallel.recompute=full", recompute="full")
        yield from (recomputing, change.then("actor", text, **one_row))
        change = recomputing
    yield change.then("actor", text, **one_row)


def _made_to_fit(found: DryRun, change: _Change, stages: Sequence[StageReport]) -> str | None:
    """Returns the change, with a smaller share for the engines if it takes that; None if it does not fit either way."""
    if change.text and _fits(found, change, stages):
        return change.text
    gpu_bytes = found.cluster.gpu_bytes
    sampling = next(phase for phase in _phases(found, change, stages) if phase.phase == SAMPLE.name)
    share = math.floor(100 * (1 - (sampling.total - sampling.engine) / gpu_bytes)) / 100
    if not 0 < share < change.config.rollout.gpu_memory_utilization:
        return None
    smaller = change.then("rollout", f"rollout.gpu_memory_utilization={share:g}", gpu_memory_utilization=share)
    return smaller.text if _fits(found, smaller, stages) else None


def _phases(found: DryRun, change: _Change, stages: Sequence[StageReport]) -> tuple[PhaseBytes, ...]:
    return fullest_phases(change.config, stages, _engine(found, change))


def _fits(found: DryRun, change: _Change, stages: Sequence[StageReport]) -> bool:
    enough = all(phase.total <= found.cluster.gpu_bytes for phase in _phases(found, change, stages))
    return enough and _engine(found, change).sequences >= 1


def _engine(found: DryRun, change: _Change) -> EngineBytes:
    hf_config, gpu_bytes = found.model.hf_config, found.cluster.gpu_bytes
    return engine_bytes(change.config, hf_config, parameters=found.parameters, gpu_bytes=gpu_bytes)


def _another_layout(found: DryRun) -> Iterator[str]:
    """Yields the best layout of `vppo plan` for these GPUs and lengths, else the number of GPUs that would do."""
    request = _plan_request(found)
    plan = make_plan(request)
    if plan.fitting:
        yield _settings_of(plan.fitting[0])
    elif (gpus := enough_gpus(request)) is not None:
        yield f"{gpus} such GPUs instead of {found.cluster.ranks}, with the layout that `vppo plan` finds for them"


def _plan_request(found: DryRun) -> PlanRequest:
    config, hf_config, cluster = found.config, found.model.hf_config, found.cluster
    return PlanRequest(
        hf_config,
        Cluster(gpus=cluster.ranks, gpu_bytes=cluster.gpu_bytes, gpus_per_node=cluster.gpus_per_node),
        Workload(
            prompt_tokens=config.data.max_prompt_length,
            response_tokens=config.data.max_response_length,
            images_per_row=IMAGES_PER_ROW,
            image_tokens=image_tokens(config, hf_config),
            rows_per_micro_batch=config.actor.micro_batch_size_per_device_for_update,
            responses_per_prompt=config.rollout.n,
            head_chunk_tokens=by_machine(config, on_gpu=True).head_chunk_tokens,
            scores_both_views=scoring_per(config) is not None,
            updates_both_views=update_per(config) is not None,
        ),
        engine_sequences=1,
        frozen=frozenset(config.model.freeze),
        offload=frozenset(MEMORY_PARTS),
    )


def _settings_of(best: Candidate) -> str:
    assert best.engine is not None, "it fits"
    layers = f"[{','.join(map(str, best.layers))}]"
    values = {
        "parallel.tensor_model_parallel_size": best.tensor,
        "parallel.context_parallel_size": best.context,
        "parallel.pipeline_model_parallel_size": best.pipeline,
        **({"parallel.pipeline_layers": layers} if len(set(best.layers)) > 1 else {}),
        "parallel.sequence_parallel": str(best.sequence_parallel).lower(),
        "parallel.recompute": best.recompute,
        "rollout.tensor_parallel_size": best.engine.tensor,
        "rollout.gpu_memory_utilization": best.engine.utilization,
    }
    return " ".join([*(f"{name}={value}" for name, value in values.items()), OFFLOAD_ALL])
