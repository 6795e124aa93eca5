"""`vppo fp8-fidelity`: how much FP8 changes what VPPO decides about the same responses."""

from __future__ import annotations

import argparse
import os
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from megatron_vppo.cli.output import say
from megatron_vppo.config.choices import Fp8Recipe
from megatron_vppo.config.load import load_config
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.fidelity.measure import measure_fidelity, refusal
from megatron_vppo.fidelity.page import compared, precision, subject
from megatron_vppo.setup.hardware import slower_layers
from megatron_vppo.setup.run_folder import RunFolder

WIDTH = 110
"""Characters per line."""
COLUMNS = (
    "                 log-prob difference, nats      perturbed image  rank correlation kept in both             scale",
    "                  mean     p50     p99     max    mean     p99    all    each    all   each least    lost    max",
)


def run_fp8_fidelity(options: argparse.Namespace) -> int:
    """Measures, prints the table and the path of the page.

    Raises:
        ValueError: it was started as one of several ranks, or the settings do not allow a recipe.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("fp8-fidelity runs in one process; start it without torchrun and srun")
    config = load_config(options.config, options.overrides)
    folder = options.out or RunFolder.of(config.trainer).root / "fp8_fidelity"
    if torch.cuda.is_available() and (warning := slower_layers(config, on_gpu=True)):
        say(warning)
    report = measure_fidelity(
        config,
        recipes=_recipes(config, options.recipe),
        num_prompts=options.prompts or config.data.rollout_batch_size,
        folder=folder,
    )
    say("\n".join(_table(report)))
    say(f"page: {folder / 'fidelity.html'}")
    return 0


def _recipes(config: RunConfig, asked: Sequence[Fp8Recipe] | None) -> list[Fp8Recipe]:
    """Returns the recipes asked for; or the run's own; or, if it has none, all that can be measured here."""
    chosen = asked or ([config.fp8.recipe] if config.fp8.recipe else None)
    every: Sequence[Fp8Recipe] = chosen or typing.get_args(Fp8Recipe)
    reasons = {recipe: refusal(recipe, config, on_gpu=torch.cuda.is_available()) for recipe in every}
    refused = [f"{recipe}: {reason}" for recipe, reason in reasons.items() if reason is not None]
    if chosen and refused:
        raise ValueError("; ".join(refused))
    for line in refused:
        say(f"left out: {line}")
    if not any(reason is None for reason in reasons.values()):
        raise ValueError("no FP8 recipe can be measured here; the lines above say why")
    return [recipe for recipe, reason in reasons.items() if reason is None]


def _table(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"\n{precision(report)} against {report['baseline_dtype']}: {report['model']}"
    yield from textwrap.wrap(subject(report), WIDTH)
    yield from ("", *COLUMNS)
    for label, found in compared(report).items():
        logp, perturbed = found["logp"], found["masked_logp"]
        nats = (logp["mean"], logp["p50"], logp["p99"], logp["largest"], perturbed["mean"], perturbed["p99"])
        yield (
            f"{label:14}"
            + "".join(f" {value:7.1e}" for value in nats)
            + f" {_or_none(found['spearman'], '7.4f')} {_or_none(found['spearman_per_response'], '7.4f')}"
            + f" {found['overlap']:6.1%} {found['overlap_per_response']:6.1%} {found['overlap_least']:5.0%}"
            + f" {_or_none(found['lost_dependency'], '7.1e')} {found['scale']['largest']:6.3f}"
        )
    yield ""
    yield from textwrap.wrap(
        "rank correlation: Spearman's, of the tokens' visual dependency. kept in both: share of the kept tokens that "
        "are also kept in the other precision. all: over all tokens; each: mean over responses; least: the response "
        "with the least; lost: share of the kept tokens' dependency on tokens that are not kept in both. scale: the "
        f"largest change of the factor on an advantage (the largest factor is {report['scale_largest']:.3f}).",
        WIDTH,
    )


def _or_none(value: float | None, form: str) -> str:
    return "   none" if value is None else format(value, form)
