"""Answers on a GPU what the next changes depend on, as one JSON object: milliseconds, each the median of several runs.

    python tools/bench/gpu_questions.py [--seconds-per-case 0.5]
    python tools/bench/gpu_questions.py --small

In the sizes of Qwen2.5-VL-7B. --small runs toys on any machine, to see that it works. tools/bench/README.md explains
the numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device import bench_device, time_together
from bench.machine import commit, hardware, versions
from megatron_vppo.models.layers.continued import bounds_of
from megatron_vppo.models.layers.te_support import has_transformer_engine, packed_arguments

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a vision tower, and the patches that it gets at once."""

    patches: int
    hidden: int
    widths: tuple[int, ...]
    """Inner widths of its MLP: as released, and padded to multiples of 8 and 64."""
    heads: int
    head_dim: int
    window: int
    """Patches of a window."""
    frame: int
    """Patches of a whole image."""


SEVEN_B = Sizes(23_040, 1280, (3420, 3424, 3456), heads=16, head_dim=80, window=64, frame=2304)
TOY = Sizes(192, 32, (36, 40), heads=2, head_dim=16, window=16, frame=96)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="toys, on any machine")
    parser.add_argument("--seconds-per-case", type=float, default=0.5)
    options = parser.parse_args(arguments)
    device = bench_device()
    sizes = TOY if options.small else SEVEN_B
    measure = partial(milliseconds, device=device, seconds=options.seconds_per_case)
    report: dict[str, Any] = {
        "tower_mlp_ms": {str(width): tower_mlp(sizes, width, device, measure) for width in sizes.widths},
        "windows_ms": windows(sizes, device, measure),
        "attention_host_ms": attention_of_the_host(sizes, device) if _has_te(device) else "it needs TransformerEngine",
        "hardware": hardware(),
        "versions": versions(),
        "git": commit(ROOT),
    }
    print(json.dumps(report, indent=1))


Measure = Callable[[Callable[[], object]], float]


def milliseconds(run: Callable[[], object], *, device: torch.device, seconds: float) -> float:
    return round(1e3 * time_together({"run": run}, device=device, seconds=seconds)["run"].median, 4)


def _has_te(device: torch.device) -> bool:
    return device.type == "cuda" and has_transformer_engine()


# --- The width of the tower's MLP -------------------------------------------------------------------------------------


def tower_mlp(sizes: Sizes, width: int, device: torch.device, measure: Measure) -> dict[str, float]:
    """Times the six products of an MLP with a gate: forward, and the gradients of inputs and weights."""
    random = partial(torch.randn, device=device, dtype=_dtype(device))
    hidden_Ph, gated_Pw = random(sizes.patches, sizes.hidden), random(sizes.patches, width)
    both_P2w = random(sizes.patches, 2 * width)
    first_2wh, second_hw = random(2 * width, sizes.hidden), random(sizes.hidden, width)
    products = {
        "first": lambda: hidden_Ph @ first_2wh.T,
        "second": lambda: gated_Pw @ second_hw.T,
        "input of the first": lambda: both_P2w @ first_2wh,
        "input of the second": lambda: hidden_Ph @ second_hw,
        "weight of the first": lambda: both_P2w.T @ hidden_Ph,
        "weight of the second": lambda: hidden_Ph.T @ gated_Pw,
    }
    times = {name: measure(product) for name, product in products.items()}
    return {**times, "all": round(sum(times.values()), 4)}


# --- Attention within windows -----------------------------------------------------------------------------------------


def windows(sizes: Sizes, device: torch.device, measure: Measure) -> dict[str, dict[str, float]]:
    """Times attention within windows of one size, as packed sequences and as a batch."""
    lengths = (sizes.window,) * (sizes.patches // sizes.window)
    query, key, value = _operands(sizes, sum(lengths), device)

    def batched() -> Tensor:
        shape = (len(lengths), sizes.window, sizes.heads, sizes.head_dim)
        of_windows = (x.view(shape).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(*of_windows).transpose(1, 2).reshape(query.shape)

    ways: dict[str, Callable[[], Tensor]] = {"batch, torch": batched}
    if _has_te(device):
        ways["packed, TransformerEngine"] = partial(_PackedAttention(sizes, lengths, device), query, key, value)
    return {name: _forward_and_both(run, (query, key, value), measure) for name, run in ways.items()}


def _forward_and_both(run: Callable[[], Tensor], inputs: Sequence[Tensor], measure: Measure) -> dict[str, float]:
    gradient = torch.randn_like(run())

    def forward() -> None:
        with torch.no_grad():
            run()

    def both() -> None:
        torch.autograd.grad(run(), inputs, gradient)

    return {"forward": measure(forward), "forward and backward": measure(both)}


class _PackedAttention:
    """TransformerEngine's attention over packed sequences without a mask."""

    def __init__(self, sizes: Sizes, lengths: Sequence[int], device: torch.device) -> None:
        import transformer_engine.pytorch as te

        self._attention = te.DotProductAttention(
            sizes.heads, sizes.head_dim, qkv_format="thd", attn_mask_type="padding"
        )
        self._of_sequences = packed_arguments(bounds_of(lengths).to(device), max(lengths))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._attention(query, key, value, **self._of_sequences)


def attention_of_the_host(sizes: Sizes, device: torch.device, *, calls: int = 20) -> dict[str, float]:
    """Times calls of TransformerEngine's attention that the host cannot make as fast as the device takes them.

    A call with another shape than the last one makes TransformerEngine choose a backend again. One with a number of
    tokens that was never there may make cuDNN plan; TransformerEngine rounds these numbers, to powers of two at most.
    """
    narrow, whole = (sizes.window,) * (sizes.frame // sizes.window), (sizes.frame,)

    def each(shapes: Sequence[tuple[int, ...]]) -> float:
        times = []
        for lengths in shapes:
            attention = _PackedAttention(sizes, lengths, device)
            operands = _operands(sizes, sum(lengths), device)
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            attention(*operands)
            torch.cuda.synchronize(device)
            times.append(1e3 * (time.perf_counter() - began))
        return round(statistics.median(times), 3)

    each([narrow, whole])
    return {
        "the same shape again": each([narrow] * calls),
        "two shapes in turn": each([narrow, whole] * (calls // 2)),
        "a new number of tokens": each([(128 * 2**doubled,) for doubled in range(8)]),
    }


def _operands(sizes: Sizes, tokens: int, device: torch.device) -> tuple[Tensor, ...]:
    shape = (tokens, sizes.heads, sizes.head_dim)
    return tuple(torch.randn(shape, device=device, dtype=_dtype(device), requires_grad=True) for _ in range(3))


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


if __name__ == "__main__":
    main()
