"""The memory of a GPU in each phase of a step, and that of a host: who holds what is the table `HOLDINGS`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vppo.config.choices import MEMORY_PARTS, MemoryPart
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.launching.stage_memory import StageReport
from megatron_vppo.models.hf_config import HfConfig, kv_bytes_per_token
from megatron_vppo.observability.phases import SAMPLE, SCORE, SYNC, UPDATE
from megatron_vppo.planning.candidate import TRAINER_RESERVE
from megatron_vppo.planning.engine_share import ENGINE_RESERVE, SLEEPING_ENGINE, TRANSFER_BUFFER
from megatron_vppo.planning.state import StateBytes, engine_weight_bytes
from megatron_vppo.setup.engine_limits import DTYPE_BYTES
from megatron_vppo.setup.engines import engines_sleep, weight_transfer
from megatron_vppo.setup.holdings import HOLDINGS, WRITE

PHASE_NAMES: dict[str, str] = {
    SYNC.name: "send weights",
    SAMPLE.name: "sample",
    SCORE.name: "score",
    UPDATE.name: "update",
}
"""The phases of a step that move memory, in their order, and their names for a reader. A checkpoint holds less."""


@dataclass(frozen=True)
class EngineBytes:
    """The memory of an engine on each of its GPUs."""

    weights: int
    """All in the model's dtype; quantised layers take less."""
    awake: int
    """While it samples: its share of the GPU, keys and values included."""
    sleeps: bool
    """True if it gives its memory back in the phases of the trainer."""
    buffers: int
    """The buffers through which weights come; on the leader's GPU, or in the memory of its host."""
    on_gpu: bool
    """True if the buffers are on the GPU."""
    sequences: int
    """The sequences of full length that keys and values have room for."""

    def held(self, parts: Sequence[str]) -> int:
        """Returns its bytes in a phase in which it holds `parts` of itself."""
        if not self.sleeps or "kv_cache" in parts:
            return self.awake
        return self.weights + ENGINE_RESERVE if parts else SLEEPING_ENGINE


@dataclass(frozen=True)
class PhaseBytes:
    """The fullest GPU of one phase."""

    phase: str
    pipeline_rank: int
    """The stage of the trainer rank on this GPU."""
    state: int
    activations: int
    """Those of the vocabulary head included."""
    engine: int
    buffers: int
    reserve: int

    @property
    def total(self) -> int:
        return self.state + self.activations + self.engine + self.buffers + self.reserve


def engine_bytes(config: RunConfig, hf_config: HfConfig, *, parameters: int, gpu_bytes: int) -> EngineBytes:
    """Sizes an engine by the settings."""
    rollout, dtype_bytes = config.rollout, DTYPE_BYTES[config.model.dtype]
    size, text = rollout.tensor_parallel_size, hf_config.text_config
    awake = int(rollout.gpu_memory_utilization * gpu_bytes)
    weights = engine_weight_bytes(parameters, tensor=size, dtype_bytes=dtype_bytes)
    tokens = config.data.max_prompt_length + config.data.max_response_length
    sequence = kv_bytes_per_token(hf_config, ranks=size, dtype_bytes=dtype_bytes) * tokens
    return EngineBytes(
        weights=weights,
        awake=awake,
        sleeps=engines_sleep(config, on_cpu=False),
        buffers=2 * max(TRANSFER_BUFFER, text.vocab_size * text.hidden_size * dtype_bytes),
        on_gpu=weight_transfer(config, on_cpu=False) == "ipc",
        sequences=max(0, awake - weights - ENGINE_RESERVE) // sequence,
    )


def fullest_phases(config: RunConfig, stages: Sequence[StageReport], engine: EngineBytes) -> tuple[PhaseBytes, ...]:
    """Returns the fullest GPU of each phase. Each phase has its own fullest stage."""
    return tuple(
        max((_phase_bytes(config, stage, engine, phase) for stage in stages), key=lambda found: found.total)
        for phase in PHASE_NAMES
    )


def _phase_bytes(config: RunConfig, stage: StageReport, engine: EngineBytes, phase: str) -> PhaseBytes:
    holding = HOLDINGS[phase]
    held = {part for part in _sizes(stage.state) if part in holding.trainer or part not in config.actor.offload}
    activations: dict[str, int] = {SCORE.name: stage.score.total, UPDATE.name: stage.update.total}
    return PhaseBytes(
        phase=phase,
        pipeline_rank=stage.pipeline_rank,
        state=sum(_sizes(stage.state)[part] for part in held),
        activations=activations.get(phase, 0),
        engine=engine.held(holding.engine),
        buffers=engine.buffers if phase == SYNC.name and engine.on_gpu else 0,
        reserve=TRAINER_RESERVE,
    )


def _sizes(state: StateBytes) -> dict[MemoryPart, int]:
    return {"params": state.weights, "grads": state.gradients, "optimizer": state.optimizer}


# --- Host memory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HostBytes:
    """The memory of a host that the settings ask for. What every process needs by itself comes on top."""

    offloaded: int
    """Weights and optimizer state of its ranks, pinned; gradients are freed and not copied."""
    reference: int
    """The weights of a reference model, pinned."""
    engine_weights: int
    """The weights of its engines, which wait in host memory during a checkpoint."""
    buffers: int
    """Transfer buffers, if weights go through host memory."""

    @property
    def total(self) -> int:
        return self.offloaded + self.reference + self.engine_weights + self.buffers


def fullest_host(
    config: RunConfig,
    stages: Sequence[StageReport],
    engine: EngineBytes,
    *,
    stage_of_rank: Sequence[int],
    engines_of_host: Sequence[int],
    ranks_per_host: int,
) -> HostBytes:
    """Returns the memory of the host with the most of it.

    Args:
        stage_of_rank: the pipeline rank of each rank.
        engines_of_host: the number of engines on each host.
    """
    copied = [part for part in MEMORY_PARTS if part in config.actor.offload and part != "grads"]
    of_stage = [sum(_sizes(stage.state)[part] for part in copied) for stage in stages]
    reference = [stage.state.weights if config.algorithm.kl_coef else 0 for stage in stages]
    # A checkpoint brings back what it writes, so engines make room; if nothing was away, they stay awake.
    waits = engine.sleeps and bool(set(HOLDINGS[WRITE].trainer).intersection(copied))
    hosts = []
    for host, engines in enumerate(engines_of_host):
        ranks = stage_of_rank[host * ranks_per_host : (host + 1) * ranks_per_host]
        whole = engine.weights * config.rollout.tensor_parallel_size
        hosts.append(
            HostBytes(
                offloaded=sum(of_stage[stage] for stage in ranks),
                reference=sum(reference[stage] for stage in ranks),
                engine_weights=engines * whole if waits else 0,
                buffers=0 if engine.on_gpu else engines * engine.buffers,
            )
        )
    return max(hosts, key=lambda host: host.total)
