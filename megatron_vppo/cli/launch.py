"""From one command to a process per trainer rank.

Ranks that `srun` has started get their numbers here; a launcher that writes and submits SLURM batch scripts would be a
command of its own, with a room `launching/` next to `trainer/`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_vppo.cli.output import flush_output
from megatron_vppo.system.attempt import ATTEMPT_VARIABLE, begin_attempt, link_latest
from megatron_vppo.system.processes import die_with_parent


def is_trainer_rank() -> bool:
    """Returns True if torchrun (or srun, after take_rank_from_slurm) has made this process one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first_on_host() -> bool:
    """Returns False for ranks of a machine but the first. What is wrong before ranks join is wrong for all of them."""
    if is_trainer_rank():
        return not _is_later("LOCAL_RANK")
    return not _is_srun_task() or not _is_later("SLURM_LOCALID")


def take_rank_from_slurm() -> None:
    """Sets the variables that torch.distributed reads from SLURM's, if `srun` has started several tasks.

    With several nodes the batch script has to set MASTER_ADDR. MASTER_PORT defaults to 29500.

    Raises:
        ValueError: several nodes and no MASTER_ADDR, or a variable that should be a number is none.
    """
    if "RANK" in os.environ or not _is_srun_task():
        return
    if _whole_number("SLURM_NNODES", default="1") > 1 and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            "several nodes under srun need MASTER_ADDR; in the batch script: "
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    os.environ["RANK"] = str(_whole_number("SLURM_PROCID"))
    os.environ["WORLD_SIZE"] = str(_whole_number("SLURM_STEP_NUM_TASKS"))
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")


def check_rank() -> None:
    """Checks the numbers by which this process is a trainer rank, if it is one.

    Raises:
        ValueError: one is no whole number, or the rank is not among the ranks.
    """
    if not is_trainer_rank():
        return
    rank, size = _whole_number("RANK"), _whole_number("WORLD_SIZE")
    _whole_number("LOCAL_RANK", default="0")
    if rank >= size:
        raise ValueError(f"the environment has RANK={rank} and WORLD_SIZE={size}; ranks count from 0")


def end_with_torchrun() -> None:
    """Makes a rank that torchrun started end with torchrun.

    torchrun puts each rank into a session of its own, which a SIGKILL to torchrun's process group does not reach.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())


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
        attempt = begin_attempt(logs, name=os.environ.get(ATTEMPT_VARIABLE) or None)
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


def _is_srun_task() -> bool:
    """Returns True if `srun` has started this process as one of several tasks."""
    # SLURM_NTASKS is set in the batch shell as well.
    return "SLURM_PROCID" in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def _is_later(variable: str) -> bool:
    """Returns True if the variable is the number of a rank, but not of the first."""
    value = os.environ.get(variable, "0")
    return value.isdecimal() and int(value) > 0


def _whole_number(variable: str, *, default: str | None = None) -> int:
    value = os.environ.get(variable, default)
    if value is None or not value.isdecimal():
        raise ValueError(
            f"the environment has {variable}={value!r}, which is no rank or size; torchrun or srun sets it. Unset it "
            "to let vppo start the ranks"
        )
    return int(value)
