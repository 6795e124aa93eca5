"""`vppo plan`: a model and a number of GPUs in, a table of the layouts that fit out."""

from __future__ import annotations

import argparse
import textwrap
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vppo.cli.output import say
from megatron_vppo.cli.plan_seconds import ORDER, growth_table, range_line, seconds_table, speed_header, speed_request
from megatron_vppo.config.choices import MEMORY_PARTS, ModelPart
from megatron_vppo.config.schema import DataConfig, RolloutConfig
from megatron_vppo.models.hf_config import pixels_per_token, position_refusal
from megatron_vppo.planning.candidate import GIB, TRAINER_RESERVE, Candidate, Cluster, PlanRequest, Workload
from megatron_vppo.planning.engine_share import ENGINE_RESERVE, MOST_UTILIZATION, SLEEPING_ENGINE
from megatron_vppo.planning.layouts import LayoutPlan, make_plan
from megatron_vppo.planning.published import PUBLISHED, configuration_of
from megatron_vppo.planning.remedies import MORE_GPUS, enough_gpus, remedies
from megatron_vppo.planning.simulate import simulate
from megatron_vppo.planning.timed_layouts import SpeedRequest, by_seconds, speed_model
from megatron_vppo.setup.by_machine import ON_GPU

MOST_ROWS = 12
"""The rows of the table that are printed at most."""
WIDTH = 100
"""The characters of a line."""


def run_plan(options: argparse.Namespace) -> int:
    """Prints the plan. Returns status 1 if nothing fits.

    Raises:
        ValueError: no such model, numbers that contradict each other, or nothing left to train.
    """
    if set(options.freeze) == set(typing.get_args(ModelPart)):
        raise ValueError(f"--freeze names {', '.join(options.freeze)}: nothing is left to train; drop one of them")
    request = _request(options)
    speed = speed_request(options, request)
    plan = make_plan(request)
    timed = _timed(plan, request, speed, simulated=options.simulate or ()) if speed and plan.fitting else None
    say("\n".join([*_header(options.model, plan, request), *(speed_header(speed, WIDTH) if speed else ())]))
    if not plan.fitting:
        say("\n".join(_what_is_missing(plan, request)))
        return 1
    fitting = timed.fitting if timed else plan.fitting
    say("\n".join(_table(fitting, request.cluster, order=ORDER if timed else LEGEND["Order"])))
    say("\n".join([*(timed.lines if timed else ()), *_settings(fitting[0], request)]))
    if options.freeze:
        say(f"model:\n  freeze: [{', '.join(options.freeze)}]")
    return 0


@dataclass(frozen=True)
class _Timed:
    """The part of a plan that `--gpu` adds."""

    fitting: tuple[Candidate, ...]
    """The layouts that fit, the fastest first."""
    lines: tuple[str, ...]
    """Their seconds, as text."""


def _timed(plan: LayoutPlan, request: PlanRequest, speed: SpeedRequest, *, simulated: tuple[int, ...]) -> _Timed:
    model = speed_model(request.hf_config, parameters=plan.parameters)
    timed = by_seconds(plan.fitting, model, request, speed)
    growth = simulate(timed[0], simulated, model, request, speed)
    lines = [
        *seconds_table(timed, most=MOST_ROWS, width=WIDTH),
        range_line(timed[0], model, request, speed, WIDTH),
        *(growth_table(growth, width=WIDTH) if growth else ()),
    ]
    return _Timed(tuple(each.layout for each in timed), tuple(lines))


