"""The state of trainer and engine that each phase of a step needs on the GPU, as one table.

docs/placement.md has the table with the settings.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vppo.config.choices import MemoryPart
from megatron_vppo.observability.phases import SAMPLE, SCORE, SYNC, UPDATE
from megatron_vppo.rollout.engine import EngineMemory

# One GPU through the first step, its checkpoint and the start of the second step, with engines that sleep and
# `actor.offload: [params, grads, optimizer]`. A bar is memory on the GPU:
#
#                         start    sync     sample   score    update   sync     write    sample
#     trainer  params     ================           ==================================
#              grads      =======                             =======
#              optimizer  =======                             =======           =======
#     engine   weights             ================                    =======  (host)   =======
#              kv_cache                     =======                                      =======
#     for a moment                 buffers  prefill  activations       buffers           prefill
#
# The engine forgets its weights before `score`, because a sync will bring new ones after the update. Before `write` it
# copies them to host memory, because no sync follows.

START = "start"
"""Before the first phase: the trainer's state is on the device, and engines that sleep are asleep."""
WRITE = "write"
"""A checkpoint or an export, between two steps."""
RESTART = "restart"
"""A new start of engines that were lost, in the middle of sampling or of a sync. vLLM then measures how much memory is
free. The other engines forget their weights, since a sync follows."""


@dataclass(frozen=True)
class Holding:
    """The state that trainer and engine keep on the device during a phase."""

    trainer: tuple[MemoryPart, ...]
    """Parts that must be on the device. The others leave it if `actor.offload` names them."""
    engine: tuple[EngineMemory, ...]
    after: tuple[str, ...]
    """Phases that this one may follow."""
    keeps_engine_weights: bool = False
    """True if the engine's weights wait in host memory, because no sync follows."""


HOLDINGS = {
    START: Holding(trainer=("params", "grads", "optimizer"), engine=(), after=()),
    SYNC.name: Holding(trainer=("params",), engine=("weights",), after=(START, UPDATE.name, RESTART)),
    SAMPLE.name: Holding(trainer=(), engine=("weights", "kv_cache"), after=(SYNC.name, SAMPLE.name, WRITE)),
    SCORE.name: Holding(trainer=("params",), engine=(), after=(SAMPLE.name,)),
    UPDATE.name: Holding(trainer=("params", "grads", "optimizer"), engine=(), after=(SCORE.name,)),
    WRITE: Holding(
        trainer=("params", "optimizer"),
        engine=(),
        after=(SYNC.name, SAMPLE.name, SCORE.name, WRITE, RESTART),
        keeps_engine_weights=True,
    ),
    RESTART: Holding(trainer=(), engine=(), after=(SYNC.name, SAMPLE.name)),
}
"""The phases that move memory. Rewards and advantages need no GPU. Validation runs in the phase of sampling."""
