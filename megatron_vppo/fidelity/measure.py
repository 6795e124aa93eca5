"""Does FP8 change what VPPO picks? The same responses scored in the configured dtype and in FP8, and what differs.

Shape suffix legend: B = responses, N = any number of values.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vppo.algorithm.types import Response, Scores
from megatron_vppo.config.choices import Fp8Recipe
from megatron_vppo.config.schema import ParallelConfig, RunConfig
from megatron_vppo.fidelity.compare import Decisions, Differences, compare, decisions, spread
from megatron_vppo.fidelity.emulation import emulated_fp8
from megatron_vppo.fidelity.page import write_fidelity_page
from megatron_vppo.models.options import Fp8Options
from megatron_vppo.models.precision import check_ends
from megatron_vppo.parallel.layout import Layout, destroy_layout, init_layout
from megatron_vppo.parallel.scorer import Scorer
from megatron_vppo.rollout.sampler import EngineSampler, group_seeds
from megatron_vppo.setup.engines import start_engine
from megatron_vppo.setup.hardware import check_fp8_hardware, recipe_refusal
from megatron_vppo.setup.inputs import RunInputs, open_inputs, read_prompts
from megatron_vppo.setup.model_folder import model_folder
from megatron_vppo.setup.policy import make_scorer
from megatron_vppo.setup.sampling import eos_ids, train_sampling
from megatron_vppo.setup.settings import vppo_settings
from megatron_vppo.weights.stream import hf_weights

STEP = 1
"""Training step whose seeds and perturbations are taken."""
LOGP_EDGES = torch.logspace(-8, 1, 37, dtype=torch.float64)
DEPENDENCY_EDGES = torch.logspace(-16, 1, 52, dtype=torch.float64)
"""Nats; the outer bins also hold what lies beyond them. Small dependencies go with the square of log-probs."""
SHARE_EDGES = torch.linspace(0, 1, 21, dtype=torch.float64)


def refusal(recipe: Fp8Recipe, config: RunConfig, *, on_gpu: bool) -> str | None:
    """Why a recipe cannot be measured with this config on this machine; None: it can."""
    if recipe == "delayed" and config.fp8.bf16_layers_at_ends:
        return f"takes no fp8.bf16_layers_at_ends ({config.fp8.bf16_layers_at_ends})"
    if not on_gpu:
        return None
    if recipe == "delayed":
        return "scales by what updates have seen, and before the first one by 1; see docs/fp8.md"
    missing = recipe_refusal(recipe, on_gpu=True)
    return missing and f"needs {missing}"


def measure_fidelity(
    config: RunConfig, *, recipes: Sequence[Fp8Recipe], num_prompts: int, folder: Path
) -> dict[str, Any]:
    """Samples responses with the config's engine, scores them in every precision, and writes fidelity.json and
    fidelity.html into `folder`.

    The model runs on one rank, whatever layout the config has for training. On a GPU FP8 is TransformerEngine's,
    elsewhere it is emulated.

    Args:
        num_prompts: the first so many with an image, of the validation split where there is one.

    Returns:
        What fidelity.json holds: figures by recipe, and what they were measured on.

    Raises:
        ValueError: ends that a recipe does not take, a recipe that this machine cannot run, no prompt with an image.
    """
    config, ends = _on_one_rank(config), config.fp8.bf16_layers_at_ends
    layout = init_layout(tensor=1, pipeline=1, timeout_seconds=config.parallel.collective_timeout_seconds)
    if layout.device.type == "cpu":
        torch.set_num_threads(config.parallel.threads_per_rank)
    try:
        source = model_folder(config.model.path)
        inputs = open_inputs(config, source)
        on_gpu = layout.device.type == "cuda"
        for recipe in recipes:
            check_ends(Fp8Options(recipe, ends), layers=inputs.hf_config.text_config.num_hidden_layers)
            if on_gpu:
                check_fp8_hardware(_in_fp8(config, recipe), on_gpu=True)
        scorer, responses = _scorer_and_responses(
            config, layout, source, inputs, num_prompts=num_prompts, logs=folder / "logs"
        )
        baseline = _decisions(config, responses, _score(scorer, config, responses))

        def figures(scores: Scores) -> dict[str, Any]:
            return _figures(compare(baseline, _decisions(config, responses, scores), responses))

        found = {}
        for recipe in recipes:
            if on_gpu:
                found[recipe] = figures(_score_anew(_in_fp8(config, recipe), layout, source, inputs, responses))
            else:
                with emulated_fp8(scorer.stages, Fp8Options(recipe, ends)):
                    found[recipe] = figures(_score(scorer, config, responses))
        controls = {}
        if config.model.dtype == "float32":  # what training on a GPU does to it without FP8
            controls["bfloat16"] = figures(_score_anew(_in_bfloat16(config), layout, source, inputs, responses))
    finally:
        destroy_layout()
    report = {"emulated": not on_gpu, **_subject(config, responses, baseline), "recipes": found, "controls": controls}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fidelity.json").write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    write_fidelity_page(report, folder / "fidelity.html")
    return report


def _on_one_rank(config: RunConfig) -> RunConfig:
    """The same run with one engine, and without FP8."""
    parallel = ParallelConfig(
        threads_per_rank=config.parallel.threads_per_rank,
        collective_timeout_seconds=config.parallel.collective_timeout_seconds,
    )
    rollout = config.rollout.model_copy(update={"num_engines": 1, "tensor_parallel_size": 1})
    fp8 = config.fp8.model_copy(update={"recipe": None})
    return config.model_copy(update={"parallel": parallel, "rollout": rollout, "fp8": fp8})


def _in_fp8(config: RunConfig, recipe: Fp8Recipe) -> RunConfig:
    """Of TransformerEngine's."""
    return config.model_copy(update={"fp8": config.fp8.model_copy(update={"recipe": recipe, "scope": ("scoring",)})})


