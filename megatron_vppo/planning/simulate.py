"""The same step on other numbers of GPUs: what they shorten, and what stays. Modelled, not measured.

More GPUs divide the prompts of scoring and update. Sampling has a floor, its longest response. The work of rank 0 stays
as it is, and the collectives of all ranks grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_vppo.planning.candidate import Candidate, PlanRequest
from megatron_vppo.planning.step_model import SpeedModel
from megatron_vppo.planning.step_seconds import StepSeconds
from megatron_vppo.planning.timed_layouts import SpeedRequest, TimedLayout, seconds_of, with_gpus


@dataclass(frozen=True)
class SimulatedStep:
    """A step on `gpus` GPUs, in replicas of one layout."""

    gpus: int
    layout: Candidate
    seconds: StepSeconds
    divided: float
    """Seconds of sampling, scoring and update if the GPUs of the plan were divided perfectly into more of them."""

    @property
    def serial_share(self) -> float:
        """The share of the step in which rank 0 works or all ranks exchange Python objects."""
        return (self.seconds.host + self.seconds.collectives) / self.seconds.total

    @property
    def efficiency(self) -> float:
        """The share of perfect division: 1 if GPUs only divided the work of the plan, and nothing else took time."""
        return self.divided / self.seconds.total


def simulate(
    first: TimedLayout, gpus: Sequence[int], model: SpeedModel, request: PlanRequest, speed: SpeedRequest
) -> tuple[SimulatedStep | int, ...]:
    """Models the step of `first` on each number of GPUs. A number stands for itself where the layout does not fit.

    Raises:
        ValueError: no whole number of replicas has that many GPUs.
    """
    planned = first.seconds.on_gpus * request.cluster.gpus
    steps: list[SimulatedStep | int] = []
    for number in gpus:
        layout = with_gpus(first.layout, number, request)
        if layout is None:
            steps.append(number)
            continue
        there = replace(request, cluster=replace(request.cluster, gpus=number))
        seconds = seconds_of(layout, model, there, speed)
        steps.append(SimulatedStep(number, layout, seconds, divided=planned / number))
    return tuple(steps)
