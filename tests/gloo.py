"""Runs a function in several real processes joined by torch.distributed over gloo."""

from __future__ import annotations

import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = ["torch", "transformers", "megatron_vppo.parallel.policy", "megatron_vppo.models.build"]


def run_gloo(fn: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 120.0) -> list[Any]:
    """Calls fn(rank, world_size, *args) in world_size fresh processes, one thread each, default group initialised.

    fn must be a module-level function, its arguments and result picklable.

    Returns:
        Each rank's result, by rank.

    Raises:
        RuntimeError: a rank failed; holds the traceback of the one that failed first. The others are ended.
        TimeoutError: not all ranks were done in time; all are ended.
    """
    with tempfile.TemporaryDirectory(prefix="gloo_") as folder:
        # Forked from a server that has imported what every rank needs and has run nothing: seconds saved per rank.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        processes = [
            context.Process(target=_run_rank, args=(rank, world_size, folder, timeout_seconds, fn, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(folder), timeout_seconds)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [pickle.loads(_result_file(Path(folder), rank).read_bytes()) for rank in range(world_size)]


def _wait(processes: list[Any], folder: Path, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while any(process.is_alive() for process in processes):
        if any(process.exitcode not in (None, 0) for process in processes):
            break
        if time.monotonic() > deadline:
            running = [rank for rank, process in enumerate(processes) if process.is_alive()]
            raise TimeoutError(f"ranks {running} were still running after {timeout_seconds} s")
        time.sleep(0.02)
    failures = sorted(folder.glob("error_*"), key=lambda path: path.stat().st_mtime_ns)
    if failures:
        raise RuntimeError(f"rank {failures[0].name.removeprefix('error_')} failed first:\n{failures[0].read_text()}")
    dead = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
    if dead:
        raise RuntimeError(f"ranks ended without a traceback; exit codes by rank: {dead}")


def _run_rank(
    rank: int, world_size: int, folder: str, timeout_seconds: float, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        result = pickle.dumps(fn(rank, world_size, *args))
        # A file, not a queue: tensors in a queue are lost when their process ends before they are read.
        _result_file(Path(folder), rank).write_bytes(result)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        _write_whole(Path(folder) / f"error_{rank}", traceback.format_exc())
        raise SystemExit(1) from None


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f"partial_{path.name}")
    partial.write_text(text)
    partial.rename(path)


def _result_file(folder: Path, rank: int) -> Path:
    return folder / f"result_{rank}"
