"""The layouts that fit, ordered by the modelled seconds of a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_vppo.models.families import family_of, weight_map
from megatron_vppo.models.flops import model_cost
from megatron_vppo.models.hf_config import HfConfig, head_dim
from megatron_vppo.planning.candidate import Candidate, PlanRequest
from megatron_vppo.planning.gpus import link_refusal
from megatron_vppo.planning.layouts import make_plan
from megatron_vppo.planning.step_flops import StepWork
from megatron_vppo.planning.step_model import EngineLayout, Machine, SpeedModel, TrainerLayout
from megatron_vppo.planning.step_seconds import StepSeconds, step_seconds


@dataclass(frozen=True)
class SpeedRequest:
    """The things besides the layout that the seconds of a step depend on."""

    work: StepWork
    machine: Machine
    max_sequences: int
    """Responses in flight in an engine: rollout.max_num_seqs."""
    eager: bool
    """True without CUDA graphs in the engines: rollout.enforce_eager."""


@dataclass(frozen=True)
class TimedLayout:
    layout: Candidate
    seconds: StepSeconds


def speed_model(hf_config: HfConfig, *, parameters: int) -> SpeedModel:
    """Reads the numbers that speed depends on from a configuration. `parameters`: of the whole model."""
    text, vision = hf_config.text_config, hf_config.vision_config
    entries = weight_map(hf_config, family=family_of(hf_config))
    return SpeedModel(
        cost=model_cost(hf_config),
        parameters=parameters,
        tensors=sum(len(entry.hf_names) for entry in entries if not entry.is_copy),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        kv_values=2 * text.num_key_value_heads * head_dim(text),
        vision_layers=vision.depth,
    )


def by_seconds(
    fitting: Iterable[Candidate], model: SpeedModel, request: PlanRequest, speed: SpeedRequest
) -> tuple[TimedLayout, ...]:
    """Times layouts that fit, and returns the fastest first; of equally fast ones, that which came first.

    Raises:
        ValueError: the GPUs talk over a link whose speed was not measured.
    """
    cluster = request.cluster
    hosts = -(-cluster.gpus // cluster.node_gpus)
    if refusal := link_refusal(speed.machine.gpu, gpus=cluster.gpus, hosts=hosts):
        raise ValueError(f"--gpu: {refusal}; put its speed into the file of ceilings")
    timed = (TimedLayout(layout, seconds_of(layout, model, request, speed)) for layout in fitting)
    return tuple(sorted(timed, key=lambda each: each.seconds.total))


def seconds_of(layout: Candidate, model: SpeedModel, request: PlanRequest, speed: SpeedRequest) -> StepSeconds:
    """Models the step of one layout that fits."""
    assert layout.engine is not None, "a layout that fits has an engine"
    state = layout.fullest.state
    copied = {"params": state.weights, "optimizer": state.optimizer}  # offloaded gradients are freed, not copied
    return step_seconds(
        model,
        speed.work,
        TrainerLayout(
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            context=layout.context,
            data=layout.data,
            recompute=layout.recompute,
            node_gpus=request.cluster.node_gpus,
        ),
        EngineLayout(
            tensor=layout.engine.tensor,
            kv_tokens=layout.engine.sequences * request.workload.sequence_tokens,
            max_sequences=speed.max_sequences,
            eager=speed.eager,
        ),
        speed.machine,
        offloaded_bytes=sum(size for part, size in copied.items() if part in layout.offload),
    )


def with_gpus(layout: Candidate, gpus: int, request: PlanRequest) -> Candidate | None:
    """Returns the layout with more or fewer replicas, so that it has `gpus` GPUs.

    Returns None if they do not fit the GPUs' memory: with fewer replicas, each rank holds more optimizer state.

    Raises:
        ValueError: no whole number of replicas or engines has that many GPUs.
    """
    if gpus % layout.replica_gpus:
        raise ValueError(
            f"--simulate {gpus}: the first layout has replicas of {layout.replica_gpus} GPUs; give multiples of that"
        )
    larger = replace(request, cluster=replace(request.cluster, gpus=gpus))
    asked = (layout.tensor, layout.pipeline, layout.context)
    fitting = make_plan(larger).fitting
    return next((each for each in fitting if (each.tensor, each.pipeline, each.context) == asked), None)
