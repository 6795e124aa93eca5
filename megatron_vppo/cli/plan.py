"""`vppo plan`: a model and a number of GPUs in, a table of the layouts that fit out."""

from __future__ import annotations

import argparse
import textwrap
import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_vppo.config.choices import MEMORY_PARTS, ModelPart
from megatron_vppo.config.schema import ActorConfig, DataConfig, RolloutConfig
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.models.read_config import read_hf_config
from megatron_vppo.planning.candidate import GIB, TRAINER_RESERVE, Candidate, Cluster, Workload
from megatron_vppo.planning.engine_share import ENGINE_RESERVE, MOST_UTILIZATION, SLEEPING_ENGINE
from megatron_vppo.planning.layouts import Plan, make_plan
from megatron_vppo.planning.published import PUBLISHED, published_config

MORE_GPUS = (2, 4, 8, 16, 32)
"""Times those that do not fit. Nodes fill up before there are several."""
MOST_ROWS = 12
"""Of the table."""
WIDTH = 100
"""Characters of a line."""


def run_plan(options: argparse.Namespace) -> int:
    """Prints the plan. Status 1 where nothing fits.

    Raises:
        ValueError: no such model, numbers that contradict each other, or nothing left to train.
    """
    hf_config = load_config(options.model)
    _check_freeze(options.freeze)
    cluster = Cluster(gpus=options.gpus, gpu_bytes=options.gpu_memory, gpus_per_node=options.gpus_per_node)
    pixels_per_token = _pixels_per_token(hf_config)
    workload = Workload(
        prompt_tokens=options.prompt_tokens,
        response_tokens=options.response_tokens,
        images_per_row=options.images_per_row,
        image_tokens=options.image_tokens or DataConfig.model_fields["max_pixels"].default // pixels_per_token,
        rows_per_micro_batch=options.rows_per_micro_batch,
        responses_per_prompt=RolloutConfig.model_fields["n"].default,
        head_chunk_tokens=ActorConfig.model_fields["head_chunk_tokens"].default,
    )
    plan = partial(
        make_plan,
        hf_config,
        cluster=cluster,
        workload=workload,
        rollout_tensor=options.rollout_tp,
        answers=options.answers,
        frozen=frozenset(options.freeze),
        offload=frozenset(options.offload),
    )
    result = plan()
    print(*_header(options.model, result, cluster, workload), sep="\n")
    if result.fitting:
        print(*_table(result, cluster), *_settings(result.fitting[0], workload, pixels_per_token), sep="\n")
        if options.freeze:
            print(f"model:\n  freeze: [{', '.join(options.freeze)}]")
        return 0
    print(f"\nNothing fits.\n{_nearest(result, cluster)}")
    print(*_what_would_fit(plan, cluster, workload, rollout_tensor=options.rollout_tp), sep="\n")
    return 1


def _check_freeze(parts: list[str]) -> None:
    """What a run of these settings would refuse."""
    if set(parts) == set(typing.get_args(ModelPart)):
        raise ValueError(f"--freeze names {', '.join(parts)}: nothing is left to train; drop one of them")


def _what_would_fit(
    plan: Callable[..., Plan], cluster: Cluster, workload: Workload, *, rollout_tensor: int | None
) -> Iterator[str]:
    larger = (replace(cluster, gpus=cluster.gpus * factor) for factor in MORE_GPUS)
    enough = next((c for c in larger if _fits(plan, c)), None)
    factors = f"{', '.join(map(str, MORE_GPUS[:-1]))} or {MORE_GPUS[-1]}"
    yield f"What would fit: {enough.gpus} such GPUs." if enough else f"{factors} times as many GPUs would not help."
    if rollout_tensor is not None and plan(rollout_tensor=None).fitting:
        yield "What would fit: engines of another size, without --rollout-tp, on these."
    if workload.rows_per_micro_batch > 1 and plan(workload=replace(workload, rows_per_micro_batch=1)).fitting:
        yield "What would fit: --rows-per-micro-batch 1 on these."
    if plan(offload=frozenset(MEMORY_PARTS)).fitting:
        yield f"What would fit: --offload {' '.join(MEMORY_PARTS)} on these."


def _fits(plan: Callable[..., Plan], cluster: Cluster) -> bool:
    """False also where engines of --rollout-tp, which divide the GPUs that there are, do not divide larger nodes."""
    try:
        return bool(plan(cluster=cluster).fitting)
    except ValueError:
        return False


def load_config(model: str) -> HfConfig:
    """The configuration of a released model or of a Hugging Face folder; nothing is downloaded."""
    if model in PUBLISHED:
        return published_config(model)
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"--model {model}: no folder with a config.json, and not one of {', '.join(PUBLISHED)}")
    return read_hf_config(Path(model))


def _pixels_per_token(hf_config: HfConfig) -> int:
    vision = hf_config.vision_config
    return (vision.patch_size * vision.spatial_merge_size) ** 2


