"""Does FP8 change what VPPO picks? Scores the same responses in the configured dtype and in FP8, and compares."""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vppo.algorithm.settings import divergence_of
from megatron_vppo.algorithm.types import Response, Scores
from megatron_vppo.config.choices import Fp8Recipe
from megatron_vppo.config.schema import ParallelConfig, RunConfig
from megatron_vppo.fidelity.compare import Decisions, compare, decide
from megatron_vppo.fidelity.emulation import emulated_fp8
from megatron_vppo.fidelity.figures import difference_figures, subject_figures
from megatron_vppo.fidelity.page import write_fidelity_page
from megatron_vppo.models.model_files import open_model_files
from megatron_vppo.models.options import Fp8Options
from megatron_vppo.models.precision import check_ends
from megatron_vppo.parallel.layout import Layout, destroy_layout, init_layout
from megatron_vppo.parallel.scorer import Scorer
from megatron_vppo.rollout.sampler import EngineSampler
from megatron_vppo.rollout.seeds import sample_seeds
from megatron_vppo.setup.engines import start_engine
from megatron_vppo.setup.hardware import check_fp8_hardware, recipe_refusal
from megatron_vppo.setup.inputs import RunInputs, open_inputs, read_prompts
from megatron_vppo.setup.model_folder import model_folder
from megatron_vppo.setup.policy import make_scorer
from megatron_vppo.setup.preflight import check_run
from megatron_vppo.setup.sampling import train_sampling
from megatron_vppo.setup.settings import vppo_settings
from megatron_vppo.setup.world import world_of_one
from megatron_vppo.weights.stream import hf_weights

STEP = 1
"""The training step whose seeds and perturbations are used."""


def refusal(recipe: Fp8Recipe, config: RunConfig, *, on_gpu: bool) -> str | None:
    """Returns the reason why a recipe cannot be measured with this config on this machine, or None."""
    if recipe == "delayed" and config.fp8.bf16_layers_at_ends:
        return f"takes no fp8.bf16_layers_at_ends ({config.fp8.bf16_layers_at_ends}); set it to 0"
    if not on_gpu:
        return None
    if recipe == "delayed":
        return "takes its scales from past updates, and has a scale of 1 before the first one; see docs/fp8.md"
    missing = recipe_refusal(recipe, on_gpu=True)
    return None if missing is None else f"needs {missing}"


def measure_fidelity(
    config: RunConfig, *, recipes: Sequence[Fp8Recipe], num_prompts: int, folder: Path
) -> dict[str, Any]:
    """Samples responses with the config's engine, scores them in every precision, and writes fidelity.json and
    fidelity.html into `folder`.

    The model runs on one rank, whatever layout the config has for training. On a GPU, FP8 is TransformerEngine's;
    elsewhere it is emulated.

    Args:
        num_prompts: take the first prompts with an image, of the validation split if there is one.

    Returns:
        The contents of fidelity.json: figures by recipe, and what they were measured on.

    Raises:
        ValueError: as `check_run`; ends that a recipe does not take, a recipe that this machine cannot run, no prompt
            with an image.
    """
    config = _on_one_rank(config)
    source = model_folder(config.model.path)
    files = open_model_files(source)
    check_run(config, files.hf_config, world_size=1, on_gpu=torch.cuda.is_available())
    layout = init_layout(tensor=1, pipeline=1, timeout_seconds=config.parallel.collective_timeout_seconds)
    if layout.device.type == "cpu":
        torch.set_num_threads(config.parallel.threads_per_rank)
    try:
        model = _Model(layout, source, open_inputs(config, files))
        _check_recipes(config, recipes, model)
        scorer, responses = _scorer_and_responses(config, model, num_prompts=num_prompts, logs=folder / "logs")
        report = _compare_precisions(config, recipes, model, scorer, responses)
    finally:
        destroy_layout()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fidelity.json").write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    write_fidelity_page(report, folder / "fidelity.html")
    return report


@dataclass(frozen=True)
class _Model:
    """The model that is measured, and the rank that it runs on."""

    layout: Layout
    source: Path
    """The model's folder."""
    inputs: RunInputs

    @property
    def on_gpu(self) -> bool:
        return self.layout.device.type == "cuda"

    def scorer(self, config: RunConfig) -> Scorer:
        """Loads the model in the precision of the config."""
        return make_scorer(config, self.layout, self.source, self.inputs)


def _check_recipes(config: RunConfig, recipes: Sequence[Fp8Recipe], model: _Model) -> None:
    layers = model.inputs.hf_config.text_config.num_hidden_layers
    for recipe in recipes:
        check_ends(Fp8Options(recipe, config.fp8.bf16_layers_at_ends), layers=layers)
        if model.on_gpu:
            check_fp8_hardware(_in_fp8(config, recipe), on_gpu=True)


