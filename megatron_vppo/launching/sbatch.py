"""The batch script of a run: plain bash that srun starts one task per GPU from, and that people keep and edit.

What the script decides, and nothing else does:

- Signals. SLURM tells the script, shortly before the time limit or because somebody asked, and the script tells the
  ranks, which write a checkpoint and end. A signal interrupts bash's `wait`, so it waits until srun has really gone.
- Requeueing. Everything but success, a user's mistake and a file `do_not_requeue` in the run folder is tried again, up
  to a number of restarts. `scontrol requeue` would also revive a job that its user has just cancelled, so the script
  looks first.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from megatron_vppo.launching.sbatch_checks import check_options, check_seeds

ContainerRuntime = Literal["pyxis", "apptainer"]
"""The programs that start a container under srun."""
NO_RESTART = (2, 93, 126, 127)
"""Exit statuses that a restart cannot cure: a mistake on the command line, one that a rank found, no program to run."""
SEED_SUFFIX = "_seed"
"""The text between a run's name and its seed, in the name of a run of `--array-seeds`."""
LONGEST_GRACE = 65535
"""Seconds: the most that sbatch takes for --signal."""
RULE_COLUMNS = 100


@dataclass(frozen=True)
class Container:
    """The image that the ranks run in. The folder of the job is mounted and is where they start."""

    runtime: ContainerRuntime
    image: str
    mounts: str | None = None
    """Further mounts, `from:to` with commas between; None: no others."""


@dataclass(frozen=True)
class ArrayTask:
    """A run of a job array whose runs have settings of their own."""

    name: str
    """trainer.experiment_name, of letters, digits and '_', '-', '.', '+'."""
    config: str
    overrides: tuple[str, ...]
    """Its name and project among them."""


@dataclass(frozen=True)
class BatchJob:
    """A run as a job: everything that its script says."""

    command: tuple[str, ...]
    """The command that wrote the script, for its head."""
    job_name: str
    nodes: int
    gpus_per_node: int
    time: str
    """The time limit as SLURM writes it, such as 24:00:00 or 2-12."""
    config: str
    """The YAML file, from the folder in which the job is submitted; '' if each task has its own."""
    overrides: tuple[str, ...]
    """Settings that replace those of the file, `key=value`."""
    run_folder: PurePath
    """runs_dir/project_name/experiment_name; without the last part if there are tasks."""
    environment: str | None = None
    """The folder of a virtual environment with vppo, from the same folder; None: vppo is in PATH."""
    partition: str | None = None
    account: str | None = None
    options: tuple[str, ...] = ()
    """Further options of sbatch, each a `#SBATCH` line of its own. They come last, so they win."""
    seeds: str | None = None
    """The seeds of a job array, such as 1-3 or 1,5,9; None: one run with the seed of its settings."""
    tasks: tuple[ArrayTask, ...] = ()
    """The runs of a job array, numbered from 1; (): `config` and `overrides` are all."""
    container: Container | None = None
    max_restarts: int = 50
    grace_seconds: int = 600
    """The time before the limit at which the ranks are asked to save and stop."""

    def __post_init__(self) -> None:
        texts = [*self.command, self.job_name, self.config, *self.overrides, str(self.run_folder), *self.options]
        texts += [text for task in self.tasks for text in (task.config, *task.overrides)]
        if broken := [text for text in texts if not text.isprintable()]:
            raise ValueError(f"{broken[0]!r} would not be one line of a batch script; write it without line ends")
        check_options(self.options)
        if self.seeds is not None:
            check_seeds(self.seeds, self.overrides)
        limit = seconds_of(self.time)
        if limit is not None and limit <= self.grace_seconds:
            raise ValueError(
                f"--time {self.time} is {limit} s, and the run would be asked to stop {self.grace_seconds} s before "
                "its end, which is at once; raise --time, or lower --grace-seconds"
            )

    @property
    def array(self) -> str | None:
        """The numbers of the array's tasks; None: it is no array."""
        return f"1-{len(self.tasks)}" if self.tasks else self.seeds