def _request(options: argparse.Namespace) -> PlanRequest:
    """Returns the request that the command line stands for, with the settings' defaults for what it leaves out."""
    hf_config = configuration_of(options.model)
    if refusal := position_refusal(hf_config, prompt=options.prompt_tokens, response=options.response_tokens):
        raise ValueError(
            f"--prompt-tokens {options.prompt_tokens} + --response-tokens {options.response_tokens} = {refusal}; lower "
            "one of the two"
        )
    default_image_tokens = DataConfig.model_fields["max_pixels"].default // pixels_per_token(hf_config)
    return PlanRequest(
        hf_config,
        Cluster(gpus=options.gpus, gpu_bytes=options.gpu_memory, gpus_per_node=options.gpus_per_node),
        Workload(
            prompt_tokens=options.prompt_tokens,
            response_tokens=options.response_tokens,
            images_per_row=options.images_per_row,
            image_tokens=options.image_tokens or default_image_tokens,
            rows_per_micro_batch=options.rows_per_micro_batch,
            responses_per_prompt=RolloutConfig.model_fields["n"].default,
            head_chunk_tokens=ON_GPU.head_chunk_tokens,
            scores_both_views=not options.perception_loss,
            updates_both_views=options.perception_loss,
        ),
        rollout_tensor=options.rollout_tp,
        engine_sequences=options.answers,
        frozen=frozenset(options.freeze),
        offload=frozenset(options.offload),
    )


# --- What is planned for ----------------------------------------------------------------------------------------------


def _header(model: str, plan: LayoutPlan, request: PlanRequest) -> Iterator[str]:
    cluster, workload = request.cluster, request.workload
    hub = f" ({PUBLISHED[model].hub_id})" if model in PUBLISHED else ""
    rows, images = workload.rows_per_micro_batch, workload.images_per_row
    lines = [
        f"Model: {Path(model).name}{hub}, {plan.parameters / 1e9:.2f} B parameters in bfloat16",
        f"GPUs: {_count(cluster.gpus, 'GPU')} of {_size(cluster)} GiB, {cluster.node_gpus} per node",
        f"Micro-batch: {_count(rows, 'row')} of {workload.prompt_tokens} prompt and {workload.response_tokens} "
        f"response tokens, with {_count(images, 'image')} of {workload.image_tokens} tokens per row"
        + (", in both views in the update" if workload.updates_both_views else ""),
        *(f"Not possible: {reason.partition(';')[0]}" for reason in plan.refused),
    ]
    return (textwrap.fill(line, width=WIDTH, subsequent_indent="  ") for line in lines)


# --- The layouts that fit ---------------------------------------------------------------------------------------------

HEADERS = (
    "                           | trainer, on its fullest GPU                  | vLLM engine",
    "  TP  PP  CP  DP recompute | weights  grads optim. activ.   head    total | GPUs    GiB sequences",
)
LEGEND = {
    "Order": "replicas (TP x PP x CP GPUs) within a node come first, then less recomputation, then fewer GPUs per "
    "replica, then fewer pipeline stages.",
    "TP to DP": "tensor, pipeline, context and data parallelism. With TP > 1, sequence parallelism is on, too.",
    "recompute": "what the backward pass computes again instead of storing it.",
    "trainer": "its memory while it computes: weights, gradients, optimizer state (distributed over DP x CP), "
    f"activations, vocabulary head. The total includes a reserve of {TRAINER_RESERVE // GIB} GiB.",
    "engine": "GPUs of one engine, and its memory on each of them. While the trainer computes, engines sleep. While "
    f"they sample, an engine gets up to {MOST_UTILIZATION} of each GPU: what is left on the stage where the trainer "
    "keeps most, not counting offloaded state. That may be another stage than the one in the table.",
    "sequences": "how many sequences of full length, prompt and response, the KV cache of an engine holds at once.",
}
CAVEAT = "These are estimates: no GPU has confirmed the activations and the reserves (docs/plan.md)."


def _table(fitting: Sequence[Candidate], cluster: Cluster, *, order: str) -> Iterator[str]:
    yield "\nLayouts that fit, best first. Memory is in GiB."
    yield from HEADERS
    for c in fitting[:MOST_ROWS]:
        assert c.engine is not None
        state, activations = c.fullest.state, c.fullest.activations
        yield (
            f"{c.tensor:4}{c.pipeline:4}{c.context:4}{c.data:4} {c.recompute:9} |"
            f"{_gib(state.weights):>8}{_gib(state.gradients):>7}{_gib(state.optimizer):>7}"
            f"{_gib(activations.layers):>7}{_gib(activations.head):>7}{_gib(c.trainer_bytes):>9} |"
            f"{c.engine.tensor:5}{_gib(c.engine.utilization * cluster.gpu_bytes):>7}{c.engine.sequences:10}"
        )
    if len(fitting) > MOST_ROWS:
        yield f"  and {len(fitting) - MOST_ROWS} more"
    yield ""
    for term, meaning in {**LEGEND, "Order": order}.items():
        yield textwrap.fill(f"{term:10} {meaning}", width=WIDTH, subsequent_indent=" " * 11)
    yield CAVEAT