def _compare_precisions(
    config: RunConfig, recipes: Sequence[Fp8Recipe], model: _Model, scorer: Scorer, responses: Sequence[Response]
) -> dict[str, Any]:
    """Returns the contents of fidelity.json.

    Args:
        scorer: the model in the configured dtype.
    """
    baseline = _decide(config, responses, _score(scorer, config, responses))

    def figures(scores: Scores) -> dict[str, Any]:
        return difference_figures(compare(baseline, _decide(config, responses, scores), responses))

    found = {}
    for recipe in recipes:
        if model.on_gpu:
            found[recipe] = figures(_score_with_own_model(_in_fp8(config, recipe), model, responses))
        else:
            with emulated_fp8(scorer.stages, Fp8Options(recipe, config.fp8.bf16_layers_at_ends)):
                found[recipe] = figures(_score(scorer, config, responses))
    controls = {}
    if config.model.dtype == "float32":  # training on a GPU would be in bfloat16: what does that change alone?
        controls["bfloat16"] = figures(_score_with_own_model(_in_bfloat16(config), model, responses))
    subject = subject_figures(config, responses, baseline)
    return {"emulated": not model.on_gpu, **subject, "recipes": found, "controls": controls}


def _on_one_rank(config: RunConfig) -> RunConfig:
    """Makes the settings of the same run with one engine, and without FP8."""
    parallel = ParallelConfig(
        threads_per_rank=config.parallel.threads_per_rank,
        collective_timeout_seconds=config.parallel.collective_timeout_seconds,
    )
    rollout = config.rollout.model_copy(update={"num_engines": 1, "tensor_parallel_size": 1})
    fp8 = config.fp8.model_copy(update={"recipe": None})
    return config.model_copy(update={"parallel": parallel, "rollout": rollout, "fp8": fp8})


def _in_fp8(config: RunConfig, recipe: Fp8Recipe) -> RunConfig:
    """Makes the settings of the same run, with TransformerEngine's FP8 in scoring."""
    return config.model_copy(update={"fp8": config.fp8.model_copy(update={"recipe": recipe, "scope": ("scoring",)})})


def _in_bfloat16(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})


def _scorer_and_responses(
    config: RunConfig, model: _Model, *, num_prompts: int, logs: Path
) -> tuple[Scorer, list[Response]]:
    """Builds the model in the configured dtype, and samples responses of it through a vLLM engine.

    The engine is closed again, so that scoring has the machine to itself.
    """
    layout, source, inputs = model.layout, model.source, model.inputs
    split = "val" if config.data.val_files is not None else "train"
    with_image = (prompt for prompt in read_prompts(config, inputs, split) if prompt.images)
    prompts = list(itertools.islice(with_image, num_prompts))
    if not prompts:
        raise ValueError(
            f"none of the prompts of data.{split}_files has an image, so there is no dependency to compare; "
            f"set data.{split}_files to data with images"
        )
    with ExitStack() as stack:
        world = world_of_one()
        engine = start_engine(config, layout, source, world=world, inputs=inputs, logs=logs)
        sampler = EngineSampler(
            engine.client, engine_index=engine.index, num_engines=engine.count, images=inputs.images,
            verify=config.rollout.verify_weights, store=world.meeting.store("engines"),
            max_num_seqs=engine.max_num_seqs,
        )  # fmt: skip
        stack.callback(sampler.close)
        assert engine.client is not None, "a single rank leads an engine"
        # Before the model is built: while vLLM starts on a GPU, it measures how much memory is free.
        engine.client.wait_ready(timeout_seconds=config.rollout.start_timeout_seconds)
        scorer = model.scorer(config)
        sampler.send_weights(hf_weights(scorer.stages), version=0)
        seeds = [
            sample_seeds(
                config.rollout.seeds, n=config.rollout.n, run_seed=config.trainer.seed, step=STEP, attempt=0,
                split=prompt.split, row=prompt.row,
            )
            for prompt in prompts
        ]  # fmt: skip
        sampling = train_sampling(config, inputs.eos_ids)
        groups = sampler.generate(prompts, seeds=seeds, sampling=sampling)
    return scorer, [response for group in groups for response in group]


def _score(scorer: Scorer, config: RunConfig, responses: Sequence[Response]) -> Scores:
    kind = config.algorithm.dependency
    return scorer.score(
        responses,
        step=STEP,
        views="both",
        divergence=divergence_of(kind),
        with_visual_focus=kind == "visual_focus",
    )


def _score_with_own_model(config: RunConfig, model: _Model, responses: Sequence[Response]) -> Scores:
    """Loads the model in the config's precision, scores with it, and lets it go."""
    scores = _score(model.scorer(config), config, responses)
    gc.collect()  # modules refer to each other in circles
    return scores


def _decide(config: RunConfig, responses: Sequence[Response], scores: Scores) -> Decisions:
    return decide(
        responses,
        scores,
        settings=vppo_settings(config),
        responses_per_minibatch=config.actor.global_batch_size * config.rollout.n,
        micro_batch_size=config.actor.micro_batch_size_per_device_for_update,
    )