def _header(model: str, plan: Plan, cluster: Cluster, workload: Workload) -> Iterator[str]:
    gpus = f"{cluster.gpus} GPU{'s' if cluster.gpus > 1 else ''} of {_size(cluster)} GiB"
    lines = [
        f"{Path(model).name}: {plan.parameters / 1e9:.2f} B parameters in bfloat16, distributed optimizer; {gpus}",
        f"rows per micro-batch: {workload.rows_per_micro_batch}; tokens per row: {workload.prompt_tokens} + "
        f"{workload.response_tokens}; pictures per row: {workload.images_per_row} of {workload.image_tokens} tokens",
        *(f"not possible: {reason.partition(';')[0]}" for reason in plan.refused),
    ]
    return (textwrap.fill(line, width=WIDTH, subsequent_indent="  ") for line in lines)


FOOTNOTE = (
    "Best: a replica (TP x PP x CP) within a node, then without recompute, then the smallest replica. Sequence "
    "parallelism is on where TP > 1. Engines sleep while the trainer computes; awake they get, up to "
    f"{MOST_UTILIZATION} of a GPU, what the trainer's state (but for --offload) and reserve leave where most is held, "
    "perhaps in another stage than the one shown, and hold so many answers of full length at once. Estimates: no GPU "
    "has confirmed activations and reserves (docs/plan.md)."
)
COLUMNS = "  TP  PP  CP  DP recompute  weights  grads  optim. activ.  head trainer | engine: TP   GiB answers"


def _table(plan: Plan, cluster: Cluster) -> Iterator[str]:
    yield f"\nGiB on the fullest GPU; trainer: their sum and {TRAINER_RESERVE // GIB} GiB of reserve. Best first:"
    yield COLUMNS
    for c in plan.fitting[:MOST_ROWS]:
        assert c.engine is not None
        yield (
            f"{c.tensor:4}{c.pipeline:4}{c.context:4}{c.data:4} {c.recompute:9}"
            f"{_gib(c.fullest.state.weights):>9}{_gib(c.fullest.state.gradients):>7}{_gib(c.fullest.state.optimizer):>8}"
            f"{_gib(c.fullest.activations.layers):>7}{_gib(c.fullest.activations.head):>6}{_gib(c.trainer_bytes):>8} |"
            f"{c.engine.tensor:11}{_gib(c.engine.utilization * cluster.gpu_bytes):>6}{c.engine.answers:8}"
        )
    if len(plan.fitting) > MOST_ROWS:
        yield f"  and {len(plan.fitting) - MOST_ROWS} more"
    yield ""
    yield textwrap.fill(FOOTNOTE, width=WIDTH)
    yield "\nSettings of the first line:"


def _settings(best: Candidate, workload: Workload, pixels_per_token: int) -> Iterator[str]:
    assert best.engine is not None
    yield "parallel:"
    yield f"  tensor_model_parallel_size: {best.tensor}"
    yield f"  pipeline_model_parallel_size: {best.pipeline}"
    if len(set(best.layers)) > 1:
        yield f"  pipeline_layers: {list(best.layers)}"
    if best.context > 1:
        yield f"  context_parallel_size: {best.context}"
    yield f"  data_parallel_size: {best.data}"
    if best.sequence_parallel:
        yield "  sequence_parallel: true"
    yield f"  recompute: {best.recompute}"
    yield "actor:"
    yield f"  micro_batch_size_per_device_for_update: {workload.rows_per_micro_batch}"
    yield f"  micro_batch_size_per_device_for_experience: {workload.rows_per_micro_batch}"
    if best.offload:
        yield f"  offload: [{', '.join(part for part in MEMORY_PARTS if part in best.offload)}]"
    yield "rollout:"
    yield f"  tensor_parallel_size: {best.engine.tensor}"
    yield f"  gpu_memory_utilization: {best.engine.utilization}"
    yield "data:"
    yield f"  max_prompt_length: {workload.prompt_tokens}"
    yield f"  max_response_length: {workload.response_tokens}"
    yield f"  max_pixels: {workload.image_tokens * pixels_per_token}"


def _nearest(plan: Plan, cluster: Cluster) -> str:
    closest = plan.closest
    if closest is None:
        return "The model's sizes allow none of the layouts."
    state, activations = closest.fullest.state, closest.fullest.activations
    return textwrap.fill(
        f"The smallest trainer, TP {closest.tensor} x PP {closest.pipeline} x CP {closest.context} x DP {closest.data} "
        f"with recompute {closest.recompute}, takes {_gib(closest.trainer_bytes)} of {_size(cluster)} GiB: "
        f"weights {_gib(state.weights)}, gradients {_gib(state.gradients)}, optimizer {_gib(state.optimizer)}, "
        f"activations {_gib(activations.total)}, reserve {TRAINER_RESERVE // GIB}; a sleeping engine "
        f"{SLEEPING_ENGINE // GIB} more. An engine that is awake needs its weights and {ENGINE_RESERVE // GIB} GiB "
        f"beside what the trainer keeps: room for the answers too while it samples, beside "
        f"{_gib(closest.sampling_bytes)}, and two buffers while weights are sent, beside {_gib(closest.sync_bytes)}.",
        width=WIDTH,
    )


def _size(cluster: Cluster) -> str:
    """Of a GPU in GiB, as it was probably given."""
    return f"{cluster.gpu_bytes / GIB:.2f}".rstrip("0").rstrip(".")


def _gib(number: float) -> str:
    return f"{number / GIB:.1f}"
