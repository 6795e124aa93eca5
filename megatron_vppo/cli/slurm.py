"""`vppo slurm`: the settings of a run and the size of a job in, a batch script out, and into the queue if asked."""

from __future__ import annotations

import argparse
import os
import sys
import typing
from pathlib import Path

from megatron_vppo.cli.arguments import positive
from megatron_vppo.cli.output import say
from megatron_vppo.config.checks import check_layout, check_training
from megatron_vppo.config.load import load_config
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.launching.sbatch import (
    LONGEST_GRACE,
    SEED_SUFFIX,
    BatchJob,
    Container,
    ContainerRuntime,
    script_of,
)
from megatron_vppo.launching.submit import check_syntax, has_slurm, send_script, try_script, write_script
from megatron_vppo.setup.run_folder import RunFolder


def add_slurm_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options, except for those of the settings."""
    fields = BatchJob.__dataclass_fields__
    parser.add_argument("--nodes", required=True, type=positive, metavar="N", help="nodes of the job")
    parser.add_argument("--gpus-per-node", required=True, type=positive, metavar="N", help="GPUs, and tasks, per node")
    parser.add_argument(
        "--time", required=True, metavar="LIMIT", help="time limit, such as 24:00:00 or 2-12 (days-hours)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the script to write (default: here, named like the settings)",
    )
    parser.add_argument("--submit", action="store_true", help="send the job, too")
    parser.add_argument("--job-name", metavar="NAME", help="name of the job (default: trainer.experiment_name)")
    parser.add_argument("--partition", metavar="NAME", help="partition of the job (default: the site's)")
    parser.add_argument("--account", metavar="NAME", help="account that the job is charged to (default: yours)")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="another option of sbatch, in one word with an equals sign: --sbatch=--qos=high; repeat it for several",
    )
    parser.add_argument(
        "--array-seeds", metavar="SEEDS", help="a job array with one run per seed, each in a folder of its own: 1-3"
    )
    parser.add_argument("--container", metavar="IMAGE", help="image that the ranks run in")
    parser.add_argument(
        "--container-runtime",
        choices=typing.get_args(ContainerRuntime),
        help="program that starts the container (default: pyxis)",
    )
    parser.add_argument(
        "--container-mounts", metavar="FROM:TO,...", help="folders for the container, besides that of the job"
    )
    parser.add_argument(
        "--environment",
        metavar="FOLDER",
        help="virtual environment with vppo on the nodes (default: the one of this command; none for a container)",
    )
    for flag, text in (
        ("--max-restarts", "times that the job goes back into the queue at most"),
        ("--grace-seconds", "time before the limit at which the run is asked to save and stop"),
    ):
        default = fields[flag.removeprefix("--").replace("-", "_")].default
        parser.add_argument(flag, type=positive, default=default, metavar="N", help=f"{text} (default: %(default)s)")


def run_slurm(options: argparse.Namespace) -> int:
    """Writes the script, has it looked at and sends it, as far as asked. Returns 1 if SLURM would not take it.

    Raises:
        ValueError: settings that do not load or do not fit the job, or an option that cannot be.
    """
    config = load_config(options.config, options.overrides)
    check_training(config)
    data = check_layout(config, options.nodes * options.gpus_per_node)
    _check_engines(config, gpus_per_node=options.gpus_per_node)
    if options.array_seeds is not None:
        _check_name_with_seed(options, config)
    job = _job_of(options, config)
    path = options.output or Path(f"{options.config.stem}.sbatch")
    text = script_of(job)
    check_syntax(text)
    write_script(path, text)
    parallel = config.parallel
    gpus = "1 GPU" if job.gpus_per_node == 1 else f"{job.gpus_per_node} GPUs"
    say(
        f"{path}: {job.nodes} x {gpus}; tensor {parallel.tensor_model_parallel_size} x context "
        f"{parallel.context_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} x data {data}"
    )
    if config.trainer.save_limit == 1:
        say("note: trainer.save_limit=1 leaves no older checkpoint if the newest is damaged; 2 keeps one more")
    runs_dir = Path(config.trainer.runs_dir).resolve()
    if job.container is not None and not _is_seen(job.container, runs_dir):
        say(
            f"note: if the image does not see {runs_dir} (trainer.runs_dir), checkpoints are lost with the container; "
            f"--container-mounts {runs_dir}:{runs_dir} shows it"
        )
    if not has_slurm():
        say("no sbatch on this machine, so SLURM has not looked at it")
        return 1 if options.submit else 0
    taken, answer = send_script(path) if options.submit else try_script(path)
    say(answer)
    if taken and not options.submit:
        say(f"send it: sbatch {path}")
    return 0 if taken else 1


def _job_of(options: argparse.Namespace, config: RunConfig) -> BatchJob:
    container = None
    if options.container is not None:
        if not options.container:
            raise ValueError("--container is empty; name an image")
        if options.environment is not None:
            raise ValueError("--environment is for ranks outside of a container, and vppo has to be in the image")
        container = Container(options.container_runtime or "pyxis", options.container, options.container_mounts)
    elif options.container_runtime is not None or options.container_mounts is not None:
        raise ValueError("--container-runtime and --container-mounts are for a container; set --container to its image")
    if options.grace_seconds > LONGEST_GRACE:
        raise ValueError(f"--grace-seconds {options.grace_seconds}: sbatch takes at most {LONGEST_GRACE}")
    return BatchJob(
        command=("vppo", *(word for word in options.words if word != "--submit")),
        job_name=options.job_name or config.trainer.experiment_name,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        time=options.time,
        config=str(options.config),
        overrides=tuple(options.overrides),
        run_folder=RunFolder.of(config.trainer).root,
        environment=options.environment or _own_environment(),
        partition=options.partition,
        account=options.account,
        options=tuple(options.sbatch),
        seeds=options.array_seeds,
        container=container,
        max_restarts=options.max_restarts,
        grace_seconds=options.grace_seconds,
    )


def _check_engines(config: RunConfig, *, gpus_per_node: int) -> None:
    """Refuses an engine that would not lie within one node."""
    size = config.rollout.tensor_parallel_size
    if size > gpus_per_node:
        raise ValueError(
            f"rollout.tensor_parallel_size {size}: an engine lies within one node, and --gpus-per-node is "
            f"{gpus_per_node}; lower the former"
        )


def _check_name_with_seed(options: argparse.Namespace, config: RunConfig) -> None:
    """Refuses a name of the run that the settings of a task, `key=value` with its seed, would not give back."""
    name = f"{config.trainer.experiment_name}{SEED_SUFFIX}1"
    again = load_config(options.config, [*options.overrides, f"trainer.experiment_name={name}"])
    if again.trainer.experiment_name != name:
        raise ValueError(
            f"--array-seeds: trainer.experiment_name={name} reads as '{again.trainer.experiment_name}'; take a name of "
            "letters, digits, '-' and '_'"
        )


def _is_seen(container: Container, folder: Path) -> bool:
    """Returns True if a folder is surely there in the container: on a mount, or with apptainer in the home folder."""
    inside = [Path.cwd()] if container.runtime == "pyxis" else [Path.cwd(), Path.home()]
    for mount in (container.mounts or "").split(","):
        outside, _, rest = mount.partition(":")
        if target := rest.partition(":")[0] or outside:
            inside.append(Path(target))
    return any(folder.is_relative_to(each) for each in inside)


def _own_environment() -> str | None:
    """Returns the folder of the environment that this command runs in, from here if it lies below.

    None for the system's own, which is in PATH everywhere.
    """
    if sys.prefix in ("/usr", "/usr/local"):
        return None
    here = os.path.relpath(sys.prefix)
    return sys.prefix if here.startswith("..") else here
