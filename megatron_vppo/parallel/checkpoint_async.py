"""Checkpoints whose files are written while training goes on (docs/adr/0025-asynchronous-checkpoints.md).

`begin_checkpoint` copies the state, forks a process that writes it, and returns. The folder gets its name in `settle`,
when the processes of all ranks are done:

    rank      copy | train ...                       | settle: description, rename | train ...
    writer         | write files of .global_step_N.tmp |

So what is found under `global_step_N` is whole, as with `save_checkpoint`. Writers end with their rank.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megatron_vppo.parallel.checkpoint import (
    conclude_checkpoint,
    filled_by_all_ranks,
    state_to_write,
    write_state,
)
from megatron_vppo.parallel.checkpoint_failure import naming_failed_writes
from megatron_vppo.parallel.checkpoint_folder import step_folder
from megatron_vppo.parallel.checkpoint_writers import (
    LOOK_SECONDS,
    killed_by_signal,
    naming_lost_queue,
    use_result_queue_of_ours,
)
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.training import Trainable
from megatron_vppo.system.processes import children_of, die_with_parent
from megatron_vppo.weights.dist_metadata import DIST_CKPT


class PendingCheckpoint:
    """A checkpoint of which everything is copied, and some files may not be written yet."""

    def __init__(
        self,
        target: Path,
        calls: AsyncCallsQueue,
        copies: list[Any],
        *,
        unfinished: ExitStack,
        conclude: Callable[[], None],
    ) -> None:
        """
        Args:
            calls: the write, as Megatron follows it.
            copies: what the writers read; emptied when they are done.
            unfinished: makes the folder `target` when it is left without an exception, and removes it otherwise.
            conclude: what comes after that.
        """
        self._target = target
        self._calls = calls
        self.copies = copies
        self._unfinished = unfinished
        self._conclude = conclude
        self._began = time.time()
        self.seconds: float | None = None
        """The time that writing took, on rank 0 after the end."""

    def settle(self, *, wait: bool) -> bool:
        """Puts the checkpoint in its place if all ranks have written their files; a collective over all ranks.

        Args:
            wait: True: waits for them.

        Returns:
            True if it is in its place.

        Raises:
            ValueError: the disk is full.
            RuntimeError: a writer failed or was killed. All ranks raise the same; nothing is left of the checkpoint.
        """
        with ExitStack() as leaving:
            leaving.push(self._unfinished)
            with naming_failed_writes(self._target), naming_lost_queue(self._target):
                if not self._calls.maybe_finalize_async_calls(blocking=wait):
                    leaving.pop_all()
                    return False
            self.copies.clear()
            if dist.get_rank() == 0:  # the description is written now, and not by the writers
                folder = self._target.with_name(f".{self._target.name}.tmp")
                written = [file.stat().st_mtime for file in folder.rglob("*.distcp")]
                self.seconds = max(written, default=self._began) - self._began
        self._conclude()
        return True


def begin_checkpoint(
    folder: Path,
    *,
    step: int,
    trainable: Trainable,
    layout: Layout,
    state: Mapping[str, Any],
    keep: int,
    accuracy: float | None = None,
    model_only: bool = False,
) -> PendingCheckpoint:
    """Copies everything of `global_step_{step}`, and has it written; a collective over all ranks.

    Weights and optimizer state may change or leave the device when it returns. Call `settle` before the next one.

    Args, and what is raised: as of `save_checkpoint`. Failures of the writers are raised by `settle`.
    """
    target = step_folder(folder, step)
    with ExitStack() as stack:
        unfinished = stack.enter_context(filled_by_all_ranks(target, layout))
        use_result_queue_of_ours()
        written = state_to_write(trainable, layout, model_only=model_only)
        write_state(unfinished, step=step, trainable=trainable, layout=layout, state=state, model_only=model_only)
        calls = AsyncCallsQueue()
        with naming_failed_writes(target), naming_lost_queue(target):
            request = dist_checkpointing.save(written, str(unfinished / DIST_CKPT), async_sharded_save=True)
            assert request is not None
            copies: list[Any] = []
            if request.preload_fn is not None:
                request = request._replace(preload_fn=partial(_hold, request.preload_fn, copies))
            if request.async_fn is not None:
                request = request._replace(async_fn=partial(_write, request.async_fn, os.getpid(), target))
            calls.schedule_async_request(request)
        conclude = partial(conclude_checkpoint, folder, step=step, layout=layout, accuracy=accuracy, keep=keep)
        return PendingCheckpoint(target, calls, copies, unfinished=stack.pop_all(), conclude=conclude)


def _hold(copy: Callable[[], Any], copies: list[Any]) -> Any:
    """Copies the state to host memory, and holds the copies.

    Megatron 0.16 lets go of them once the writer is forked (mended upstream: NVIDIA/Megatron-LM, pull request 2288). On
    a GPU they are pinned memory, which a fork shares instead of copying: torch would give it to the next one who asks,
    while the writer still reads it.
    """
    copies.append(copy())
    return copies[-1]


def _write(write: Callable[..., None], rank_pid: int, target: Path, rank: int, buckets: Any, results: Any) -> None:
    """Writes a rank's files, in a process forked from it. One more process for each file is forked from this one.

    Args:
        write: Megatron's function, which waits for ever for the report of a process that was killed.
        results: the queue that the rank reads.
    """
    die_with_parent(rank_pid)
    os.register_at_fork(after_in_child=partial(die_with_parent, os.getpid()))

    def look() -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            for pid in children_of(os.getpid()):
                if (name := killed_by_signal(pid)) is not None:
                    results.put(RuntimeError(f"its process {pid} ended with signal {name}"))
                    os._exit(1)

    threading.Thread(target=look, name="checkpoint writers", daemon=True).start()
    write(rank, buckets, results)
