"""`vppo train --dry-run`: what a run on a cluster would be, as a page of text."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_vppo.cli.output import say
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.launching.batches import RankShare
from megatron_vppo.launching.dry_run import DryRun, EnginePlacement, RunCluster, dry_run, header_lines
from megatron_vppo.launching.phases import PHASE_NAMES
from megatron_vppo.launching.remedies import remedies
from megatron_vppo.planning.candidate import GIB
from megatron_vppo.setup.by_machine import by_machine

MOST_WIDTH = 100
"""The characters of a line, as far as the terminal has them."""
MOST_HOSTS = 8
"""The hosts whose engines are listed."""


def run_dry_run(config: RunConfig, options: argparse.Namespace) -> int:
    """Prints the dry run. Returns status 1 if the run does not fit the memory of its GPUs.

    Raises:
        ValueError: settings that cannot work on this cluster.
    """
    cluster = RunCluster(options.nodes, options.gpus_per_node, options.gpu_memory)
    found = dry_run(config, cluster)
    width = min(MOST_WIDTH, shutil.get_terminal_size((MOST_WIDTH, 0)).columns)
    say("\n".join(_page(options.config, found, width)))
    if found.fits:
        say("\nIt fits. Nothing was started.")
        return 0
    say(_filled("\nIt does not fit: " + _excess(found), width))
    changes = [_filled(f"What would fit: {change}", width) for change in remedies(found)]
    say("\n".join(changes or ["No change of the settings that was tried would make it fit these GPUs."]))
    return 1


def _page(path: Path, found: DryRun, width: int) -> Iterator[str]:
    cluster = found.cluster
    yield _filled(
        f"Dry run of {path}: {_count(cluster.nodes, 'node')} of {_count(cluster.gpus_per_node, 'GPU')} with "
        f"{cluster.gpu_bytes / GIB:g} GiB, {_count(cluster.ranks, 'rank')}",
        width,
    )
    yield ""
    yield from _block("Settings", _settings(found), width)
    yield from _block("Files", _files(found), width)
    yield from _block("Step", _step(found), width)
    yield from _block("Engines", _engines(found), width)
    yield from _memory(found)
    yield from _notes(found, width)
    yield from _block("Warnings", found.warnings, width)
    yield "Header of the batch script, all of which `vppo slurm` writes"
    yield from (f"  {line}" for line in header_lines(cluster.nodes, cluster.gpus_per_node))


def _block(title: str, lines: Iterable[str], width: int) -> Iterator[str]:
    """Yields the title, the lines below it, and an empty line; nothing if there are no lines."""
    filled = [textwrap.fill(line, width=width, initial_indent="  ", subsequent_indent="    ") for line in lines]
    if filled:
        yield from (title, *filled, "")


# --- Sections ---------------------------------------------------------------------------------------------------------


def _settings(found: DryRun) -> Iterator[str]:
    config = found.config
    parallel, algorithm, optim, data = config.parallel, config.algorithm, config.actor.optim, config.data
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "DP": found.data_ranks,
    }
    virtual = parallel.virtual_pipeline_model_parallel_size
    yield f"model: {config.model.path}, {found.parameters / 1e9:.2f} B parameters, {config.model.dtype}" + (
        f", frozen: {', '.join(config.model.freeze)}" if config.model.freeze else ""
    )
    yield (
        f"ranks: {' x '.join(f'{name} {size}' for name, size in sizes.items())} = {found.cluster.ranks}"
        + (f", {virtual} virtual stages on each" if virtual > 1 else "")
        + (f"; the groups of all {found.joined} agree" if found.joined else "")
    )
    sequence_parallel = by_machine(config, on_gpu=True).sequence_parallel
    yield (
        f"sequence parallel {_on(sequence_parallel)}, recompute {parallel.recompute}, distributed optimizer "
        f"{_on(parallel.use_distributed_optimizer)}, offload {', '.join(config.actor.offload) or 'nothing'}"
    )
    yield (
        f"algorithm: preset {algorithm.preset}; token filter "
        f"{algorithm.top_p_perception_tokens if algorithm.use_vppo_on_perception else 'off'}, advantage scale from "
        f"{algorithm.advantage_scaling_min if algorithm.use_advantage_shaping else 1}, entropy penalty "
        f"{algorithm.entropy_penalty_coef if algorithm.use_entropy_penalty else 'off'}, "
        + (f"perception loss {algorithm.perception_loss_coef:g}, " if algorithm.perception_loss_coef else "")
        + f"lr {optim.lr:g} "
        f"{optim.lr_scheduler_type}"
    )
    yield (
        f"lengths: prompt {data.max_prompt_length}, response {data.max_response_length}; longest micro-batch "
        f"{_packed(found)}"
    )


def _packed(found: DryRun) -> str:
    batch = found.stages[0].step.batch
    return f"{batch.tokens} packed tokens, {batch.image_tokens} of them of images (one a row)"


def _files(found: DryRun) -> Iterator[str]:
    for finding in (found.model.finding, *found.files.findings):
        yield f"{'ok     ' if finding.ok else 'warning'} {finding.text}"


def _step(found: DryRun) -> Iterator[str]:
    batches, config, engine = found.batches, found.config, found.engine
    yield (
        f"{batches.prompts} prompts x {config.rollout.n} responses = {batches.rows} rows, "
        f"{_count(batches.mini_batches, 'optimizer step')} of {config.actor.global_batch_size} prompts; "
        f"{_steps(found)}"
    )
    prompts = -(-batches.prompts // len(found.engines))
    at_once = by_machine(config, on_gpu=True).max_num_seqs
    yield (
        f"sampling: {_count(len(found.engines), 'engine')} with up to {prompts} prompts = {prompts * config.rollout.n} "
        f"responses each; at once {at_once} (rollout.max_num_seqs), of full length "
        f"{engine.sequences} (KV cache)"
    )
    yield f"scoring: {_share(batches.score)}"
    yield f"update: {_share(batches.update)}" + (
        f"; pipeline bubble {batches.bubble:.0%}" if config.parallel.pipeline_model_parallel_size > 1 else ""
    )


def _steps(found: DryRun) -> str:
    trainer, rows = found.config.trainer, found.files.train_rows
    if trainer.total_steps is not None:
        return f"{_count(trainer.total_steps, 'step')} in all"
    if rows is None:
        return f"{_count(trainer.total_epochs, 'pass', 'passes')} over the data"
    return f"at most {_count(trainer.total_epochs * (rows // found.batches.prompts), 'step')} in all"


def _share(share: RankShare) -> str:
    idle = f"; data-parallel {_numbers(share.idle)} without any" if share.idle else ""
    busy = "" if share.load == 1 else f", ranks compute {share.load:.0%} of the time"
    micro_batches = _count(share.micro_batches, "micro-batch", "micro-batches")
    return f"up to {share.rows} rows on a data-parallel rank = {micro_batches}{busy}{idle}"


def _engines(found: DryRun) -> Iterator[str]:
    for host in range(min(found.cluster.nodes, MOST_HOSTS)):
        mine = [(number, engine) for number, engine in enumerate(found.engines) if engine.host == host]
        yield f"host {host + 1}: {'; '.join(_engine(*each) for each in mine) or 'none'}"
    if found.cluster.nodes > MOST_HOSTS:
        yield f"and so on, on {found.cluster.nodes - MOST_HOSTS} more hosts"


def _engine(number: int, engine: EnginePlacement) -> str:
    gpus = engine.gpus.split(",")
    named = f"GPU {gpus[0]}" if len(gpus) == 1 else f"GPUs {gpus[0]}-{gpus[-1]}"
    return f"engine {number} by rank {engine.leader} on {named}"


# --- Memory -----------------------------------------------------------------------------------------------------------


def _memory(found: DryRun) -> Iterator[str]:
    """Yields two tables: each stage's state and micro-batch, and the fullest GPU of each phase."""
    ranks = found.cluster.ranks // len(found.stages)
    yield "Memory of a GPU in GiB, by pipeline stage"
    yield "  stage          layers  weights  grads  optim.  micro-batch   in flight"
    for stage in found.stages:
        first = stage.pipeline_rank * ranks
        kept = "+".join(_gib(kept) for kept in stage.step.kept)
        flight = "+".join(map(str, stage.in_flight))
        yield (
            f"  {stage.pipeline_rank + 1:<3}{_numbers(range(first, first + ranks)):12}"
            f"{'+'.join(map(str, stage.layers)):>6}{_gib(stage.state.weights):>9}{_gib(stage.state.gradients):>7}"
            f"{_gib(stage.state.optimizer):>8}{kept:>13}{flight:>12}"
        )
    yield ""
    yield "Memory of a GPU in GiB, on the fullest stage of each phase"
    yield "  phase         fullest  trainer  activ.  engine buffers  reserve    total"
    for phase in found.phases:
        too_much = "  over" if phase.total > found.cluster.gpu_bytes else ""
        yield (
            f"  {PHASE_NAMES[phase.phase]:14}{f'stage {phase.pipeline_rank + 1}':7}{_gib(phase.state):>9}"
            f"{_gib(phase.activations):>8}{_gib(phase.engine):>8}{_gib(phase.buffers):>8}{_gib(phase.reserve):>9}"
            f"{_gib(phase.total):>9}{too_much}"
        )
    yield ""