def seconds_of(time: str) -> int | None:
    """Returns a time limit of SLURM's in seconds; None for none at all (UNLIMITED).

    Raises:
        ValueError: sbatch would not take it.
    """
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time, flags=re.ASCII)
    if not found or not any(int(part or 0) for part in found.groups()):
        raise ValueError(
            f"--time '{time}' is no time limit; write hours:minutes:seconds (24:00:00), or days-hours (2-12)"
        )
    days, *rest = found.groups()
    first, second, third = (int(part or 0) for part in rest)
    if days is not None:  # days-hours[:minutes[:seconds]]
        return ((int(days) * 24 + first) * 60 + second) * 60 + third
    if found[4] is not None:  # hours:minutes:seconds
        return (first * 60 + second) * 60 + third
    return first * 60 + second  # minutes[:seconds]


def script_of(job: BatchJob) -> str:
    """Returns the batch script of a job."""
    return "\n\n".join([_head(job), _options(job), _names(job), _site(job), _run(job), _restart(job)]) + "\n"


# --- The parts of the script, from top to bottom ----------------------------------------------------------------------


def _head(job: BatchJob) -> str:
    nodes = "1 node" if job.nodes == 1 else f"{job.nodes} nodes"
    gpus = "1 GPU" if job.gpus_per_node == 1 else f"{job.gpus_per_node} GPUs"
    return f"""\
#!/bin/bash
# Trains {job.run_folder} on {nodes} of {gpus}, one task per GPU. Edit it as you like;
# docs/slurm.md explains it. Send it from the folder in which it was written: its paths begin there.
# Written by: {shlex.join(job.command)}"""


def _options(job: BatchJob) -> str:
    named = {"--array": job.array, "--partition": job.partition, "--account": job.account}
    own = [f"{option}={shlex.quote(value)}" for option, value in named.items() if value is not None]
    further = "".join(f"\n#SBATCH {option}" for option in [*own, *job.options])
    return f"""\
#SBATCH --job-name={shlex.quote(job.job_name)}
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks-per-node={job.gpus_per_node}
#SBATCH --gpus-per-node={job.gpus_per_node}
# Whole nodes: all of their cores, and all of their memory.
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time={job.time}
# {job.grace_seconds} s before that, this script gets a signal, and asks the ranks to save and stop.
#SBATCH --signal=B:USR2@{job.grace_seconds}
# Back into the queue, by the end of this script, and by SLURM when a node fails; on in the same log.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={"%x-%j" if job.array is None else "%x-%A_%a"}.out{further}"""


_ONE_OF_ARRAY = "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # SLURM_JOB_ID of one task stands for all of them\n"


def _names(job: BatchJob) -> str:
    if job.tasks:
        run = (
            f"{_cases(job.tasks)}\n"
            f"run_folder={shlex.quote(str(job.run_folder))}/$name # in trainer.runs_dir/project_name\n{_ONE_OF_ARRAY}"
        )
    elif job.seeds is not None:
        run = (
            f"config={shlex.quote(job.config)}\n"
            f"name={shlex.quote(job.run_folder.name)}{SEED_SUFFIX}$SLURM_ARRAY_TASK_ID # trainer.experiment_name\n"
            f"run_folder={shlex.quote(str(job.run_folder.parent))}/$name # in trainer.runs_dir/project_name\n"
            f"{_ONE_OF_ARRAY}"
        )
    else:
        run = (
            f"config={shlex.quote(job.config)}\n"
            f"run_folder={shlex.quote(str(job.run_folder))} # trainer.runs_dir/project_name/experiment_name\n"
            "job=$SLURM_JOB_ID\n"
        )
    return f"{run}max_restarts={job.max_restarts}"


def _cases(tasks: Sequence[ArrayTask]) -> str:
    """Returns bash that sets the name, the file and the settings of the run that this task of the array is."""
    cases = [
        f"{number}) name={task.name} config={shlex.quote(task.config)}\n   settings=({shlex.join(task.overrides)}) ;;"
        for number, task in enumerate(tasks, start=1)
    ]
    none = '*) echo "this script has no run $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;'
    about = "# The run of each task of the array: trainer.experiment_name, its file and its settings."
    return "\n".join([about, "case $SLURM_ARRAY_TASK_ID in", *cases, none, "esac"])


_HUB = "# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1 # if nodes reach no hub: fill the cache before\n"
_CONFIG_IS_HERE = """
if [ ! -f "$config" ]; then
    echo "no file $config in $PWD; send this script from the folder in which it was written" >&2
    exit 2
fi"""
_VPPO_IS_HERE = """
if ! command -v vppo >/dev/null; then
    echo "$(hostname) has no vppo; set PATH above to where it is on every node" >&2
    exit 2
fi"""


