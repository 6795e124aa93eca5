"""The seconds of a step, phase by phase: a roofline model of today's code. Modelled, not measured.

sampling_seconds.py and training_seconds.py have the phases on the GPU; here are the rest and the sum. docs/plan.md
lists what is assumed and what the model leaves out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vppo.planning.sampling_seconds import sampling_seconds
from megatron_vppo.planning.step_flops import StepWork, least_update
from megatron_vppo.planning.step_model import EngineLayout, Machine, SpeedModel, TrainerLayout
from megatron_vppo.planning.training_seconds import PhaseSeconds, scoring_seconds, update_seconds


@dataclass(frozen=True)
class StepSeconds:
    """The phases of one step, one after the other."""

    sampling: float
    scoring: PhaseSeconds
    update: PhaseSeconds
    sync: float
    """Weights to the engines, engines to sleep and awake, offloaded state there and back."""
    host: float
    """Rank 0 and every rank: records, mismatch and advantages, and of the grading what takes longer than sampling. More
    GPUs do not shorten it."""
    collectives: float
    """Prompts, responses and rewards, between all ranks."""
    tokens_per_gpu: float
    """Tokens of prompts and responses that a GPU trains on in a second of the step."""
    mfu: float
    """The least arithmetic of the update over its seconds and the peak of the GPUs."""

    @property
    def on_gpus(self) -> float:
        return self.sampling + self.scoring.total + self.update.total

    @property
    def total(self) -> float:
        return self.on_gpus + self.sync + self.host + self.collectives


def step_seconds(
    model: SpeedModel,
    work: StepWork,
    trainer: TrainerLayout,
    engine: EngineLayout,
    machine: Machine,
    *,
    offloaded_bytes: int = 0,
) -> StepSeconds:
    """Models one step.

    Args:
        offloaded_bytes: trainer state of a GPU that leaves it before sampling and comes back.
    """
    sampling = sampling_seconds(model, work, engine, machine, gpus=trainer.gpus)
    scoring = scoring_seconds(model, work, trainer, machine)
    update = update_seconds(model, work, trainer, machine)
    sync = sync_seconds(model, trainer, machine) + 2 * offloaded_bytes / machine.gpu.to_host
    host = serial_seconds(work, machine) + max(0.0, grading_seconds(work, machine) - sampling)
    collectives = collective_seconds(trainer.gpus, machine)
    total = sampling + scoring.total + update.total + sync + host + collectives
    tokens = work.rows * (work.prompt_tokens + work.response_tokens)
    return StepSeconds(
        sampling=sampling,
        scoring=scoring,
        update=update,
        sync=sync,
        host=host,
        collectives=collectives,
        tokens_per_gpu=tokens / total / trainer.gpus,
        mfu=least_update(model.cost, work) / update.total / trainer.gpus / machine.gpu.peak_flops,
    )


def sync_seconds(model: SpeedModel, trainer: TrainerLayout, machine: Machine) -> float:
    """Returns the seconds until every engine has the new weights.

    Every rank gathers the whole model. Its buffers go to the engines, which load tensor by tensor.
    """
    host = machine.assumed.host
    total = 2 * model.parameters
    gather = (trainer.tensor - 1) / trainer.tensor * total / machine.node_link
    if trainer.pipeline > 1:
        stages = (trainer.pipeline - 1) / trainer.pipeline * total / trainer.tensor
        gather += stages / machine.link(trainer.gpus, node_gpus=trainer.node_gpus)
    bundles = math.ceil(total / host.bundle_bytes)
    return gather + bundles * host.send_bundle + model.tensors * host.load_tensor + host.sync_start + host.wake


def serial_seconds(work: StepWork, machine: Machine) -> float:
    """Returns the seconds of rank 0 and of every rank on their hosts, which no GPU shortens."""
    serial = machine.assumed.serial
    return work.rows * (work.response_tokens * serial.record_token + serial.assemble_row)


def grading_seconds(work: StepWork, machine: Machine) -> float:
    """Returns the seconds of the reward workers, which grade while others are sampled."""
    return work.drawn * work.rows * machine.assumed.serial.grade_response


def collective_seconds(ranks: int, machine: Machine) -> float:
    """Returns the seconds in which all ranks exchange prompts, responses and rewards."""
    serial = machine.assumed.serial
    return (serial.collectives + ranks * serial.collectives_rank) if ranks > 1 else 0.0
