"""A training of a few lines in place of the real one, for tests of `vppo train` that are about its processes.

Python imports this file by its name in every process that has this folder in PYTHONPATH. Two ranks join over gloo. The
ranks of VPPO_TEST_RANKS fail as VPPO_TEST_FAILURE says; the others wait for them in a collective.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import sys
import time
import types
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

FAILURE = os.environ["VPPO_TEST_FAILURE"]
RANKS = os.environ.get("VPPO_TEST_RANKS", "1").split(",")
ENGINE_ENDED = "the rollout engine (process 7) ended with signal SIGKILL; end of engine_0.log:\n  | one\n  | two"


def fail(error: BaseException) -> NoReturn:
    raise error


def run_out_of_memory() -> NoReturn:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def write_natively() -> NoReturn:
    ctypes.CDLL(None).perror(b"text of a C library")
    raise ValueError("and an error")


def warn() -> None:
    logging.getLogger("megatron_vppo.data").warning("a warning of ours")
    logging.getLogger("of_a_library").warning("a warning of a library")


def wait() -> None:
    print("waiting", flush=True)
    time.sleep(600)


def fail_one_after_the_other() -> NoReturn:
    if os.environ["RANK"] == "0":
        time.sleep(1)
    raise ValueError(f"of rank {os.environ['RANK']}")


def hang_under_a_watchdog() -> None:
    """Rank 1 hangs, and rank 0 waits for it in a collective."""
    import torch.distributed as dist

    from megatron_vppo.system.watchdog import Watchdog

    watchdog = Watchdog(factor=2, least_seconds=1.0, grace_seconds=1.0)
    for step in range(1, 5):
        with watchdog.watch("step", f"step {step}"):
            if step == 4 and dist.get_rank() == 1:
                time.sleep(600)
            dist.barrier()


def fail_late() -> NoReturn:
    import torch.distributed as dist

    dist.destroy_process_group()
    time.sleep(1)
    raise ValueError("the cause")


def spoil_report() -> NoReturn:
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
        file.write('{"message": "", "timestamp": 0, "rank_error": {}}')
    os._exit(3)


FAILURES: dict[str, Callable[[], Any]] = {
    "mistake": lambda: fail(ValueError("rollout.n=3 does not go with 4 rows; lower it")),
    "defect": lambda: fail(KeyError("mrope_section")),
    "CUDA memory": run_out_of_memory,
    "engine": lambda: fail(RuntimeError(ENGINE_ENDED)),
    "interrupt": lambda: fail(KeyboardInterrupt()),
    "full disk": lambda: fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/step_1.jsonl.zst")),
    "native text": write_natively,
    "one after the other": fail_one_after_the_other,
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSEGV": lambda: ctypes.string_at(0),
    "spoilt report": spoil_report,
    "exit": lambda: os._exit(3),
    "hang": lambda: time.sleep(600),
    "hang under a watchdog": hang_under_a_watchdog,
    "late cause": fail_late,
    "wait": wait,
    "warn": warn,
    "none": lambda: None,
}


def run_training(config: Any, world: Any, *, say: Callable[[str], None], signals: Any) -> bool:
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    impatient = dist.new_group(timeout=timedelta(seconds=2))
    if dist.get_rank() == 0:
        say("the line of rank 0")
    dist.barrier()
    if FAILURE == "stop when asked":
        signals.begin_work()
        print("working", flush=True)
        while signals.request is None:
            time.sleep(0.1)
        dist.barrier()
        return False
    if str(dist.get_rank()) in RANKS:
        FAILURES[FAILURE]()
    dist.barrier(impatient if FAILURE == "hang" else None)
    dist.destroy_process_group()
    return True


def put_in_place(name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


put_in_place("megatron_vppo.trainer.run", run_training=run_training)
put_in_place(
    "megatron_vppo.setup.preflight", check_before_launch=lambda config: 2, check_settings=lambda config, **sizes: None
)
