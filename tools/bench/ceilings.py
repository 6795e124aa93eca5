"""Measures the ceilings of this machine for `vppo plan --gpu FILE`: products, memory, host copies, all-reduces.

    python tools/bench/ceilings.py --out ceilings.json [--ranks 2] [--network-gb-per-s 45]

On every GPU of the host, or on the CPU where there is none. The network between hosts cannot be measured on one of
them: give its bus bandwidth per GPU, or only plan for one host. tools/bench/README.md explains the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.device import bench_device, free_memory, product_tflops, time_together
from bench.machine import commit, hardware, versions
from megatron_vppo.parallel.all_reduce_speed import measure_all_reduce

ROOT = Path(__file__).resolve().parents[2]
COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
"""The size of a copied tensor: far larger than any cache."""
COPY_SECONDS = 2.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the file to write; the numbers are printed, too")
    parser.add_argument("--ranks", type=int, help="ranks of the all-reduce (default: all GPUs, or 2 without)")
    parser.add_argument("--network-gb-per-s", type=float, help="bus bandwidth per GPU between hosts")
    options = parser.parse_args(arguments)
    report = {**measure(ranks=options.ranks), "network_gb_per_s": options.network_gb_per_s}
    text = json.dumps(report, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def measure(*, ranks: int | None = None) -> dict[str, Any]:
    """Measures everything that one host has. `ranks`: of the all-reduce; with 1, its bandwidth is None."""
    device = bench_device()
    is_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    world = ranks or (torch.cuda.device_count() if is_cuda else 2)
    return {
        "name": torch.cuda.get_device_name(device) if is_cuda else "CPU",
        "product_tflops": _digits(product_tflops(device, dtype)),
        "product_dtype": str(dtype).removeprefix("torch."),
        "memory_gb_per_s": _digits(copy_gb(device, device)),
        "to_host_gb_per_s": _digits(copy_gb(device, torch.device("cpu"))),
        "node_gb_per_s": _digits(all_reduce_gb(world)) if world > 1 else None,
        "node_ranks": world,
        "threads": None if is_cuda else torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "hardware": hardware(),
        "versions": versions(),
        "git": commit(ROOT),
    }


def copy_gb(source: torch.device, target: torch.device, *, num_bytes: int | None = None) -> float:
    """Measures the fastest copy, in GB/s. Within a device, the bytes read and those written both count."""
    size = num_bytes or COPY_BYTES[source.type]
    is_within = source == target
    pinned = not is_within and source.type == "cuda"
    free_memory(source)
    values = torch.ones(size // 4, device=source)
    copied = torch.empty(size // 4, device=target, pin_memory=pinned)
    timing = time_together({"copy": lambda: copied.copy_(values)}, device=source, seconds=COPY_SECONDS)["copy"]
    return (2 if is_within else 1) * size / min(timing.seconds) / 1e9


def all_reduce_gb(ranks: int) -> float:
    """Measures the bus bandwidth of an all-reduce over `ranks` processes of this host, in GB/s."""
    with tempfile.TemporaryDirectory(prefix="vppo-ceilings-") as folder:
        mp.spawn(_rank, (ranks, folder), nprocs=ranks)
        return float((Path(folder) / "speed").read_text())


def _rank(rank: int, ranks: int, folder: str) -> None:
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks
    )
    speed = measure_all_reduce(device)
    if rank == 0:
        (Path(folder) / "speed").write_text(str(speed.bus_bytes_per_second / 1e9))
    dist.destroy_process_group()


def _digits(value: float) -> float:
    """Rounds to four significant digits."""
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
