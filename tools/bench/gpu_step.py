"""Times scoring and update of a Qwen-VL on one GPU: ours in bfloat16 and FP8, and the authors', as one JSON object.

    python tools/bench/gpu_step.py [--model qwen2.5-vl-7b qwen2.5-vl-3b] [--layers N] [--seconds-per-case 10]
    python tools/bench/gpu_step.py --small

Weights are random, in the sizes of released models, and made on the device. Synthetic prompts have one image and eight
responses each. All cases and the ceilings are measured one after the other in one process. --small runs a toy on any
machine. tools/bench/README.md explains the numbers.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

from bench.authors_way import AuthorsWay, authors_attention
from bench.device import Timing, fp8_product_tflops, free_memory, product_tflops, time_together
from bench.flops import GroupShape, scoring_flops, update_flops
from bench.machine import commit, hardware, versions
from bench.our_way import OurSettings, OurWay
from bench.workload import Workload, WorkSizes, make_workload, with_layers
from megatron_vppo.config.choices import Fp8Recipe, Recompute
from megatron_vppo.models.flops import model_cost
from megatron_vppo.models.layers.te_support import recipe_refusal
from megatron_vppo.models.options import Backend
from megatron_vppo.parallel.layout import Layout, destroy_layout, init_layout
from megatron_vppo.planning.published import PUBLISHED, published_config
from megatron_vppo.setup.hardware import choose_backend

ROOT = Path(__file__).resolve().parents[2]
TEMPERATURE = 1.0
TIMEOUT_SECONDS = 600.0
BYTES_PER_PARAMETER = 20
"""The bytes of a parameter in the update: bfloat16 weights (2), float32 gradients and master weights (8), Adam's
moments (8). The authors' way needs 2 more, because its gradients exist in bfloat16 before they become float32."""
MEMORY_SHARE = 0.6
"""The share of the device's memory for these bytes if --layers is not given. The rest is for activations."""
REALISTIC = WorkSizes(
    prompts=4, responses_per_prompt=8, text_tokens=64, response_median=450, response_sigma=0.5, response_limit=1536,
    images=((448, 448), (672, 896), (1008, 1008), (560, 784)),
)  # fmt: skip
TOY = WorkSizes(
    prompts=2, responses_per_prompt=3, text_tokens=5, response_median=6, response_sigma=0.4, response_limit=12,
    images=((56, 56), (56, 84)),
)  # fmt: skip
CASES = ("bfloat16", "authors", "fp8")
RECIPES: tuple[Fp8Recipe, ...] = ("tensorwise", "blockwise")


@dataclass(frozen=True)
class Case:
    kind: Literal["ours", "authors"]
    fp8: Fp8Recipe | None = None

    @property
    def name(self) -> str:
        return "authors" if self.kind == "authors" else f"fp8 {self.fp8}" if self.fp8 else "bfloat16"


