"""From one command to a process per trainer rank.

Ranks that `srun` has started get their numbers here; a launcher that writes and submits SLURM batch scripts would be a
command of its own, with a room `launching/` next to `trainer/`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from megatron_vppo.system.processes import die_with_parent


def is_trainer_rank() -> bool:
    """Returns True if torchrun (or srun, after take_rank_from_slurm) has made this process one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def take_rank_from_slurm() -> None:
    """Sets the variables that torch.distributed reads from SLURM's, if `srun` has started several tasks.

    With several nodes the batch script has to set MASTER_ADDR. MASTER_PORT defaults to 29500.

    Raises:
        ValueError: several nodes and no MASTER_ADDR.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))  # SLURM_NTASKS is set in the batch shell as well
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or tasks < 2:
        return
    if int(os.environ.get("SLURM_NNODES", "1")) > 1 and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            "several nodes under srun need MASTER_ADDR; in the batch script: "
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = str(tasks)
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")


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


def launch_ranks(num_ranks: int, arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by torchrun, which runs `vppo ARGUMENTS` on `num_ranks` local ranks. When one rank fails,
    torchrun ends the others.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}",
        "-m", "megatron_vppo.cli.main", *arguments,
    ]  # fmt: skip
    sys.stdout.flush()
    os.execve(sys.executable, command, {"OMP_NUM_THREADS": "1", **os.environ})