def _site(job: BatchJob) -> str:
    path, needed = "", _CONFIG_IS_HERE
    if job.container is None:
        needed += _VPPO_IS_HERE
        if job.environment is not None:
            inside = "" if job.environment.startswith("/") else '"$PWD"/'
            path = f"export PATH={inside}{shlex.quote(job.environment)}/bin:$PATH\n"
    return _rule("Your site: modules, caches, variables") + "\n" + path + _HUB + needed


_START = """
# A signal goes on to the ranks: they write a checkpoint and end; asked twice, they end at once.
# (It does nothing if the job was cancelled or is out of time: then SLURM has told the ranks itself.)
trap 'scancel --quiet --signal=USR2 "$job"' USR2 TERM

mkdir -p "$run_folder"
export VPPO_DO_NOT_REQUEUE=$(realpath "$run_folder")/do_not_requeue # where ranks say why not to start again
rm -f "$VPPO_DO_NOT_REQUEUE"                                        # what the last attempt said
# The ranks begin no step that would not end before the job does. In a container they could not ask for it.
export SLURM_JOB_END_TIME=$(squeue --noheader --job="$job" --format=%e | date --file=- +%s 2>/dev/null)
# One task per GPU, with its share of the cores. If one fails, all end.
srun --kill-on-bad-exit=1 --distribution=block \\
    --cpus-per-task="$((SLURM_CPUS_ON_NODE / ${SLURM_NTASKS_PER_NODE:-1}))" \\
"""
_WAIT_FOR_IT = """
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal interrupts `wait`
wait "$step"
status=$?
trap - USR2 TERM"""


def _run(job: BatchJob) -> str:
    lines = [*_container_lines(job.container), 'vppo train --config "$config"', *map(shlex.quote, job.overrides)]
    if job.tasks:
        lines.append('"${settings[@]}"')
    if job.seeds is not None:
        lines += ['trainer.seed="$SLURM_ARRAY_TASK_ID"', 'trainer.experiment_name="$name"']
    return _rule("The run") + _START + " \\\n".join(f"    {line}" for line in lines) + " &" + _WAIT_FOR_IT


def _container_lines(container: Container | None) -> Iterator[str]:
    """Yields what stands between srun's options and vppo."""
    if container is None:
        return
    image = shlex.quote(container.image)
    further = "" if container.mounts is None else f",{shlex.quote(container.mounts)}"
    if container.runtime == "pyxis":
        yield f"--container-image={image} --no-container-mount-home"
        yield f'--container-mounts="$PWD:$PWD"{further} --container-workdir="$PWD"'
    else:
        yield f'apptainer exec --nv --bind "$PWD"{further} --pwd "$PWD" {image}'


def _restart(_job: BatchJob) -> str:
    return f"""\
{_rule("Again?")}
if [ "$status" = 0 ]; then
    exit 0
fi
ls "$run_folder" >/dev/null # a network file system may remember that a file was not there
if [ -e "$VPPO_DO_NOT_REQUEUE" ]; then # the ranks say why; or you made it, before you asked to stop
    echo "not started again: $(cat "$VPPO_DO_NOT_REQUEUE")" >&2
    exit 93
fi
case $status in
{" | ".join(map(str, NO_RESTART))}) # a mistake, or no program: a restart cures neither
    echo "not started again: status $status" >&2
    exit "$status" ;;
esac
# `scontrol requeue` would revive a job that its user has just cancelled. One out of time may go on.
case $(squeue --noheader --job="$job" --format="%T %r") in
"COMPLETING TimeLimit") ;;
COMPLETING*)
    echo "not started again: cancelled" >&2
    exit "$status" ;;
esac
restarts=${{SLURM_RESTART_COUNT:-0}}
if [ "$restarts" -ge "$max_restarts" ]; then
    echo "not started again: it has been $restarts times, and max_restarts is $max_restarts" >&2
    exit "$status"
fi
echo "status $status: back into the queue, restart $((restarts + 1)) of at most $max_restarts"
for pause in 0 10 30 60; do # the controller may be down at this moment
    sleep "$pause"
    scontrol requeue "$job" && break
done
exit "$status\""""


def _rule(title: str) -> str:
    return f"# --- {title} ".ljust(RULE_COLUMNS, "-")
