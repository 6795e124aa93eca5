"""The moves of GPU memory between trainer and engine from phase to phase, as `HOLDINGS` (setup/holdings.py) has it.

Of the parts that may leave the GPU (`actor.offload`, and engines that sleep), trainer and engine hold only those of the
phase. On entering a phase, every rank first gives up the memory that the phase does not need, and only then takes what
it needs. docs/placement.md has the table with the settings.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from megatron_vppo.config.choices import MemoryPart
from megatron_vppo.observability.phases import SAMPLE, SCORE, SYNC, UPDATE
from megatron_vppo.rollout.engine import EngineMemory
from megatron_vppo.setup.holdings import HOLDINGS, RESTART, START, WRITE, Holding


class Offloadable(Protocol):
    """The trainer's state on this rank; see parallel/offload.py."""

    def offload(self, parts: Collection[MemoryPart]) -> None: ...

    def reload(self, parts: Collection[MemoryPart]) -> None: ...

    def empty_cache(self) -> None: ...


class Sleeper(Protocol):
    """An engine that gives its memory back; see rollout/engine.py."""

    def sleep(self, *, keep_weights: bool) -> None: ...

    def wake(self, tag: EngineMemory) -> None: ...


class Placement:
    """Moves memory from phase to phase.

    Every method is a collective over all trainer ranks, and does nothing if the device already holds what the phase
    wants.
    """

    def __init__(
        self,
        trainer: Offloadable,
        engine: Sleeper | None,
        *,
        offloads: Collection[MemoryPart],
        engines_sleep: bool,
        barrier: Callable[[], None],
    ) -> None:
        """Begins in the state of `START`.

        Args:
            engine: the engine that this rank leads; None if it leads none.
            offloads: parts of the trainer that may leave the device; the same on every rank.
            engines_sleep: True if engines give their memory back; the same on every rank.
            barrier: returns when every rank has called it.
        """
        self._trainer = trainer
        self._engine = engine if engines_sleep else None
        self._engines_sleep = engines_sleep
        self._offloads = frozenset(offloads)
        self._barrier = barrier
        self._away: frozenset[MemoryPart] = frozenset()
        self._awake: frozenset[EngineMemory] = frozenset() if engines_sleep else frozenset(("weights", "kv_cache"))
        self.phase: str = START

    def syncing(self) -> None:
        """Makes room to send weights to the engines: trainer and engines hold theirs, and there is no KV cache yet."""
        self._enter(SYNC.name)

    def sampling(self) -> None:
        """Gives the engines room for their weights and KV cache."""
        self._enter(SAMPLE.name)

    def scoring(self) -> None:
        """Gives the trainer room for forward passes. Engines forget their weights, since a sync will bring new ones."""
        self._enter(SCORE.name)

    def updating(self) -> None:
        """Gives the trainer room for optimizer steps."""
        self._enter(UPDATE.name)

    def writing(self) -> None:
        """Brings the trainer's state back for a checkpoint or an export.

        Engine weights wait in host memory. Trainer state that no file contains stays offloaded.
        """
        self._enter(WRITE)

    def without_engines(self) -> None:
        """Says that the engines have ended, and their memory is free; no collective."""
        self._engine, self._engines_sleep, self._awake = None, False, frozenset()

    def restarting(self) -> None:
        """Gives engines that load again all the room that there can be."""
        self._enter(RESTART)
        self._trainer.empty_cache()
        self._barrier()

    def _enter(self, name: str) -> None:
        holding = HOLDINGS[name]
        if self.phase not in holding.after:
            raise RuntimeError(
                f"placement: '{name}' cannot follow '{self.phase}', only {' or '.join(map(repr, holding.after))}"
            )
        self.phase = name
        leaving = self._offloads - self._away - set(holding.trainer)
        coming = self._away & set(holding.trainer)
        engine_moves = self._engines_sleep and self._awake != set(holding.engine)
        if name == WRITE and not coming:
            return  # all that is written is on the device, and writing needs no further memory: engines may stay awake
        if leaving or coming or engine_moves:
            self._make_room(leaving, holding)
            self._barrier()  # an engine may span the GPUs of several ranks
            self._take(coming, holding)

    def _make_room(self, leaving: frozenset[MemoryPart], holding: Holding) -> None:
        """Gives up memory and takes none: vLLM refuses to sleep if the GPU's free memory shrinks meanwhile."""
        if leaving:
            self._trainer.offload(leaving)
            self._away |= leaving
        if not self._engines_sleep:
            return
        # vLLM falls asleep as a whole: an engine that has to give up a part gives up all, and wakes what it keeps.
        if self._awake - set(holding.engine):
            if self._engine is not None:
                self._engine.sleep(keep_weights=holding.keeps_engine_weights)
            self._awake = frozenset()
        elif set(holding.engine) - self._awake:
            self._trainer.empty_cache()  # torch keeps freed memory, which the engine is about to take

    def _take(self, coming: frozenset[MemoryPart], holding: Holding) -> None:
        if coming:
            self._trainer.reload(coming)
            self._away -= coming
        for tag in holding.engine:
            if tag not in self._awake and self._engine is not None:
                self._engine.wake(tag)
        self._awake |= set(holding.engine)
