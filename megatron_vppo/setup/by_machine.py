"""The values of settings that a run leaves to the machine: what suits GPUs is slow or impossible on CPU cores."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_vppo.config.schema import RunConfig


@dataclass(frozen=True)
class ByMachine:
    """The settings with their values, under their own names."""

    sequence_parallel: bool
    overlap_grad_reduce: bool
    head_chunk_tokens: int
    max_num_seqs: int
    enforce_eager: bool
    async_checkpoints: bool


ON_CPU = ByMachine(
    sequence_parallel=False,
    overlap_grad_reduce=False,
    head_chunk_tokens=1024,
    max_num_seqs=256,
    enforce_eager=True,
    async_checkpoints=False,
)
"""Chunks that fit a cache, no graphs, since there are none, and cores that are not shared with sums of gradients or
writers."""
ON_GPU = ByMachine(
    sequence_parallel=True,
    overlap_grad_reduce=True,
    head_chunk_tokens=4096,
    max_num_seqs=1024,
    enforce_eager=False,
    async_checkpoints=True,
)
"""Gradients that travel while the GPUs compute, products large enough for one, vLLM's own number of sequences on one of
70 GiB or more, CUDA graphs, and checkpoints that are written while the GPUs go on."""
SECTIONS = {
    "sequence_parallel": "parallel",
    "overlap_grad_reduce": "parallel",
    "head_chunk_tokens": "actor",
    "max_num_seqs": "rollout",
    "enforce_eager": "rollout",
    "async_checkpoints": "trainer",
}


def by_machine(config: RunConfig, *, on_gpu: bool) -> ByMachine:
    """Returns the settings as the run uses them: those that it has, and for null those of the machine.

    With one tensor-parallel rank there is nothing to share, and sequence parallelism is off.
    """
    machine = ON_GPU if on_gpu else ON_CPU
    given = {field.name: getattr(getattr(config, SECTIONS[field.name]), field.name) for field in fields(ByMachine)}
    values = {name: getattr(machine, name) if value is None else value for name, value in given.items()}
    values["sequence_parallel"] &= config.parallel.tensor_model_parallel_size > 1
    return ByMachine(**values)


def chosen_by_machine(config: RunConfig, *, on_gpu: bool) -> str | None:
    """Returns a line with the values that GPUs chose; None on CPU, and if the run leaves none to the machine."""
    values = by_machine(config, on_gpu=on_gpu)
    chosen = [
        f"{section}.{name}={str(getattr(values, name)).lower()}"
        for name, section in SECTIONS.items()
        if getattr(getattr(config, section), name) is None
    ]
    return f"for GPUs: {', '.join(chosen)}" if on_gpu and chosen else None
