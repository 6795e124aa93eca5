"""The seconds of scoring and update on a trainer rank. Modelled, not measured.

Both phases add up: products of the language model and of the vision tower at a share of the fastest product, exchanges
between tensor, context and pipeline ranks, which nothing hides, and what of the host's packing takes longer than the
device's work. All stages of a pipeline count as equal. Of the data-parallel collectives only the sum of gradients runs
behind something.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_vppo.planning.step_flops import (
    BACKWARD,
    HEAD_AGAIN,
    GroupFlops,
    StepWork,
    scoring_of_group,
    update_of_group,
)
from megatron_vppo.planning.step_model import Machine, SpeedModel, TrainerLayout

FORWARD_EXCHANGES, BACKWARD_EXCHANGES = 4, 6
"""Gathers and scatters of the hidden states in a layer with sequence parallelism; the backward pass gathers two saved
inputs again."""
BFLOAT16, FLOAT32 = 2, 4


@dataclass(frozen=True)
class PhaseSeconds:
    """A phase on the slowest rank, by what the time is spent on."""

    language: float
    vision: float
    exchange: float
    """Tensor- and context-parallel ranks, and messages between stages."""
    bubble: float
    """Stages of a pipeline that wait for the first or the last micro-batch."""
    host: float
    """The device waits for images and packing, which a thread does one micro-batch ahead."""
    optimizer: float = 0.0
    """Data-parallel collectives and the optimizer."""

    @property
    def total(self) -> float:
        return self.language + self.vision + self.exchange + self.bubble + self.host + self.optimizer


@dataclass(frozen=True)
class _Pass:
    """The work of a data-parallel rank in a phase."""

    group: GroupFlops
    groups: int
    micro_batches: float
    with_backward: bool


def scoring_seconds(model: SpeedModel, work: StepWork, layout: TrainerLayout, machine: Machine) -> PhaseSeconds:
    """Returns the seconds in which all rows are scored."""
    host, work = machine.assumed.host, _as_packed(work, layout)
    groups = math.ceil(work.prompts / layout.data)
    done = _Pass(
        group=scoring_of_group(model.cost, work),
        groups=groups,
        micro_batches=groups * work.responses / work.rows_per_scoring,
        with_backward=False,
    )
    read = groups * work.images * (host.decode_image + host.process_image)
    return _phase(model, layout, machine, done, pipelines=1, packing=read + _packing(work, done, machine))


def update_seconds(model: SpeedModel, work: StepWork, layout: TrainerLayout, machine: Machine) -> PhaseSeconds:
    """Returns the seconds of all mini-batches: forward, backward, collectives and optimizer."""
    work = _as_packed(work, layout)
    groups = work.minibatches * math.ceil(work.prompts / work.minibatches / layout.data)
    done = _Pass(
        group=update_of_group(model.cost, work),
        groups=groups,
        micro_batches=groups * work.responses / work.rows_per_update,
        with_backward=True,
    )
    # A rank has an image of the update in memory if it scored it, which is chance: rows are divided over ranks again.
    new_images = groups * work.images * (1 - 1 / layout.data)
    read = new_images * (machine.assumed.host.decode_image + machine.assumed.host.process_image)
    phase = _phase(
        model,
        layout,
        machine,
        done,
        pipelines=work.minibatches,
        packing=read + _packing(work, done, machine),
    )
    backward = BACKWARD / (1 + BACKWARD) * (phase.language + phase.vision) / done.micro_batches
    step = optimizer_seconds(model, layout, machine, backward=backward)
    return replace(phase, optimizer=work.minibatches * step)


def _as_packed(work: StepWork, layout: TrainerLayout) -> StepWork:
    """Returns the work as ranks of this layout do it: context parallelism shares no prompts."""
    return replace(work, shared_prefix=work.shared_prefix and layout.context == 1)


def optimizer_seconds(model: SpeedModel, layout: TrainerLayout, machine: Machine, *, backward: float) -> float:
    """Returns the seconds of one optimizer step: gradients in fp32 are summed and scattered over data and context
    ranks, each rank updates its share, and the weights in bfloat16 are gathered.

    Args:
        backward: seconds of the backward pass of a micro-batch, behind which gradients are summed.
    """
    shard = model.parameters / (layout.tensor * layout.pipeline)
    replicas = layout.data * layout.context
    # A replica's neighbours lie tensor x context apart.
    link = machine.link(layout.tensor * replicas, node_gpus=layout.node_gpus)
    moved = (replicas - 1) / replicas * shard / link
    summing, gathering = moved * FLOAT32, moved * BFLOAT16
    hidden = min(machine.assumed.shares.hidden_gradients * summing, backward)
    host = machine.assumed.host
    own = host.optimizer_step + shard / replicas * host.optimizer_bytes / machine.gpu.memory
    return summing - hidden + gathering + own


def _phase(
    model: SpeedModel,
    layout: TrainerLayout,
    machine: Machine,
    done: _Pass,
    *,
    pipelines: int,
    packing: float,
) -> PhaseSeconds:
    """
    Args:
        pipelines: times that the pipeline fills and empties, once for each mini-batch.
        packing: seconds of the thread that packs the next micro-batch.
    """
    language = done.groups * _language_seconds(layout, machine, done)
    vision = _vision_seconds(model, layout, machine, done)
    exchange = done.groups * _exchange_seconds(model, layout, machine, done)
    bubble = (layout.pipeline - 1) * pipelines / max(pipelines, done.micro_batches)
    messages = (4 if done.with_backward else 2) * done.micro_batches * machine.assumed.host.stage_message
    exchange_and_messages = exchange + (messages if layout.pipeline > 1 else 0.0)
    device = language + vision + exchange_and_messages
    # The first micro-batch of each mini-batch is packed before anything runs, all others while something runs.
    first = min(1.0, pipelines / done.micro_batches)
    return PhaseSeconds(
        language=language,
        vision=vision,
        exchange=exchange_and_messages,
        bubble=bubble * (language + vision + exchange),
        host=first * packing + (1 - first) * max(0.0, packing - device),
    )


def _language_seconds(layout: TrainerLayout, machine: Machine, done: _Pass) -> float:
    """Returns the seconds of a group's products in the layers and the head of one stage."""
    group = done.group
    flops = group.language + group.head
    if done.with_backward:
        again = {"none": 0.0, "selective": group.attention, "full": group.language}[layout.recompute]
        flops = (1 + BACKWARD) * flops + HEAD_AGAIN * group.head + again
    return (
        flops / (layout.stage_ranks * layout.pipeline) / (machine.gpu.product_flops * machine.assumed.shares.training)
    )


