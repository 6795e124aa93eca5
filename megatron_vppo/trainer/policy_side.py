"""The trainer's part when an engine is started again in the middle of a phase: `rollout.recovery.TrainerSide`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from megatron_vppo.observability.phases import SAMPLE
from megatron_vppo.parallel.policy import MegatronPolicy
from megatron_vppo.trainer.placement import Placement


class PolicySide:
    """Moves the memory, and streams the policy's weights. Every method is a collective over all trainer ranks."""

    def __init__(self, policy: MegatronPolicy, placement: Placement) -> None:
        self._policy = policy
        self._placement = placement
        self._interrupted: str | None = None

    def make_room(self) -> None:
        """Takes the trainer's memory from the device as far as it may leave, and lets the other engines sleep."""
        self._interrupted = self._interrupted or self._placement.phase
        self._placement.restarting()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Returns the present weights, frozen ones too."""
        self._placement.syncing()
        return self._policy.hf_weights()

    def go_on(self) -> None:
        """Gives the engines their KV cache, if they were sampling."""
        if self._interrupted == SAMPLE.name:
            self._placement.sampling()
        self._interrupted = None
