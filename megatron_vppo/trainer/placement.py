"""Who holds the GPU, phase by phase. The one place that knows; `PHASES` is the whole of it.

A rank's trainer and the engine on the same GPU never hold more of it at once than the phase says. Entering a phase,
what it does not need leaves first, on every rank, and only then comes what it needs. docs/placement.md has the table
with the settings.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_vppo.config.choices import MemoryPart
from megatron_vppo.rollout.engine import MemoryTag

PhaseName = Literal["start", "sync", "sample", "score", "update", "write"]


class Trainer(Protocol):
    """See parallel/offload.py."""

    def offload(self, parts: Collection[MemoryPart]) -> None: ...

    def reload(self, parts: Collection[MemoryPart]) -> None: ...

    def empty_cache(self) -> None: ...


class Engine(Protocol):
    """See rollout/engine.py."""

    def sleep(self, *, keep_weights: bool) -> None: ...

    def wake(self, tag: MemoryTag) -> None: ...


@dataclass(frozen=True)
class Phase:
    trainer: tuple[MemoryPart, ...]
    """What has to be on the device; the rest leaves, as far as `actor.offload` names it."""
    engine: tuple[MemoryTag, ...]
    after: tuple[PhaseName, ...]
    """Phases that this one may follow."""
    keeps_engine_weights: bool = False
    """The engine's weights wait in host memory, since no sync follows."""


PHASES: dict[PhaseName, Phase] = {
    "start": Phase(trainer=("params", "grads", "optimizer"), engine=(), after=()),
    "sync": Phase(trainer=("params",), engine=("weights",), after=("start", "update")),
    "sample": Phase(trainer=(), engine=("weights", "kv_cache"), after=("sync", "sample", "write")),
    "score": Phase(trainer=("params",), engine=(), after=("sample",)),
    "update": Phase(trainer=("params", "grads", "optimizer"), engine=(), after=("score",)),
    "write": Phase(
        trainer=("params", "optimizer"), engine=(), after=("sync", "sample", "write"), keeps_engine_weights=True
    ),
}


class Placement:
    """Moves from phase to phase. Every method is a collective over all trainer ranks, and does nothing where the
    device is as the phase wants it.
    """

    def __init__(
        self,
        trainer: Trainer,
        engine: Engine | None,
        *,
        offloads: Collection[MemoryPart],
        engines_sleep: bool,
        barrier: Callable[[], None],
    ) -> None:
        """The trainer's state is on the device, and engines that sleep are asleep.

        Args:
            engine: the one that this rank leads.
            offloads: parts of the trainer that may leave the device; the same on every rank.
            engines_sleep: whether engines give their memory back; the same on every rank.
            barrier: returns when every rank has called it.
        """
        self._trainer = trainer
        self._engine = engine if engines_sleep else None
        self._engines_sleep = engines_sleep
        self._offloads = frozenset(offloads)
        self._barrier = barrier
        self._away: frozenset[MemoryPart] = frozenset()
        self._awake: frozenset[MemoryTag] = frozenset() if engines_sleep else frozenset(("weights", "kv_cache"))
        self.phase: PhaseName = "start"

    def syncing(self) -> None:
        """For sending the trainer's weights to the engines: both hold theirs, there is no KV cache yet."""
        self._enter("sync")

    def sampling(self) -> None:
        """For the engines to answer: they hold their weights and KV cache."""
        self._enter("sample")

    def scoring(self) -> None:
        """For forward passes of the trainer. The engines forget their weights: an update and a sync follow."""
        self._enter("score")

    def updating(self) -> None:
        """For optimizer steps."""
        self._enter("update")

    def writing(self) -> None:
        """For checkpoint and export. Engines keep their weights, and memory that a written file needs none of."""
        self._enter("write")

    def _enter(self, name: PhaseName) -> None:
        phase = PHASES[name]
        if self.phase not in phase.after:
            raise RuntimeError(
                f"placement: '{name}' cannot follow '{self.phase}', only {' or '.join(map(repr, phase.after))}"
            )
        self.phase = name
        leaving = self._offloads - self._away - set(phase.trainer)
        coming = self._away & set(phase.trainer)
        engine_moves = self._engines_sleep and self._awake != set(phase.engine)
        if name == "write" and not coming:
            return  # everything that is written is there, and writing takes no room
        if leaving or coming or engine_moves:
            self._make_room(leaving, phase)
            self._barrier()  # an engine may reach over the GPUs of several ranks
            self._take(coming, phase)

    def _make_room(self, leaving: frozenset[MemoryPart], phase: Phase) -> None:
        """Nobody takes memory here: vLLM compares what the whole GPU has free before and after it falls asleep."""
        if leaving:
            self._trainer.offload(leaving)
            self._away |= leaving
        if not self._engines_sleep:
            return
        if self._awake - set(phase.engine):
            if self._engine is not None:
                self._engine.sleep(keep_weights=phase.keeps_engine_weights)
            self._awake = frozenset()
        elif set(phase.engine) - self._awake:
            self._trainer.empty_cache()

    def _take(self, coming: frozenset[MemoryPart], phase: Phase) -> None:
        if coming:
            self._trainer.reload(coming)
            self._away -= coming
        for tag in phase.engine:
            if tag not in self._awake and self._engine is not None:
                self._engine.wake(tag)
        self._awake |= set(phase.engine)