def _vision_seconds(model: SpeedModel, layout: TrainerLayout, machine: Machine, done: _Pass) -> float:
    """Returns the seconds of the tower on the first stage, for which the other stages wait.

    A micro-batch with few images ends before the host has launched the next layer.
    """
    if not done.group.tower:
        return 0.0
    shares, host = machine.assumed.shares, machine.assumed.host
    rate = machine.gpu.product_flops * shares.vision
    forward = done.groups * done.group.tower / done.micro_batches / layout.stage_ranks / rate
    launch = model.vision_layers * host.launch_layer
    once = max(forward, launch)
    if not done.with_backward:
        return done.micro_batches * once
    again = once if layout.recompute == "full" else 0.0
    return done.micro_batches * (once + again + max(BACKWARD * forward, host.launch_backward * launch))


def _exchange_seconds(model: SpeedModel, layout: TrainerLayout, machine: Machine, done: _Pass) -> float:
    """Returns the seconds in which the ranks of a stage exchange the hidden states, keys and values of a group."""
    tokens = done.group.tokens / layout.context
    layers = model.layers / layout.pipeline
    again = 1 if layout.recompute == "full" else 0
    forward, backward = (1 + again, 1) if done.with_backward else (1, 0)
    hidden = (layout.tensor - 1) / layout.tensor * tokens * model.hidden * BFLOAT16
    sums = (forward * FORWARD_EXCHANGES + backward * BACKWARD_EXCHANGES) * hidden
    seconds = layers * sums / machine.link(layout.tensor, node_gpus=layout.node_gpus)
    # Every context rank gathers the keys and values of all; the backward pass scatters their gradient.
    gathered = (layout.context - 1) / layout.context * done.group.tokens * model.kv_values / layout.tensor * BFLOAT16
    return seconds + layers * (forward + backward) * gathered / machine.link(
        layout.stage_ranks, node_gpus=layout.node_gpus
    )


def _packing(work: StepWork, done: _Pass, machine: Machine) -> float:
    """Returns the seconds in which tokens and bytes of images are put into the buffers that go to the device."""
    host = machine.assumed.host
    image_bytes = done.groups * work.images * work.patches * host.bytes_per_patch
    return done.groups * done.group.tokens * host.pack_token + image_bytes / host.fill_buffer
