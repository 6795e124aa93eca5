"""Times the vocabulary head against its matrix products alone: one view, two views and the update, as one JSON object.

    python tools/bench/head.py [--positions 8192] [--chunk-tokens 4096] [--seconds-per-case 5]

The default on a GPU is bfloat16 in the sizes of Qwen2.5-VL-7B, on a CPU a small case in float32. tools/bench/README.md
explains the numbers.

Shape suffix legend: N = response tokens; V = vocabulary rows; U = positions of one chunk; h = hidden size.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench.device import Timing, bench_device, free_memory, product_tflops, time_together
from bench.machine import commit, hardware, versions
from megatron_vppo.parallel.vocab_head import VocabHead

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEMPERATURE = 1.0


@dataclass(frozen=True)
class Sizes:
    positions: int
    """The response tokens of a micro-batch."""
    vocabulary: int
    hidden: int
    chunk_tokens: int
    dtype: str


DEFAULTS = {
    "cuda": Sizes(positions=8192, vocabulary=152064, hidden=3584, chunk_tokens=4096, dtype="bfloat16"),
    "cpu": Sizes(positions=96, vocabulary=4096, hidden=128, chunk_tokens=32, dtype="float32"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    defaults = DEFAULTS[bench_device().type]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(defaults).items():
        choices = DTYPES if name == "dtype" else None
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, choices=choices)
    parser.add_argument("--seconds-per-case", type=float, default=5.0)
    options = vars(parser.parse_args(arguments))
    seconds = options.pop("seconds_per_case")
    print(json.dumps(measure(Sizes(**options), seconds=seconds), indent=1))


def measure(sizes: Sizes, *, seconds: float) -> dict[str, Any]:
    device, dtype = bench_device(), DTYPES[sizes.dtype]
    problem = Problem(sizes, device)
    cases = {
        "score": (problem.score, problem.score_products, 1),
        "score_two_views": (problem.score_two_views, problem.two_view_products, 2),
        "update": (problem.update, problem.update_products, 4),
    }
    reports = {}
    for name, (head, products, count) in cases.items():
        timings = time_together({"head": head, "products": products}, device=device, seconds=seconds)
        flops = count * 2 * sizes.positions * sizes.vocabulary * sizes.hidden
        reports[name] = _report(timings, flops)
        print(f"{name}: {json.dumps(reports[name])}", file=sys.stderr, flush=True)
        free_memory(device)
    return {
        "sizes": asdict(sizes),
        "device": str(device),
        "ceiling_tflops": round(product_tflops(device, dtype), 3),
        "cases": reports,
        "hardware": hardware(),
        "versions": versions(),
        "git": commit(ROOT),
    }


def _report(timings: dict[str, Timing], flops: int) -> dict[str, Any]:
    head, products = timings["head"], timings["products"]
    return {
        "head": head.report(),
        "products": products.report(),
        "head_over_products": round(head.median / products.median, 3),
        "gflop": round(flops / 1e9, 3),
        "head_tflops": round(flops / head.median / 1e12, 3),
        "products_tflops": round(flops / products.median / 1e12, 3),
    }


class Problem:
    """Random hidden states and weights, the head on them, and its matrix products."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[sizes.dtype]

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, sizes.hidden, generator=generator, device=device).to(dtype)

        self.chunk = sizes.chunk_tokens
        self.hidden_Nh, self.perturbed_hidden_Nh = normal(sizes.positions), normal(sizes.positions)
        self.weight_Vh = normal(sizes.vocabulary).mul_(sizes.hidden**-0.5)  # logits of variance one
        self.targets_N = torch.randint(
            0, sizes.vocabulary, (sizes.positions,), generator=generator, device=device
        )  # fmt: skip
        self.grad_N = torch.randn(sizes.positions, generator=generator, device=device)
        self.head = VocabHead(self.weight_Vh, sizes.vocabulary, TEMPERATURE, sizes.chunk_tokens)
        # The update adds the weight's gradient where the optimizer sums it, in float32.
        trained_Vh, sum_Vh = (
            self.weight_Vh.detach().requires_grad_(),
            torch.zeros_like(self.weight_Vh, dtype=torch.float32),
        )
        self.trained_head = replace(self.head, weight_Vh=trained_Vh, weight_grad_Vh=sum_Vh)

    # --- The head -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self) -> None:
        self.head.token_logps(self.hidden_Nh, self.targets_N, with_entropy=True)

    def score_two_views(self) -> None:
        self.head.two_views(self.hidden_Nh, self.perturbed_hidden_Nh, self.targets_N, kind="kl_full")

    def update(self) -> None:
        hidden_Nh = self.hidden_Nh.detach().requires_grad_()
        logp_N, _ = self.trained_head.token_logps(hidden_Nh, self.targets_N, with_entropy=False)
        logp_N.backward(self.grad_N)

    # --- Its matrix products: the same chunks, results dropped --------------------------------------------------------

    @torch.no_grad()
    def score_products(self) -> None:
        for hidden_Uh in self.hidden_Nh.split(self.chunk):
            hidden_Uh @ self.weight_Vh.T

    @torch.no_grad()
    def two_view_products(self) -> None:
        for view_Nh in (self.hidden_Nh, self.perturbed_hidden_Nh):
            for hidden_Uh in view_Nh.split(max(1, self.chunk // 2)):
                hidden_Uh @ self.weight_Vh.T

    @torch.no_grad()
    def update_products(self) -> None:
        """Computes logits twice, then the gradients of hidden states and weight in the model's dtype."""
        self.score_products()
        for hidden_Uh in self.hidden_Nh.split(self.chunk):
            logits_UV = hidden_Uh @ self.weight_Vh.T
            logits_UV @ self.weight_Vh
            logits_UV.T @ hidden_Uh


if __name__ == "__main__":
    main()
