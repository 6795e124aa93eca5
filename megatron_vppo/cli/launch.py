"""From one command to a process per trainer rank. Ranks that `srun` has started get their numbers here."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_vppo.cli.output import flush_output
from megatron_vppo.system.attempt import ATTEMPT_VARIABLE, link_latest, make_attempt_folder
from megatron_vppo.system.network import is_loopback, is_own, resolve
from megatron_vppo.system.processes import die_with_parent
from megatron_vppo.system.slurm import SlurmTask, idle_hosts, job_id, read_task, whole_number
from megatron_vppo.system.stop_signals import ignore_stop_signals

_SECONDS_BETWEEN_TASKS = 2.0


def is_trainer_rank() -> bool:
    """Returns True if torchrun (or srun, after take_rank_from_slurm) has made this process one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first_on_host() -> bool:
    """Returns False for ranks of a machine but the first. What is wrong before ranks join is wrong for all of them."""
    if is_trainer_rank():
        return not _is_later("LOCAL_RANK")
    return os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1" or not _is_later("SLURM_LOCALID")


def refuse_several_processes(option: str) -> None:
    """Raises ValueError if this process is one of several that torchrun or srun has started."""
    if is_trainer_rank() or os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        raise ValueError(f"{option} is one process that stands for all ranks; start it without srun and torchrun")


def take_rank_from_slurm() -> SlurmTask | None:
    """Sets the variables that torch.distributed reads from SLURM's, if `srun` has started several tasks.

    MASTER_ADDR is the first host of the step, where rank 0 runs, unless it is set. Ranks that torchrun has started
    within a step keep what it has set.

    Returns:
        The task that this rank is; None if another launcher has started it, or none.

    Raises:
        ValueError: a variable is empty, no number, or contradicts another one; or the job has several hosts, and no
            `srun` has started the command on them.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    if not is_trainer_rank() and (idle := idle_hosts(os.environ)):
        raise ValueError(
            f"this job has {idle + 1} hosts, and without srun only this one would work. In the batch script: srun "
            "--kill-on-bad-exit=1 --ntasks-per-node=GPUS vppo train ... (for one host alone: srun --nodes=1 --ntasks=1)"
        )
    task = read_task(os.environ)
    if task is None:
        return None
    for variable, value, source in (
        ("RANK", task.rank, "SLURM_PROCID"),
        ("WORLD_SIZE", task.size, "SLURM_STEP_NUM_TASKS"),
        ("LOCAL_RANK", task.local_rank, "SLURM_LOCALID"),
    ):
        if os.environ.get(variable, str(value)) != str(value):
            raise ValueError(
                f"the environment has {variable}={os.environ[variable]!r} and {source}={value}; unset {variable}, srun "
                "says it"
            )
        os.environ[variable] = str(value)
    os.environ["MASTER_ADDR"] = _master_address(task)
    _check_port()
    return task


def _master_address(task: SlurmTask) -> str:
    """Returns the address of rank 0's host, as it is set or as SLURM says it.

    Raises:
        ValueError: it is empty, not known here, or that of another host.
    """
    given = os.environ.get("MASTER_ADDR")
    if given is not None and not given.strip():
        raise ValueError(f"the environment has MASTER_ADDR={given!r}; unset it, the hosts of the step are known")
    if len(task.hosts) < 2:
        return given or "127.0.0.1"
    first, here = task.hosts[0], task.hosts[min(task.host_number, len(task.hosts) - 1)]
    name = given or first
    origin = f"the environment has MASTER_ADDR={given!r}, and" if given else f"SLURM_STEP_NODELIST begins with {first}:"
    try:
        address = resolve(name)
    except ValueError as error:
        raise ValueError(f"{origin} {error}; set MASTER_ADDR to an address of {first} that every host knows") from error
    if is_loopback(address) and (name == address or name == "localhost"):
        raise ValueError(f"{origin} that is each host itself, while the step has {len(task.hosts)}; unset MASTER_ADDR")
    is_here = is_own(address)
    if task.host_number == 0 and not is_here:
        raise ValueError(
            f"{origin} SLURM_STEP_NODELIST begins with {first}, where rank 0 runs, but {address} is no address of "
            f"{first}; unset MASTER_ADDR"
        )
    if task.host_number > 0 and is_here:
        raise ValueError(
            f"{origin} on {here} that means {address}, which is {here} itself, while rank 0 runs on {first}; set "
            f"MASTER_ADDR to an address of {first} that every host knows"
        )
    return name


def _check_port() -> None:
    port = os.environ.get("MASTER_PORT")
    if port is not None and not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"the environment has MASTER_PORT={port!r}, which is no port; unset it, or set 1 to 65535")


def wait_for_other_tasks() -> None:
    """Gives the other tasks of a `srun` the time to find the same mistake, before this one ends with it.

    When one task fails, srun ends the others by SIGTERM, and reports that instead of the mistake.
    """
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        ignore_stop_signals()
        time.sleep(_SECONDS_BETWEEN_TASKS)


def check_rank() -> None:
    """Checks the numbers by which this process is a trainer rank, if it is one.

    Raises:
        ValueError: one is no whole number, or the rank is not among the ranks.
    """
    if not is_trainer_rank():
        return
    rank, size = whole_number(os.environ, "RANK"), whole_number(os.environ, "WORLD_SIZE")
    whole_number(os.environ, "LOCAL_RANK", default="0")
    if rank >= size:
        raise ValueError(f"the environment has RANK={rank} and WORLD_SIZE={size}; ranks count from 0")


def end_with_torchrun() -> None:
    """Makes a rank that torchrun started end with torchrun.

    torchrun puts each rank into a session of its own, which a SIGKILL to torchrun's process group does not reach.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())


