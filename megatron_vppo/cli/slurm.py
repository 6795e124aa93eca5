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
    ArrayTask,
    BatchJob,
    Container,
    ContainerRuntime,
    script_of,
)
from megatron_vppo.launching.submit import check_syntax, has_slurm, send_script, try_script
from megatron_vppo.setup.run_folder import RunFolder
from megatron_vppo.sweep.plan import Sweep, SweepRun, plan_sweep
from megatron_vppo.sweep.status import check_settings, status_of
from megatron_vppo.sweep.sweep_file import read_sweep_file
from megatron_vppo.system.whole import write_new_text


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
    sweep = None if options.sweep is None else _plan_sweep(options)
    configs = [load_config(options.config, options.overrides)] if sweep is None else [run.config for run in sweep.runs]
    layouts = dict.fromkeys(_layout_of(config, options) for config in configs)
    config = configs[0]
    if options.array_seeds is not None:
        _check_name_with_seed(options, config)
    array = None if sweep is None else _unfinished(sweep)
    job = _job_of(options, config, sweep)
    path = options.output or Path(f"{(options.sweep or options.config).stem}.sbatch")
    text = script_of(job)
    check_syntax(text)
    write_new_text(path, text, option="--output")
    gpus = "1 GPU" if job.gpus_per_node == 1 else f"{job.gpus_per_node} GPUs"
    runs = "" if sweep is None else f"{len(sweep.runs)} runs, each on "
    say(f"{path}: {runs}{job.nodes} x {gpus}; {', or '.join(layouts)}")
    if config.trainer.save_limit == 1:
        say("note: trainer.save_limit=1 leaves no older checkpoint if the newest is damaged; 2 keeps one more")
    runs_dir = Path(config.trainer.runs_dir).resolve()
    if job.container is not None and not _is_seen(job.container, runs_dir):
        say(
            f"note: if the image does not see {runs_dir} (trainer.runs_dir), checkpoints are lost with the container; "
            f"--container-mounts {runs_dir}:{runs_dir} shows it"
        )
    if array == "":
        say("all of its runs are finished")
        return 0
    if not has_slurm():
        say("no sbatch on this machine, so SLURM has not looked at it")
        return 1 if options.submit else 0
    taken, answer = send_script(path, array=array) if options.submit else try_script(path)
    say(answer)
    if taken and not options.submit:
        say(f"send it: sbatch {'' if array is None else f'--array={array} '}{path}")
    return 0 if taken else 1


def _layout_of(config: RunConfig, options: argparse.Namespace) -> str:
    """Checks settings against the size of the job. Returns the layout, for the user."""
    check_training(config)
    data = check_layout(config, options.nodes * options.gpus_per_node)
    _check_engines(config, gpus_per_node=options.gpus_per_node)
    parallel = config.parallel
    return (
        f"tensor {parallel.tensor_model_parallel_size} x context {parallel.context_parallel_size} x pipeline "
        f"{parallel.pipeline_model_parallel_size} x data {data}"
    )


def _plan_sweep(options: argparse.Namespace) -> Sweep:
    if options.array_seeds is not None:
        raise ValueError("--array-seeds is for one configuration; a sweep file has the seeds of --sweep")
    return plan_sweep(read_sweep_file(options.sweep), options.overrides)


def _unfinished(sweep: Sweep) -> str:
    """Returns the numbers of the tasks whose runs are not finished, as sbatch takes them; '' if all are."""
    states = {run.name: status_of(run) for run in sweep.runs}
    check_settings(sweep.runs, states)
    numbers = (number for number, run in enumerate(sweep.runs, start=1) if states[run.name].state != "finished")
    return ",".join(map(str, numbers))


def _job_of(options: argparse.Namespace, config: RunConfig, sweep: Sweep | None) -> BatchJob:
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
        job_name=options.job_name or (config.trainer.experiment_name if sweep is None else sweep.name),
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        time=options.time,
        config="" if sweep is not None else str(options.config),
        overrides=() if sweep is not None else tuple(options.overrides),
        run_folder=RunFolder.of(config.trainer).root if sweep is None else sweep.folder,
        environment=options.environment or _own_environment(),
        partition=options.partition,
        account=options.account,
        options=tuple(options.sbatch),
        seeds=options.array_seeds,
        tasks=() if sweep is None else tuple(map(_task_of, sweep.runs)),
        container=container,
        max_restarts=options.max_restarts,
        grace_seconds=options.grace_seconds,
    )


def _task_of(run: SweepRun) -> ArrayTask:
    return ArrayTask(run.name, str(run.config_file), run.overrides)


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
