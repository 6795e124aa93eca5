"""`vppo train --dry-run`: a run on a cluster, checked on a machine without GPUs before any is asked for.

Everything that can be known without values is computed by the run's own code, in a world of fake ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vppo.config.checks import check_layout
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.launching.batches import Batches, divide_step
from megatron_vppo.launching.files import SeenFiles, SeenModel, see_files, see_model
from megatron_vppo.launching.longest_rows import longest_responses, shortest_responses
from megatron_vppo.launching.phases import (
    EngineBytes,
    HostBytes,
    PhaseBytes,
    engine_bytes,
    fullest_host,
    fullest_phases,
)
from megatron_vppo.launching.process_groups import check_memberships, crosses_hosts, memberships
from megatron_vppo.launching.stage_memory import StageReport, larger, report_stage
from megatron_vppo.models.families import family_of, weight_map
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.models.options import Backend, ModelOptions
from megatron_vppo.planning.candidate import GIB
from megatron_vppo.setup.disk_space import bytes_of_values, existing_folder
from megatron_vppo.setup.engine_limits import DTYPE_BYTES
from megatron_vppo.setup.hardware import Gpu, fp8_options, options_with
from megatron_vppo.setup.places import Place, engine_devices
from megatron_vppo.setup.preflight import check_world
from megatron_vppo.setup.resume import check_resume
from megatron_vppo.setup.world import engine_seats
from megatron_vppo.weights.entries import parameter_count

HOPPER = (9, 0)
"""The compute capability that is assumed: no machine can be asked."""
LEAST_LOAD, MOST_BUBBLE = 0.9, 0.15
"""The share of an update in which ranks compute, and that in which stages wait, from which on there is a warning."""
MOST_RANKS = 128
"""The most ranks whose groups are all joined. Each takes longer, the more there are: 0.2 s of 512."""


@dataclass(frozen=True)
class RunCluster:
    """The machines that a run is to have: as many trainer ranks as GPUs."""

    nodes: int
    gpus_per_node: int
    gpu_bytes: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class EnginePlacement:
    """One rollout engine."""

    host: int
    leader: int
    """The rank that leads it."""
    gpus: str
    """The numbers of its GPUs on its host, as in CUDA_VISIBLE_DEVICES."""


@dataclass(frozen=True)
class Disk:
    """The space that checkpoints take."""

    checkpoint: int
    """The bytes of one checkpoint."""
    at_once: int
    """The most checkpoints that exist at once: one is written before an old one is deleted."""
    export: int
    """The bytes of the trained model as a Hugging Face folder; 0: none is written."""
    folder: Path
    """The nearest folder that exists: that of the runs, or one above it."""
    free: int

    @property
    def needed(self) -> int:
        return self.checkpoint * self.at_once + self.export


@dataclass(frozen=True)
class DryRun:
    """Everything that is known of a run before it starts."""

    config: RunConfig
    cluster: RunCluster
    model: SeenModel
    parameters: int
    files: SeenFiles
    data_ranks: int
    joined: int
    """The ranks whose groups were joined and compared."""
    batches: Batches
    engines: tuple[EnginePlacement, ...]
    engine: EngineBytes
    stages: tuple[StageReport, ...]
    phases: tuple[PhaseBytes, ...]
    host: HostBytes
    disk: Disk
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """True if every phase fits the memory of a GPU."""
        return all(phase.total <= self.cluster.gpu_bytes for phase in self.phases)


def dry_run(config: RunConfig, cluster: RunCluster) -> DryRun:
    """Checks a run from top to bottom, without GPUs, weights or network.

    Raises:
        ValueError: settings that cannot work on this cluster, or a file that is here and damaged. The message has the
            numbers and what to set.
    """
    world = cluster.ranks
    data = check_layout(config, world)
    model = see_model(config.model.path)
    hf_config = model.hf_config
    gpu = Gpu(capability=HOPPER, memory_bytes=cluster.gpu_bytes)
    check_world(config, hf_config, world_size=world, gpu=gpu, options_of=assumed_options)
    engines = place_engines(config, cluster)
    check_resume(config.trainer)
    files = see_files(config)
    batches = divide_step(config, data=data)

    joined = memberships(config.parallel, world_size=world) if world <= MOST_RANKS else []
    check_memberships(joined)
    stages = report_stages(config, hf_config, batches, world_size=world)

    entries = weight_map(hf_config, family=family_of(hf_config))
    parameters = parameter_count(entries)
    engine = engine_bytes(config, hf_config, parameters=parameters, gpu_bytes=cluster.gpu_bytes)
    pipeline = config.parallel.pipeline_model_parallel_size
    trained = [entry for entry in entries if entry.part not in config.model.freeze]
    found = DryRun(
        config=config,
        cluster=cluster,
        model=model,
        parameters=parameters,
        files=files,
        data_ranks=data,
        joined=len(joined),
        batches=batches,
        engines=engines,
        engine=engine,
        stages=stages,
        phases=fullest_phases(config, stages, engine),
        host=fullest_host(
            config,
            stages,
            engine,
            stage_of_rank=[rank * pipeline // world for rank in range(world)],
            engines_of_host=[sum(place.host == host for place in engines) for host in range(cluster.nodes)],
            ranks_per_host=cluster.gpus_per_node,
        ),
        disk=disk_space(config, parameters=parameters, trained=parameter_count(trained)),
        warnings=(),
    )
    crossing = bool(joined) and crosses_hosts(joined, axis="tensor", ranks_per_host=cluster.gpus_per_node)
    return dataclasses.replace(found, warnings=tuple(_warnings(found, tensor_crosses_hosts=crossing)))


def assumed_options(config: RunConfig) -> ModelOptions:
    """Collects the options by which GPUs of this cluster build the model.

    TransformerEngine's layers are assumed where settings ask for them; whether it is installed, only a node can say.
    Raises ValueError for a float32 model of such layers.
    """
    fp8 = fp8_options(config)
    backend: Backend = "te" if fp8 is not None or config.model.backend == "te" else "torch"
    if backend == "te" and config.model.dtype != "bfloat16":
        asked = "model.backend=te" if fp8 is None else f"fp8.recipe={fp8.recipe}"
        raise ValueError(f"{asked} goes with model.dtype=bfloat16, not {config.model.dtype}; change one of the two")
    return options_with(config, backend=backend, on_gpu=True)


def report_stages(
    config: RunConfig, hf_config: HfConfig, batches: Batches, *, world_size: int
) -> tuple[StageReport, ...]:
    """Builds the first rank of every pipeline stage, with layers in plain torch, and runs its largest micro-batch.

    A micro-batch that is filled by tokens has the most tokens of responses if these are long, and the most images if
    they are short. Both are run, and each stage has the larger numbers.
    """
    plain = dataclasses.replace(assumed_options(config), backend="torch", fp8=None)
    pipeline = config.parallel.pipeline_model_parallel_size
    kinds = [longest_responses(config, hf_config)]
    if config.actor.max_tokens_per_micro_batch is not None:
        kinds.append(shortest_responses(config, hf_config))
    report = functools.partial(report_stage, config, hf_config, plain, batches=batches, world_size=world_size)
    return tuple(
        functools.reduce(larger, (report(responses, rank=stage * world_size // pipeline) for responses in kinds))
        for stage in range(pipeline)
    )


def place_engines(config: RunConfig, cluster: RunCluster) -> tuple[EnginePlacement, ...]:
    """Returns the engines, in the order of their numbers. Raises ValueError if one would not fit its host."""
    places = [_place(*divmod(rank, cluster.gpus_per_node), cluster) for rank in range(cluster.ranks)]
    return tuple(
        EnginePlacement(seat.leader // cluster.gpus_per_node, seat.leader, engine_devices(places, seat))
        for seat in engine_seats(config, places)
    )


def _place(host: int, local_rank: int, cluster: RunCluster) -> Place:
    """Returns the place of a rank that is shown all GPUs of its host."""
    ids = tuple(str(number) for number in range(cluster.gpus_per_node))
    return Place(
        host=f"host {host}",
        local_rank=local_rank,
        gpu_ids=ids,
        uuids=tuple(f"{host}/{gpu}" for gpu in ids),
        cores=(0,),
        host_cores=1,
        allotted_gpus=cluster.gpus_per_node,
    )


def disk_space(config: RunConfig, *, parameters: int, trained: int) -> Disk:
    """Counts what checkpoints take, and asks the file system of the run folder what is free."""
    best = config.data.val_files is not None  # it stays besides the newest ones
    folder = existing_folder(config)
    return Disk(
        checkpoint=bytes_of_values(config, values=parameters, trained=trained),
        at_once=max(1, config.trainer.save_limit) + (config.trainer.save_freq > 0) + best,
        export=parameters * DTYPE_BYTES[config.model.dtype] if config.trainer.save_hf else 0,
        folder=folder,
        free=shutil.disk_usage(folder).free,
    )


def _warnings(found: DryRun, *, tensor_crosses_hosts: bool) -> Iterator[str]:
    """Yields what is possible and probably not meant."""
    config, batches, cluster = found.config, found.batches, found.cluster
    update, data, disk = batches.update, found.data_ranks, found.disk
    if update.idle:
        yield (
            f"{len(update.idle)} of {data} data-parallel ranks are idle in every update, {_listed(update.idle)}: "
            f"actor.global_batch_size is {config.actor.global_batch_size} prompts, and whole groups go to a rank; "
            f"raise it to {data} or a multiple"
        )
    elif update.load < LEAST_LOAD:
        yield (
            f"data-parallel ranks compute {update.load:.0%} of an update: {config.actor.global_batch_size} prompts "
            f"(actor.global_batch_size) do not divide over {data} of them; a multiple of {data} would"
        )
    if batches.bubble > MOST_BUBBLE:
        yield (
            f"pipeline stages wait {batches.bubble:.0%} of an update: a rank has {update.micro_batches} micro-batches; "
            "lower actor.micro_batch_size_per_device_for_update, or the pipeline or data-parallel size"
        )
    if tensor_crosses_hosts:
        yield (
            f"tensor-parallel groups of {config.parallel.tensor_model_parallel_size} reach over hosts of "
            f"{cluster.gpus_per_node} GPUs, and exchange hidden states in every layer; take a divisor of "
            f"{cluster.gpus_per_node}"
        )
    unused = cluster.ranks - len(found.engines) * config.rollout.tensor_parallel_size
    if unused:
        yield f"{unused} of {cluster.ranks} GPUs have no engine and wait while the others sample"
    if disk.needed > disk.free:
        yield (
            f"trainer.runs_dir ({config.trainer.runs_dir}) has {disk.free / GIB:.0f} GiB free, and checkpoints and "
            f"export take up to {disk.needed / GIB:.0f}; lower trainer.save_limit, or set another trainer.runs_dir"
        )
    if assumed_options(config).backend == "te":
        yield (
            "layers were counted in plain torch and bfloat16: TransformerEngine's keep other things, FP8 copies of "
            "weights come on top, and whether it is installed, only a node can say"
        )
    if not found.joined:
        yield f"the groups of {cluster.ranks} ranks were not compared, only those of one rank per stage were joined"


def _listed(numbers: Sequence[int]) -> str:
    """Returns numbers that follow one another as "4-7", and a single one as it is."""
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def header_lines(nodes: int, gpus_per_node: int) -> tuple[str, ...]:
    """Returns the lines of a batch script that ask for these nodes: one task per GPU, whole nodes."""
    return (
        f"#SBATCH --nodes={nodes}",
        f"#SBATCH --ntasks-per-node={gpus_per_node}",
        f"#SBATCH --gpus-per-node={gpus_per_node}",
        "#SBATCH --exclusive",
        "#SBATCH --mem=0",
    )