def _in_bfloat16(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})


def _scorer_and_responses(
    config: RunConfig, layout: Layout, source: Path, inputs: RunInputs, *, num_prompts: int, logs: Path
) -> tuple[Scorer, list[Response]]:
    """The engine is gone when they are there: scoring has the machine to itself."""
    split = "val" if "val" in inputs.datasets else "train"
    with_image = (prompt for prompt in read_prompts(config, inputs, split) if prompt.images)
    prompts = list(itertools.islice(with_image, num_prompts))
    if not prompts:
        raise ValueError(f"none of the prompts of data.{split}_files has an image: there is no dependency to compare")
    with ExitStack() as stack:
        engine = start_engine(config, layout, source, images=inputs.images, hf_config=inputs.hf_config, logs=logs)
        sampler = EngineSampler(
            engine.client, engine_index=engine.index, num_engines=engine.count, images=inputs.images,
            verify=config.rollout.verify_weights,
        )  # fmt: skip
        stack.callback(sampler.close)
        assert engine.client is not None, "a single rank leads an engine"
        # Before the model is built: on a GPU vLLM measures while it starts how much memory is free.
        engine.client.wait_ready(timeout_seconds=config.rollout.start_timeout_seconds)
        scorer = make_scorer(config, layout, source, inputs)
        sampler.send_weights(hf_weights(scorer.stages), version=0)
        seeds = group_seeds(
            prompts, kind=config.rollout.seeds, run_seed=config.trainer.seed, step=STEP, attempt=0, n=config.rollout.n
        )
        sampling = train_sampling(config, eos_ids(source, inputs.processor.tokenizer))
        groups = sampler.generate(prompts, seeds=seeds, sampling=sampling)
    return scorer, [response for group in groups for response in group]


def _score(scorer: Scorer, config: RunConfig, responses: Sequence[Response]) -> Scores:
    kind = config.algorithm.dependency
    return scorer.score(responses, step=STEP, views="both", divergence=None if kind == "k3_sampled" else kind)


def _score_anew(
    config: RunConfig, layout: Layout, source: Path, inputs: RunInputs, responses: Sequence[Response]
) -> Scores:
    """Scores by a model of its own, which is gone afterwards."""
    scores = _score(make_scorer(config, layout, source, inputs), config, responses)
    gc.collect()  # modules refer to each other in circles
    return scores


def _decisions(config: RunConfig, responses: Sequence[Response], scores: Scores) -> Decisions:
    return decisions(
        responses,
        scores,
        settings=vppo_settings(config),
        responses_per_minibatch=config.actor.global_batch_size * config.rollout.n,
        micro_batch_size=config.actor.micro_batch_size_per_device_for_update,
    )


def _subject(config: RunConfig, responses: Sequence[Response], baseline: Decisions) -> dict[str, Any]:
    """What was measured on."""
    rows = zip(baseline.dependency_BT, responses, strict=True)
    dependency_N = torch.cat([row_T[: len(response.token_ids)] for row_T, response in rows])
    return {
        "model": config.model.path,
        "baseline_dtype": config.model.dtype,
        "bf16_layers_at_ends": config.fp8.bf16_layers_at_ends,
        "split": responses[0].prompt.split,
        "prompts": len({response.group_id for response in responses}),
        "responses": len(responses),
        "tokens": len(dependency_N),
        "dependency": config.algorithm.dependency,
        "dependency_median": spread(dependency_N).p50,
        "top_p_perception_tokens": config.algorithm.top_p_perception_tokens,
        "scale_largest": baseline.scale_B.max().item(),
    }


def _figures(found: Differences) -> dict[str, Any]:
    ranked_B = found.spearman_B[found.spearman_B.isfinite()]
    return {
        "logp": asdict(spread(found.logp_N)),
        "masked_logp": asdict(spread(found.perturbed_logp_N)),
        "dependency": asdict(spread(found.dependency_N)),
        "spearman": _finite(found.spearman),
        "spearman_per_response": _finite(ranked_B.mean().item()),
        "responses_ranked": len(ranked_B),
        "overlap": found.overlap,
        "overlap_per_response": found.overlap_B.mean().item(),
        "lost_dependency": _finite(found.lost_dependency),
        "overlap_least": found.overlap_B.min().item(),
        "trajectory_score": asdict(spread(found.dependency_mean_B)),
        "scale": asdict(spread(found.scale_B)),
        "histograms": {
            "logp_edges": LOGP_EDGES.tolist(),
            "dependency_edges": DEPENDENCY_EDGES.tolist(),
            "overlap_edges": SHARE_EDGES.tolist(),
            "logp": _counts(found.logp_N, LOGP_EDGES),
            "masked_logp": _counts(found.perturbed_logp_N, LOGP_EDGES),
            "dependency_up": _counts(found.dependency_N[found.dependency_N > 0], DEPENDENCY_EDGES),
            "dependency_down": _counts(-found.dependency_N[found.dependency_N <= 0], DEPENDENCY_EDGES),
            "overlap": _counts(found.overlap_B, SHARE_EDGES),
        },
    }


def _counts(value_N: Tensor, edges: Tensor) -> list[int]:
    """Values per bin; an edge belongs to the bin above it, the last one to the last bin."""
    bins = len(edges) - 1
    bin_N = (torch.bucketize(value_N.double(), edges, right=True) - 1).clamp(0, bins - 1)
    counts: list[int] = torch.bincount(bin_N, minlength=bins).tolist()
    return counts


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
