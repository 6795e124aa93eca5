"""Engines that die or hang are started again, and the run goes on.

Only the rank that leads an engine sees that it is lost, and the weights for the next one come from all ranks together.
So the ranks tell each other after every request whether an engine is lost, and recover together:

    leader      lost: make room, start again, take the weights, be asked again
    others      hear of it: make room,        give the weights, wait
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor

from megatron_vppo.rollout.child import EngineLost
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.transfer.bundle import drain
from megatron_vppo.system.agreement import any_rank, gathered
from megatron_vppo.system.stop_signals import StopRequested

logger = logging.getLogger(__name__)


class TrainerSide(Protocol):
    """The part of the trainer in a recovery. Every method is a collective over all trainer ranks."""

    def make_room(self) -> None:
        """Leaves the memory to the engines that start, as it was when the first ones started."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Makes room for a transfer, and returns the present weights, all of them."""

    def go_on(self) -> None:
        """Returns to the phase that was interrupted."""


class EngineRecovery:
    """Starts this rank's engine again when it is lost, and gives it the present weights."""

    def __init__(
        self,
        engine: RolloutEngine | None,
        trainer: TrainerSide,
        *,
        name: str,
        most_restarts: int,
        start_timeout_seconds: float,
    ) -> None:
        """
        Args:
            engine: the engine that this rank leads; None if it leads none.
            name: the engine in messages.
            most_restarts: the most restarts of one engine.
        """
        self._engine = engine
        self._trainer = trainer
        self._name = name
        self._most_restarts = most_restarts
        self._start_timeout_seconds = start_timeout_seconds
        self._restarts = 0
        self._told = 0

    def recover(
        self,
        lost: EngineLost | None,
        send: Callable[[Iterator[tuple[str, Tensor]]], None],
        *,
        stop_wanted: Callable[[], bool] = lambda: False,
    ) -> None:
        """Returns once every engine runs and has the present weights; a collective over all trainer ranks.

        Args:
            lost: the error of this rank's engine, if it is lost.
            send: sends weights to this rank's engine.
            stop_wanted: returns True if the run is to end instead; it need not be true on all ranks.

        Raises:
            RuntimeError: an engine is lost more often than it may be started again.
            StopRequested: on every rank, if it was wanted on one while an engine started.
        """
        while True:
            self._trainer.make_room()
            cut = False
            if lost is not None:
                try:
                    self._restart(lost, stop_wanted)
                except StopRequested:
                    cut = True
            if any_rank(cut):
                raise StopRequested
            stream, lost = self._trainer.weights(), None
            if self._engine is None or self._engine.has_weights:
                drain(stream)
            else:
                try:
                    send(stream)
                except EngineLost as error:
                    lost = error
            if not any_rank(lost is not None):
                break
        self._trainer.go_on()

    def take_restarts(self) -> int:
        """Returns how often engines were started again since the last call; a collective over all trainer ranks."""
        total = sum(gathered(self._restarts))
        new, self._told = total - self._told, total
        return new

    def _restart(self, lost: EngineLost, stop_wanted: Callable[[], bool]) -> None:
        assert self._engine is not None, "the rank leads the engine that it lost"
        while True:
            if self._restarts == self._most_restarts:
                raise RuntimeError(self._final(lost)) from lost
            self._restarts += 1
            logger.warning(
                "%s is started again (%d of at most %d times): %s (log: %s)",
                self._name, self._restarts, self._most_restarts, lost.what, self._engine.log_path,
            )  # fmt: skip
            try:
                self._engine.restart(timeout_seconds=self._start_timeout_seconds, stop_wanted=stop_wanted)
                return
            except EngineLost as error:
                lost = error

    def _final(self, lost: EngineLost) -> str:
        if self._most_restarts == 0:
            return str(lost)
        return (
            f"{self._name} was started again {self._most_restarts} times, as often as rollout.max_engine_restarts "
            f"allows, and is lost again: {lost}"
        )