def _settings(best: Candidate, request: PlanRequest) -> Iterator[str]:
    """Returns the settings of a layout, as the YAML of a configuration file."""
    assert best.engine is not None
    workload = request.workload
    yield "\nSettings of the first layout:"
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
    yield f"  head_chunk_tokens: {workload.head_chunk_tokens}"
    if best.offload:
        yield f"  offload: [{', '.join(part for part in MEMORY_PARTS if part in best.offload)}]"
    yield "rollout:"
    yield f"  tensor_parallel_size: {best.engine.tensor}"
    yield f"  gpu_memory_utilization: {best.engine.utilization}"
    yield f"  max_num_seqs: {ON_GPU.max_num_seqs}"
    yield f"  enforce_eager: {str(ON_GPU.enforce_eager).lower()}"
    yield "data:"
    yield f"  max_prompt_length: {workload.prompt_tokens}"
    yield f"  max_response_length: {workload.response_tokens}"
    yield f"  max_pixels: {workload.image_tokens * pixels_per_token(request.hf_config)}"


# --- Nothing fits -----------------------------------------------------------------------------------------------------


def _what_is_missing(plan: LayoutPlan, request: PlanRequest) -> Iterator[str]:
    yield "\nNothing fits."
    if plan.closest is None:
        yield "The model's sizes allow none of the layouts."
    else:
        lines = _closest(plan.closest, request.cluster)
        yield from (textwrap.fill(line, width=WIDTH, subsequent_indent="  ") for line in lines)
    yield ""
    gpus = enough_gpus(request)
    if gpus is not None:
        yield f"What would fit: {gpus} such GPUs."
    yield from (f"What would fit: these GPUs {change}." for change in remedies(request))
    if gpus is None:
        yield f"{', '.join(map(str, MORE_GPUS[:-1]))} or {MORE_GPUS[-1]} times as many GPUs would not help."


def _closest(closest: Candidate, cluster: Cluster) -> Iterator[str]:
    """Returns the memory of the layout with the smallest trainer, in sentences."""
    state, activations = closest.fullest.state, closest.fullest.activations
    yield (
        f"The smallest trainer is TP {closest.tensor} x PP {closest.pipeline} x CP {closest.context} x DP "
        f"{closest.data} with recompute {closest.recompute}. It takes {_gib(closest.trainer_bytes)} of "
        f"{_size(cluster)} GiB: weights {_gib(state.weights)}, gradients {_gib(state.gradients)}, optimizer "
        f"{_gib(state.optimizer)}, activations {_gib(activations.total)}, reserve {TRAINER_RESERVE // GIB}. A sleeping "
        f"engine takes {SLEEPING_ENGINE // GIB} GiB more."
    )
    yield (
        f"Awake, an engine needs its weights plus {ENGINE_RESERVE // GIB} GiB. While it samples it also needs its KV "
        f"cache, next to {_gib(closest.sampling_bytes)} GiB of trainer state. While weights are sent it also needs two "
        f"transfer buffers, next to {_gib(closest.sync_bytes)} GiB."
    )


# --- Numbers ----------------------------------------------------------------------------------------------------------


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _size(cluster: Cluster) -> str:
    """Returns the memory of a GPU in GiB, as the user probably gave it: 80, 79.6."""
    return f"{cluster.gpu_bytes / GIB:.2f}".rstrip("0").rstrip(".")


def _gib(number: float) -> str:
    return f"{number / GIB:.1f}"