@dataclass(frozen=True)
class Bench:
    """The measurement of one model."""

    name: str
    hf_config: Any
    workload: Workload
    layout: Layout
    dtype: torch.dtype
    settings: OurSettings
    cases: tuple[Case, ...]
    seconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    print(json.dumps(measure(_parser().parse_args(arguments)), indent=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=PUBLISHED, default=["qwen2.5-vl-7b"])
    parser.add_argument("--small", action="store_true", help="a toy model and toy rows instead of --model")
    parser.add_argument("--layers", type=int, help="language layers (default: as many as the memory holds)")
    parser.add_argument("--prompts", type=int, help=f"prompts with 8 responses each (default: {REALISTIC.prompts})")
    parser.add_argument("--rows-per-update", type=int, default=4, help="rows of an update micro-batch (default: 4)")
    parser.add_argument(
        "--rows-per-experience", type=int, default=16, help="rows of a scoring micro-batch (default: 16)"
    )
    parser.add_argument("--head-chunk-tokens", type=int, default=4096)
    parser.add_argument(
        "--recompute", choices=get_args(Recompute), default="none", help="in our update (default: none)"
    )
    parser.add_argument("--prompts-apart", action="store_true", help="ours without parallel.shared_prefix")
    parser.add_argument("--backend", choices=("auto", *get_args(Backend)), default="auto", help="as in model.backend")
    parser.add_argument("--fp8", nargs="+", choices=get_args(Fp8Recipe), default=list(RECIPES), help="FP8 recipes")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds-per-case", type=float, default=10.0)
    return parser


def measure(options: argparse.Namespace) -> dict[str, Any]:
    layout = init_layout(tensor=1, pipeline=1, timeout_seconds=TIMEOUT_SECONDS)
    on_gpu = layout.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    ceilings = {
        "product_tflops": round(product_tflops(layout.device, dtype), 3),
        "fp8_product_tflops": fp8_product_tflops(layout.device) if on_gpu else None,
    }
    models = {"toy": toy_config()} if options.small else {name: published_config(name) for name in options.model}
    reports = {}
    for name, whole in models.items():
        layers = options.layers or layers_that_fit(whole, _memory_bytes(layout.device))
        bench = _bench(name, with_layers(whole, layers), options, layout=layout, dtype=dtype)
        reports[name] = {
            "layers": layers,
            "layers_of_the_whole_model": whole.text_config.num_hidden_layers,
            **run(bench, ceilings),
        }
    destroy_layout()
    return {
        "models": reports,
        "ceilings": ceilings,
        "dtype": str(dtype).removeprefix("torch."),
        "hardware": {**hardware(), "device_memory_mib": round(_memory_bytes(layout.device) / 2**20)},
        "versions": versions(),
        "git": commit(ROOT),
    }


def _bench(name: str, hf_config: Any, options: argparse.Namespace, *, layout: Layout, dtype: torch.dtype) -> Bench:
    sizes = TOY if options.small else REALISTIC
    if options.prompts is not None:
        sizes = WorkSizes(**{**asdict(sizes), "prompts": options.prompts})
    cases = {
        "bfloat16": [Case("ours")],
        "authors": [Case("authors")],
        "fp8": [Case("ours", fp8=recipe) for recipe in options.fp8],
    }
    return Bench(
        name=name,
        hf_config=hf_config,
        workload=make_workload(hf_config, sizes),
        layout=layout,
        dtype=dtype,
        settings=OurSettings(
            backend=choose_backend(
                options.backend,
                on_gpu=layout.device.type == "cuda",
                dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
            ),
            recompute=options.recompute,
            temperature=TEMPERATURE,
            rows_per_update=options.rows_per_update,
            rows_per_experience=options.rows_per_experience,
            head_chunk_tokens=options.head_chunk_tokens,
            shared_prefix=not options.prompts_apart,
        ),
        cases=tuple(case for kind in options.cases for case in cases[kind]),
        seconds=options.seconds_per_case,
    )


def run(bench: Bench, ceilings: dict[str, float | None]) -> dict[str, Any]:
    """Measures every case of one model. A failed case says so in the report and does not stop the others."""
    groups = group_shapes(bench.workload)
    cost = model_cost(bench.hf_config)
    flops = {"score": scoring_flops(groups, cost), "update": update_flops(groups, cost)}
    read = sum(sum(group.sequence_tokens) for group in groups)
    tokens = {"score": 2 * read, "update": read}
    phases: dict[str, dict[str, Any]] = {}
    for case in bench.cases:
        print(f"{bench.name}: {case.name}", file=sys.stderr, flush=True)
        results = _guarded(partial(_run_case, bench, case), bench.layout.device)
        if "error" in results:
            results = dict.fromkeys(flops, results)
        phases[case.name] = {
            phase: result if isinstance(result, dict) else _phase_report(result, flops[phase], tokens[phase], ceilings)
            for phase, result in results.items()
        }
        print(json.dumps(phases[case.name]), file=sys.stderr, flush=True)  # kept, even if a later case ends the process
    return {
        "settings": {**asdict(bench.settings), "authors_attention": authors_attention()},
        "workload": bench.workload.shape(),
        "tflop": {phase: count / 1e12 for phase, count in flops.items()},
        "tokens": tokens,
        "cases": phases,
        "ratios": {
            "fp8_score_over_bfloat16": {
                case.name: _speedup(phases, case.name, "bfloat16", "score") for case in bench.cases if case.fp8
            },
            "update_over_authors": _speedup(phases, "bfloat16", "authors", "update"),
            "score_over_authors": _speedup(phases, "bfloat16", "authors", "score"),
        },
    }


Result = Timing | dict[str, str]
"""The timing of a phase, or a dictionary that says why there is none."""


def _run_case(bench: Bench, case: Case) -> dict[str, Result]:
    """Builds a policy, times its scoring and its update, and frees it."""
    device, seconds = bench.layout.device, bench.seconds
    batch = bench.workload.train_batch(vocabulary=bench.hf_config.text_config.vocab_size)
    if case.fp8 and (needs := recipe_refusal(case.fp8, on_gpu=device.type == "cuda")):
        return {phase: {"skipped": f"it needs {needs}"} for phase in ("score", "update")}
    with ExitStack() as stack:
        if case.kind == "authors":
            authors = AuthorsWay(
                bench.hf_config, bench.workload, device=device, dtype=bench.dtype, temperature=TEMPERATURE,
                rows_per_update=bench.settings.rows_per_update, rows_per_experience=bench.settings.rows_per_experience,
            )  # fmt: skip
            phases = {"score": authors.score, "update": partial(authors.update, batch)}
        else:
            ours = OurWay(
                bench.hf_config, bench.workload, layout=bench.layout, dtype=bench.dtype, settings=bench.settings,
                fp8=case.fp8,
            )  # fmt: skip
            stack.callback(ours.close)
            phases = {"score": ours.score, "update": partial(ours.update, batch)}

        def time_phase(name: str) -> Result:
            return time_together({name: phases[name]}, device=device, seconds=seconds)[name]

        return {name: _guarded(partial(time_phase, name), device) for name in phases}


def _guarded(work: Callable[[], Any], device: torch.device) -> Any:
    """Calls `work` and returns its result, or {'error': ...}, so that an error in one case does not lose the others."""
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
    finally:
        gc.collect()
        free_memory(device)
    return {"error": said}


def group_shapes(workload: Workload) -> list[GroupShape]:
    prompts = {response.group_id: response.prompt for response in workload.responses}
    return [
        GroupShape(
            prompt_tokens=len(prompt.token_ids),
            patches=math.prod(prompt.grids_thw[0]),
            response_tokens=tuple(len(r.token_ids) for r in workload.responses if r.group_id == group),
        )
        for group, prompt in prompts.items()
    ]


def layers_that_fit(hf_config: Any, memory_bytes: int) -> int:
    """Returns the largest number of language layers with which weights, gradients and optimizer leave enough memory for
    activations.

    Raises:
        ValueError: not even one layer fits.
    """
    with torch.device("meta"):
        one = AutoModelForImageTextToText.from_config(with_layers(hf_config, 1))
    layer = sum(parameter.numel() for parameter in one.model.language_model.layers[0].parameters())
    rest = sum(parameter.numel() for parameter in one.parameters()) - layer
    fitting = int((MEMORY_SHARE * memory_bytes / BYTES_PER_PARAMETER - rest) // layer)
    if fitting < 1:
        raise ValueError(
            f"with one language layer there are {rest + layer} parameters of {BYTES_PER_PARAMETER} bytes, more than "
            f"{MEMORY_SHARE:.0%} of {memory_bytes} bytes; choose a smaller --model"
        )
    return min(fitting, hf_config.text_config.num_hidden_layers)


def toy_config() -> Qwen2_5_VLConfig:
    """Makes a toy: two language layers of width 64, and two vision layers, one with attention over whole images."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 2, "hidden_size": 48, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64,
            "fullatt_block_indexes": [1], "window_size": 56,
        },
        image_token_id=310, video_token_id=311, vision_start_token_id=312, vision_end_token_id=313,
        tie_word_embeddings=False,
    )  # fmt: skip


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _phase_report(timing: Timing, flops: float, tokens: int, ceilings: dict[str, float | None]) -> dict[str, Any]:
    tflops = flops / timing.median / 1e12
    product = ceilings["product_tflops"]
    assert product is not None
    return {
        **timing.report(),
        "tokens_per_s": round(tokens / timing.median, 1),
        "tflops": round(tflops, 4),
        "of_ceiling": round(tflops / product, 4),
    }


def _speedup(phases: dict[str, dict[str, Any]], ours: str, other: str, phase: str) -> float | None:
    """Returns the other's seconds over ours; None if one of them was not measured."""
    seconds = [phases.get(case, {}).get(phase, {}).get("seconds") for case in (ours, other)]
    return round(seconds[1] / seconds[0], 3) if all(seconds) else None


if __name__ == "__main__":
    main()