def _notes(found: DryRun, width: int) -> Iterator[str]:
    host, disk = found.host, found.disk
    lines = [
        "weights, gradients and optimizer are Megatron's own buffers. The micro-batch ran forward and backward without "
        "values; this is what it keeps in between, with attention and norms counted as CUDA's kernels keep them. One "
        "running layer, the vocabulary head and the reserves are estimates (docs/plan.md)",
        f"memory of a host: {host.total / GIB:.0f} GiB: {host.offloaded / GIB:.0f} of offloaded state, "
        f"{host.reference / GIB:.0f} of a reference model, {host.engine_weights / GIB:.0f} of engines' weights during "
        f"a checkpoint, {host.buffers / GIB:.0f} of transfer buffers; processes, images, responses and the page cache "
        "come on top",
        f"disk: a checkpoint takes {disk.checkpoint / GIB:.0f} GiB, {_checkpoints(found)}, the exported model "
        f"{disk.export / GIB:.0f}; {disk.free / GIB:.0f} are free in trainer.runs_dir "
        f"({found.config.trainer.runs_dir})",
    ]
    yield from _block("Notes", lines, width)


def _checkpoints(found: DryRun) -> str:
    if found.config.trainer.save_limit < 0:
        return "and all are kept (trainer.save_limit=-1)"
    return f"up to {found.disk.at_once} at once"


def _excess(found: DryRun) -> str:
    gpu_bytes = found.cluster.gpu_bytes
    over = [phase for phase in found.phases if phase.total > gpu_bytes]
    return "; ".join(
        f"{PHASE_NAMES[phase.phase]} needs {_gib(phase.total)} of {gpu_bytes / GIB:g} GiB on stage "
        f"{phase.pipeline_rank + 1}"
        for phase in over
    )


# --- Words and numbers ------------------------------------------------------------------------------------------------


def _filled(text: str, width: int) -> str:
    """Wraps a line; an empty one before it stays."""
    lead = "\n" if text.startswith("\n") else ""
    return lead + textwrap.fill(text.strip(), width=width, subsequent_indent="  ", break_long_words=False)


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def _numbers(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"


def _on(value: bool) -> str:
    return "on" if value else "off"


def _gib(number: float) -> str:
    return f"{number / GIB:.2f}"