def stop_signals(*, launched_by_us: bool) -> tuple[signal.Signals, ...]:
    """Returns the signals that ask this rank to stop.

    In a SLURM job SIGTERM asks too: it is what `scancel` and a time limit send to all processes of a step. The user's
    torchrun sends it to end ranks at once. So does our launcher, but a rank knows the launcher by its number.

    Args:
        launched_by_us: True if our launcher has started this rank. It passes SIGTERM on as SIGUSR2.
    """
    started_by_torch = "TORCHELASTIC_RUN_ID" in os.environ
    asks = job_id() is not None if launched_by_us else not started_by_torch
    return (signal.SIGUSR2, signal.SIGTERM) if asks else (signal.SIGUSR2,)


def quieten_libraries() -> None:
    """Hides notices that say nothing about the run: Megatron's fallbacks without TransformerEngine and Apex, torch's
    deprecation warnings inside Megatron, and Hugging Face's progress bars. Call it before these are imported.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed|torch\.autograd")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def launch_ranks(num_ranks: int, arguments: Sequence[str], *, logs: Path) -> NoReturn:
    """Replaces this process by the launcher, which runs `vppo ARGUMENTS` on `num_ranks` local ranks.

    So nothing stays in memory that the checks before it have loaded. The logs of the ranks go to a folder of this
    attempt within `logs`. Raises OSError or ValueError if it cannot be made.
    """
    try:
        logs.mkdir(parents=True, exist_ok=True)
        attempt = make_attempt_folder(logs, name=os.environ.get(ATTEMPT_VARIABLE) or None)
    except FileExistsError as error:
        raise ValueError(
            f"{error.filename} is no folder, but a file or a link that leads nowhere; remove it, or set another "
            "trainer.runs_dir"
        ) from error
    link_latest(logs, attempt)
    os.environ[ATTEMPT_VARIABLE] = attempt
    launcher = [sys.executable, "-m", "megatron_vppo.cli.launcher", str(num_ranks), str(logs / attempt)]
    flush_output()
    os.execv(sys.executable, [*launcher, "-m", "megatron_vppo.cli.main", *arguments])


def _is_later(variable: str) -> bool:
    """Returns True if the variable is the number of a rank, but not of the first."""
    value = os.environ.get(variable, "0")
    return value.isdecimal() and int(value) > 0
