"""Times the weight transfer from trainer ranks to a vLLM engine against a plain copy of the same bytes, as JSON.

    python tools/bench/weight_sync.py [--tensor 2] [--pipeline 1] [--engine-ranks 1] [--dtype bfloat16] [--size 60m]

The ranks are real, over gloo (NCCL with CUDA); a real engine is led by the first of them; the transfer is that of
training. The model comes from random_model.py, which runs first if it is missing. tools/bench/README.md explains the
numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoConfig

from bench.machine import commit, hardware, versions
from bench.random_model import SIZES
from megatron_vppo.models.build import build_model
from megatron_vppo.models.qwen_vl import QwenVLModel
from megatron_vppo.parallel.layout import init_layout
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.records import EngineSettings
from megatron_vppo.rollout.transfer.bundle import drain
from megatron_vppo.weights.load_hf import load_hf_weights
from megatron_vppo.weights.stream import hf_weights

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
START_SECONDS = 600.0
WARMUP = 1
SAMPLE_SECONDS = 0.002
MIB = 2**20


@dataclass(frozen=True)
class Case:
    model: Path
    tensor: int
    pipeline: int
    engine_ranks: int
    dtype: str
    repeats: int


@dataclass(frozen=True)
class RankResult:
    sync_seconds: list[float]
    verified_seconds: float | None
    copy_seconds: list[float]
    num_bytes: int
    extra_peak_mib: float
    layer_group_mib: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="60m", help="size of the model (default: 60m)")
    parser.add_argument("--tensor", type=int, default=2, help="tensor-parallel trainer ranks (default: 2)")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages (default: 1)")
    parser.add_argument("--engine-ranks", type=int, default=1, help="workers of the engine (default: 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5, help="measured transfers, after one of warm-up (default: 5)")
    options = parser.parse_args(arguments)
    folder = ROOT / "build" / "bench" / f"random_{options.size}"
    builder = [sys.executable, "tools/bench/random_model.py", "--size", options.size, "--out", str(folder)]
    subprocess.run(builder, cwd=ROOT, stdout=sys.stderr, check=True)
    settings = {name: value for name, value in vars(options).items() if name != "size"}
    print(json.dumps(measure(Case(model=folder / "model", **settings)), indent=1))


def measure(case: Case) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="vppo-bench-") as folder:
        ranks = case.tensor * case.pipeline
        mp.spawn(_rank, args=(ranks, case, folder), nprocs=ranks)
        results = [RankResult(**json.loads((Path(folder) / f"{rank}.json").read_text())) for rank in range(ranks)]
    leader = results[0]
    gigabytes = leader.num_bytes / 1e9
    sync, copy = min(leader.sync_seconds), min(leader.copy_seconds)
    return {
        "model": str(case.model),
        "layout": {"tensor": case.tensor, "pipeline": case.pipeline, "engine_ranks": case.engine_ranks},
        "dtype": case.dtype,
        "megabytes": round(leader.num_bytes / 1e6, 1),
        "sync_s": [round(s, 4) for s in leader.sync_seconds],
        "sync_verified_s": None if leader.verified_seconds is None else round(leader.verified_seconds, 4),
        "copy_s": [round(s, 4) for s in leader.copy_seconds],
        "sync_gb_per_s": round(gigabytes / sync, 3),
        "copy_gb_per_s": round(gigabytes / copy, 3),
        "sync_over_copy": round(sync / copy, 2),
        "extra_peak_mib_by_rank": [round(result.extra_peak_mib, 1) for result in results],
        "layer_group_mib": round(leader.layer_group_mib, 1),
        "hardware": hardware(),
        "versions": versions(),
        "git": commit(ROOT),
    }


def _rank(rank: int, ranks: int, case: Case, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    os.environ["LOCAL_RANK"] = str(rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    layout = init_layout(tensor=case.tensor, pipeline=case.pipeline, timeout_seconds=START_SECONDS)
    stage = build_model(
        AutoConfig.from_pretrained(case.model),
        groups=layout.groups,
        vision_groups=layout.vision_groups,
        dtype=DTYPES[case.dtype],
        device=layout.device,
    )
    load_hf_weights(stage, case.model)
    engine = _engine(case, Path(folder)) if rank == 0 else None
    dist.barrier()
    memory = PeakMemory()
    verified, num_bytes = _sync(stage, engine, verify=True)
    seconds = [_sync(stage, engine, verify=False)[0] for _ in range(WARMUP + case.repeats)]
    extra = memory.stop()
    result = RankResult(
        sync_seconds=seconds[WARMUP:],
        verified_seconds=verified if engine else None,
        copy_seconds=_copies(stage, case.repeats),
        num_bytes=num_bytes,
        extra_peak_mib=extra,
        layer_group_mib=_layer_group_bytes(stage, DTYPES[case.dtype]) / MIB,
    )
    (Path(folder) / f"{rank}.json").write_text(json.dumps(vars(result)))
    if engine is not None:
        engine.close()
    dist.barrier()
    dist.destroy_process_group()


def _engine(case: Case, folder: Path) -> RolloutEngine:
    settings = EngineSettings(
        model=str(case.model),
        max_model_len=512,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=case.dtype,  # type: ignore[arg-type]
        tensor_parallel_size=case.engine_ranks,
        max_num_seqs=8,
        cpu_kv_cache_gib=0.125,
        gpu_memory_utilization=0.5,
        enforce_eager=True,
        load_format="empty",
    )
    engine = RolloutEngine(settings, log_path=folder / "engine.log")
    engine.wait_ready(timeout_seconds=START_SECONDS)
    return engine


def _sync(stage: QwenVLModel, engine: RolloutEngine | None, *, verify: bool) -> tuple[float, int]:
    """Times one transfer on all ranks together. Returns (seconds, bytes of the model)."""
    dist.barrier()
    began = time.perf_counter()
    if engine is None:
        stream = hf_weights([stage])
        num_bytes = sum(stream.piece_bytes)
        drain(stream)
    else:
        num_bytes = engine.send_weights(hf_weights([stage]), version=0, verify=verify).num_bytes
    dist.barrier()
    return time.perf_counter() - began, num_bytes


def _copies(stage: QwenVLModel, repeats: int) -> list[float]:
    """Times copies of the whole model, tensor by tensor in one thread of rank 0, while the other ranks wait."""
    whole = [tensor.clone() for _, tensor in hf_weights([stage])]
    target = [torch.empty_like(tensor) for tensor in whole]
    seconds = []
    if dist.get_rank() == 0:
        for _ in range(WARMUP + repeats):
            began = time.perf_counter()
            for source, place in zip(whole, target, strict=True):
                place.copy_(source)
            seconds.append(time.perf_counter() - began)
    dist.barrier()
    return seconds[WARMUP:]


def _layer_group_bytes(stage: QwenVLModel, dtype: torch.dtype) -> int:
    """Counts the bytes of the largest layer group of a stream: a language layer, or the embedding if that is larger."""
    groups: dict[int | str, int] = {}
    for entry in stage.weight_map:
        key = entry.layer if entry.layer is not None else entry.template
        values = sum(torch.Size(shape).numel() for shape in entry.kind.hf_shapes())
        groups[key] = groups.get(key, 0) + values * dtype.itemsize
    return max(groups.values())


class PeakMemory:
    """The largest growth of this process's memory from now on.

    Counts anonymous memory (RssAnon), so that shared buffers are left out; with CUDA, torch's allocations on the GPU.
    """

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._allocated = torch.cuda.memory_allocated()
        self._base = self._peak = _anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """Ends the sampling and returns the growth in MiB."""
        self._stop.set()
        self._thread.join()
        if torch.cuda.is_available():
            return (torch.cuda.max_memory_allocated() - self._allocated) / MIB
        return (self._peak - self._base) / MIB

    def _follow(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, _anonymous_bytes())


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")) * 1024


if __name__ == "__main__":
    main()
