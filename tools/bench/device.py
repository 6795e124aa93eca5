"""Time, memory and matrix products on one device, a GPU or the CPU."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

MIB = 2**20
PRODUCT_SIZES = {"cuda": (4096, 8192, 16384), "cpu": (1024,)}
"""The sizes of the square matrices whose fastest product is the ceiling."""
PRODUCT_SECONDS = 1.0
"""The seconds spent on each size."""
LEAST_RUNS = 2


@dataclass(frozen=True)
class Timing:
    first_s: float
    """The seconds of the first run, which compiles and allocates."""
    seconds: tuple[float, ...]
    peak_mib: float | None
    """The largest memory that the device's allocator held during a run, inputs included; None on CPU."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def report(self) -> dict[str, Any]:
        return {
            "seconds": _digits(self.median),
            "fastest_s": _digits(min(self.seconds)),
            "runs": len(self.seconds),
            "first_s": round(self.first_s, 2),
            "peak_mib": None if self.peak_mib is None else round(self.peak_mib),
        }


def _digits(value: float) -> float:
    """Rounds to four significant digits."""
    return float(f"{value:.4g}")


def bench_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def time_together(
    runs: Mapping[str, Callable[[], object]], *, device: torch.device, seconds: float
) -> dict[str, Timing]:
    """Runs everything twice without measuring, then in turn until `seconds` are over, so that a change of clock speed
    affects all alike. The device is idle before and after each measured run.
    """
    first, peaks = {}, {}
    for name, run in runs.items():
        first[name] = _timed(run, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        _timed(run, device)
        peaks[name] = torch.cuda.max_memory_allocated(device) / MIB if device.type == "cuda" else None
    taken: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(taken.values()))) < LEAST_RUNS:
        for name, run in runs.items():
            taken[name].append(_timed(run, device))
    return {name: Timing(first[name], tuple(taken[name]), peaks[name]) for name in runs}


def free_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def product_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the fastest product of two square matrices of random numbers, in 10^12 FLOPs per second."""

    def operands(size: int) -> Callable[[], object]:
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        return lambda: torch.mm(left, right)

    return _ceiling(operands, device)


def fp8_product_tflops(device: torch.device) -> float | None:
    """Measures the same for E4M3 matrices with one scale each and bfloat16 results, with and without fast accumulation.
    Returns the faster of the two, or None if torch or the device has no FP8 product.
    """

    def operands(size: int, *, fast: bool) -> Callable[[], object]:
        left, right = (
            torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2)
        )  # the second is passed transposed, the only layout that the device multiplies
        one, recipe = torch.ones((), device=device), F.ScalingType.TensorWise
        return lambda: F.scaled_mm(
            left, right.t(), one, recipe, one, recipe, output_dtype=torch.bfloat16, use_fast_accum=fast
        )

    try:
        return max(_ceiling(partial(operands, fast=fast), device) for fast in (False, True))
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        print(f"no FP8 products here: {error}", file=sys.stderr)
        return None


def _ceiling(operands: Callable[[int], Callable[[], object]], device: torch.device) -> float:
    best = 0.0
    for size in PRODUCT_SIZES[device.type]:
        timing = time_together({"product": operands(size)}, device=device, seconds=PRODUCT_SECONDS)["product"]
        best = max(best, 2 * size**3 / min(timing.seconds) / 1e12)
    free_memory(device)
    return best


def _timed(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
