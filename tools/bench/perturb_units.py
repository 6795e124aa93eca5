"""Measures what `algorithm.perturb.per` changes: the same recorded responses scored under other perturbations.

    python tools/bench/perturb_units.py --run RUN_FOLDER --step N [--model HF_FOLDER]

Scores the responses of a step with perturbations of their own (`row`) and with one for an image (`image`), each drawn
twice, and prints one JSON object: how many of the tokens that the filter keeps are the same, and how alike the mean
dependencies are that the responses' advantages are scaled by. The model is that of the run's start; `--model` is
another folder of Hugging Face format. Runs on one process, from the folder in which `vppo train` ran.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench.machine import commit, hardware
from megatron_vppo.algorithm.assemble import visual_dependency
from megatron_vppo.algorithm.padding import length_mask
from megatron_vppo.algorithm.shaping import dependency_means
from megatron_vppo.algorithm.token_filter import top_token_mask
from megatron_vppo.algorithm.types import Response
from megatron_vppo.config.choices import PerturbUnit
from megatron_vppo.config.load import load_config
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.models.model_files import open_model_files
from megatron_vppo.observability.rollouts import read_rollouts, rollout_path
from megatron_vppo.parallel.layout import single_rank
from megatron_vppo.setup.inputs import open_inputs, read_prompts
from megatron_vppo.setup.model_folder import model_folder
from megatron_vppo.setup.policy import make_scorer
from megatron_vppo.setup.settings import vppo_settings

ONE_RANK = ("tensor_model_parallel_size=1", "pipeline_model_parallel_size=1", "context_parallel_size=1")
UNITS: tuple[PerturbUnit, ...] = ("row", "image")
DRAWS = (1_000_001, 1_000_002)
"""The steps that seed the two draws: no run gets that far, so neither is the draw of the run itself."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="the folder of a run")
    parser.add_argument("--step", required=True, type=int, help="the step whose recorded responses are scored")
    parser.add_argument("--model", help="a folder of Hugging Face format (default: the model that the run began with)")
    options = parser.parse_args(arguments)
    print(json.dumps(measure(options.run, options.step, model=options.model), indent=1))


def measure(run: Path, step: int, *, model: str | None = None) -> dict[str, Any]:
    """Scores the responses of a step under four perturbations, and compares them pair by pair."""
    config = one_rank_config(run, "row")
    source = model_folder(model or config.model.path)
    responses = recorded_responses(config, source, run, step)
    mask_BT = length_mask([len(response.token_ids) for response in responses])
    group_B = torch.tensor([response.group_id for response in responses])
    drawn = {
        (per, number): dependencies(one_rank_config(run, per), source, responses, mask_BT, draw=draw)
        for per in UNITS
        for number, draw in enumerate(DRAWS)
    }
    settings = vppo_settings(config)
    kept = {
        name: top_token_mask(
            dependency_BT,
            mask_BT,
            keep_fraction=settings.top_p_perception_tokens,
            stable=settings.stable_ranking,
            integer_ceil=settings.integer_ceil,
        )
        for name, dependency_BT in drawn.items()
    }
    means = {name: dependency_means(dependency_BT, mask_BT) for name, dependency_BT in drawn.items()}
    pairs: dict[str, list[dict[str, float]]] = {}
    for a, b in itertools.combinations(drawn, 2):
        pairs.setdefault(f"{a[0]}, {b[0]}", []).append(
            {
                "kept_overlap": overlap(kept[a], kept[b]),
                "mean_correlation": correlation(means[a], means[b]),
                "mean_correlation_within_groups": correlation(
                    within_groups(means[a], group_B), within_groups(means[b], group_B)
                ),
            }
        )
    return {
        "run": str(run),
        "step": step,
        "model": str(source),
        "responses": len(responses),
        "kept_by_chance": float(kept[UNITS[0], 0].sum() / mask_BT.sum()),
        "pairs": {name: {key: _mean([one[key] for one in found]) for key in found[0]} for name, found in pairs.items()},
        "hardware": hardware(),
        "git": commit(Path(__file__).resolve().parents[2]),
    }


def one_rank_config(run: Path, per: PerturbUnit) -> RunConfig:
    """Loads the settings of a run, for one rank and another unit of perturbation."""
    return load_config(run / "config.yaml", [*(f"parallel.{one}" for one in ONE_RANK), f"algorithm.perturb.per={per}"])


def recorded_responses(config: RunConfig, source: Path, run: Path, step: int) -> list[Response]:
    """Returns the recorded responses of a step that were trained on, in whole groups."""
    inputs = open_inputs(config, open_model_files(source))
    prompts = read_prompts(config, inputs, "train")
    index_of = {row: index for index, row in enumerate(prompts.rows)}
    numbers: dict[int, int] = {}
    responses = []
    for record in read_rollouts(rollout_path(run, step)):
        if not record.get("kept"):  # not trained on, so never scored
            continue
        row = record["row"]
        group = numbers.setdefault(row, len(numbers))
        responses.append(
            Response(
                prompt=prompts[index_of[row]],
                group_id=group,
                sample=record["sample"],
                token_ids=tuple(record["token_ids"]),
                rollout_logps=tuple(record["rollout_logps"]),
                finish_reason=record["finish_reason"],
                weight_version=step - 1,
            )
        )
    if not responses:
        raise SystemExit(f"{rollout_path(run, step)}: no response was scored in both views")
    return responses


def dependencies(
    config: RunConfig, source: Path, responses: Sequence[Response], mask_BT: Tensor, *, draw: int
) -> Tensor:
    """Scores both views of all responses; returns their dependency on the image, [B, T] nats."""
    settings = vppo_settings(config)
    with single_rank() as layout:
        scorer = make_scorer(config, layout, source, open_inputs(config, open_model_files(source)))
        scores = scorer.score(responses, step=draw, views="both", divergence=settings.divergence)
    dependency_BT = visual_dependency(responses, scores, mask_BT, settings=settings)
    assert dependency_BT is not None, "both views are scored for a run that needs them"
    return dependency_BT


def overlap(a_BT: Tensor, b_BT: Tensor) -> float:
    """Returns the share of the tokens kept in one that are kept in the other; as many are kept in both."""
    return float((a_BT * b_BT).sum() / a_BT.sum())


def within_groups(value_B: Tensor, group_B: Tensor) -> Tensor:
    """Returns each value less the mean of its group."""
    of_group = torch.stack([value_B[group_B == group].mean() for group in range(int(group_B.max()) + 1)])
    return value_B - of_group[group_B]


def correlation(a_B: Tensor, b_B: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a_B, b_B]).double())[0, 1])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
