"""The processes of a run on a test cluster, by what they do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import psutil

from tests.slurm.cluster import Cluster

RANK = "rank"
ENGINE = "engine"
REWARD_WORKER = "reward worker"
RECORD_WRITER = "record writer"
CHECKPOINT_WRITER = "checkpoint writer"
CHECKPOINT_QUEUE = "checkpoint queue"
NODE = "node"
"""Not a process: the power of a whole node."""

_MODULES = {
    "megatron_vppo.rollout.engine_process": ENGINE,
    "megatron_vppo.data.reward_worker": REWARD_WORKER,
    "megatron_vppo.observability.record_writer": RECORD_WRITER,
}
FORK_SECONDS = 0.005
PROCESSES = (RANK, ENGINE, REWARD_WORKER, RECORD_WRITER, CHECKPOINT_WRITER, CHECKPOINT_QUEUE)


def role_of(process: psutil.Process) -> str | None:
    """Returns what a process is of a run; None: nothing that is killed here, or it has ended.

    A child that has the command of its parent is forked from it. Megatron forks the writers of a checkpoint; vLLM forks
    helpers, which are no engines.
    """
    with contextlib.suppress(psutil.Error):
        command = process.cmdline()
        parent = process.parent()
        forked = parent is not None and parent.cmdline() == command
        if forked:
            time.sleep(FORK_SECONDS)  # also for an instant what is about to run something else
            forked = process.cmdline() == command
            if not forked:
                return None
        if "train" in command and any(word.endswith(("/vppo", "megatron_vppo.cli.main")) for word in command):
            return CHECKPOINT_WRITER if forked else RANK
        module = command[command.index("-m") + 1] if "-m" in command[:-1] else ""
        if module in _MODULES and not forked:
            return _MODULES[module]
        if any("multiprocessing.spawn" in word for word in command) and parent and role_of(parent) == RANK:
            return CHECKPOINT_QUEUE
    return None


def processes_of(cluster: Cluster) -> Iterator[tuple[str, psutil.Process]]:
    """Yields every process on the nodes that are up, with its node."""
    for node in cluster.site.names:
        with contextlib.suppress(LookupError, KeyError, psutil.Error):
            for process in cluster.processes(node):
                yield node, process


def find(
    cluster: Cluster, role: str, choose: Callable[[list[psutil.Process]], psutil.Process]
) -> psutil.Process | None:
    """Returns one of the processes with a role; None if there is none at this moment."""
    found = [process for _, process in processes_of(cluster) if role_of(process) == role]
    return choose(found) if found else None
