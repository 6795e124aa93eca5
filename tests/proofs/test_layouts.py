"""One micro-batched, packed scoring pass and gradient against transformers, for every layout of this table.

Adding a layout is one line of LAYOUTS. `tools/layout_table.py` writes the table of docs/layouts.md from these runs.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file
from torch import Tensor

from megatron_vppo.models.options import ModelOptions
from megatron_vppo.parallel.policy import MegatronPolicy
from tests.gloo import run_gloo
from tests.models.tiny import tiny_config, tiny_qwen3_config
from tests.parallel.case import Case
from tests.parallel.policy_rig import (
    OPTIM,
    STEP,
    Outcome,
    hf_gradients,
    make_batch,
    make_policy,
    make_responses,
    saved_models,
)

LOGP_TOLERANCE = 1e-5
FOCUS_TOLERANCE = 1e-5
KL_TOLERANCE = 5e-5
NORM_TOLERANCE = 1e-5
"""Relative."""
GRADIENT_TOLERANCE = 1e-4
"""Relative, of each tensor's norm."""
CHANGE_TOLERANCE = 1e-4
"""The same, of what an update changes."""

BFLOAT16_MEAN, BFLOAT16_LARGEST = 0.03, 0.15
"""Nats; about twice what was seen."""
BFLOAT16_GRADIENT = 0.06
"""The tolerance for the gradient of all parameters together, relative to its norm."""


SP = ModelOptions(sequence_parallel=True)
SP_IMAGES = ModelOptions(sequence_parallel=True, vision_split="images")
IMAGES = ModelOptions(vision_split="images")
UNEVEN = ModelOptions(pipeline_layers=(2, 3))
INTERLEAVED = ModelOptions(virtual_stages=2, pipeline_layers=(2, 1, 1, 1))
"""Two layers on the first stage, which both take deepstack features."""

LAYOUTS = {
    "one rank": Case(),
    "one rank, attention recomputed": Case(options=ModelOptions(recompute="selective")),
    "TP 2": Case(tensor=2),
    "TP 2, sequence parallel": Case(tensor=2, options=SP),
    "TP 2, images shared out": Case(tensor=2, options=IMAGES),
    "CP 2": Case(context=2),
    "CP 2, recomputed": Case(context=2, options=ModelOptions(recompute="full")),
    "CP 2, attention recomputed": Case(context=2, options=ModelOptions(recompute="selective")),
    "PP 2, uneven": Case(pipeline=2, options=UNEVEN),
    "PP 2, interleaved": Case(pipeline=2, options=INTERLEAVED),
    "DP 2": Case(data=2),
    "DP 2, overlapped": Case(data=2, overlap=True),
    "TP 2 x CP 2, sequence parallel": Case(tensor=2, context=2, options=SP),
    "TP 2 x CP 2, sequence parallel, images shared out": Case(tensor=2, context=2, options=SP_IMAGES),
    "TP 2 x PP 2, sequence parallel, interleaved, recomputed": Case(
        tensor=2, pipeline=2, options=dataclasses.replace(INTERLEAVED, sequence_parallel=True, recompute="full")
    ),
    "TP 2 x PP 2, interleaved, images shared out": Case(
        tensor=2, pipeline=2, options=dataclasses.replace(INTERLEAVED, vision_split="images")
    ),
    "TP 2 x PP 2, sequence parallel, images shared out, attention recomputed": Case(
        tensor=2, pipeline=2, options=dataclasses.replace(SP_IMAGES, pipeline_layers=(3, 2), recompute="selective")
    ),
    "CP 2 x PP 2, uneven": Case(context=2, pipeline=2, options=UNEVEN),
    "CP 2 x PP 2, interleaved": Case(context=2, pipeline=2, options=INTERLEAVED),
    "CP 2 x PP 2, interleaved, overlapped": Case(context=2, pipeline=2, options=INTERLEAVED, overlap=True),
    "CP 3": Case(context=3),
    "PP 3": Case(pipeline=3, options=ModelOptions(pipeline_layers=(2, 2, 1))),
    "CP 4": Case(context=4),
    "CP 2, padded as FP8 wants": Case(context=2, token_alignment=128),
    "TP 2, sequence parallel, padded as FP8 wants": Case(tensor=2, options=SP, token_alignment=32),
    "CP 2 x DP 2": Case(context=2, data=2),
    "TP 2 x DP 2, sequence parallel, images shared out, overlapped": Case(
        tensor=2, data=2, options=SP_IMAGES, overlap=True
    ),
    "TP 2 x CP 2 x PP 2, sequence parallel, images shared out": Case(
        tensor=2, context=2, pipeline=2, options=dataclasses.replace(SP_IMAGES, pipeline_layers=(4, 1))
    ),
}

DAILY_ON_FOUR = (
    "TP 2 x CP 2, sequence parallel, images shared out",
    "TP 2 x PP 2, sequence parallel, interleaved, recomputed",
    "CP 2 x PP 2, uneven",
    "CP 4",
)
"""The layouts on four ranks that are not `extended`."""

MODELS = {
    "Qwen2.5-VL": tiny_config(tied=False, vocab=299, num_hidden_layers=5),
    "Qwen3-VL": tiny_qwen3_config(tied=True, vocab=301, taps=(0, 2), num_hidden_layers=5),
}
"""No vocabulary is divisible by 2."""
EXPECTED = "expected.pickle"
ROWS_EACH = (1, 8)
"""Rows of a micro-batch: one by one, some without an image; all packed, which leaves other micro-batches idle, and in
which responses share the prompt of their group (not under context parallelism)."""


@dataclass(frozen=True)
class Found:
    logp: float
    """Largest difference of log-probs (either view) and entropies, in nats."""
    kl: float
    focus: float
    """Largest difference of the cosines of hidden states."""
    norm: float
    """Relative difference of the norm of all gradients together, as the optimizer sees it."""
    gradient: float
    """Largest relative difference of a parameter's gradient."""
    gradient_of: str
    change: float
    """The same of what an update with the distributed optimizer makes of a parameter."""
    change_of: str


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Outcome]]:
    made = saved_models(MODELS, tmp_path_factory.mktemp("models"), entropy_kind="entropy")
    for folder, expected in made.values():
        (folder / EXPECTED).write_bytes(pickle.dumps(expected))
    return made


Results = dict[tuple[str, str, int], Found]
"""By layout, model and rows of a micro-batch."""


def is_extended(name: str) -> bool:
    """Tells if a layout is left to `make test-all`."""
    ranks = LAYOUTS[name].ranks
    return name not in DAILY_ON_FOUR if ranks == 4 else ranks != 2


@pytest.fixture(scope="module")
def results_of(models: dict[str, tuple[Path, Outcome]]) -> Callable[[str], Results]:
    """Results of the layouts that are started together: those with as many ranks as the given one, extended or not."""
    done: dict[tuple[int, bool], Results] = {}

    def results(name: str) -> Results:
        together = (LAYOUTS[name].ranks, is_extended(name))
        if together not in done:
            names = [other for other, case in LAYOUTS.items() if (case.ranks, is_extended(other)) == together]
            folders = {model: folder for model, (folder, _) in models.items()}
            (done[together], *others) = run_gloo(_rank, together[0], names, folders, timeout_seconds=600)
            assert all(other.keys() == done[together].keys() for other in others)
            for other in others:  # every rank has the whole result, and the same
                assert {key: found.gradient for key, found in other.items()} == {
                    key: found.gradient for key, found in done[together].items()
                }
        return done[together]

    return results


def _rank(rank: int, world: int, names: list[str], folders: dict[str, Path]) -> Results:
    found = {}
    models: dict[str, tuple[Path, Outcome]] = {
        model: (folder, pickle.loads((folder / EXPECTED).read_bytes())) for model, folder in folders.items()
    }
    for name in names:
        case = LAYOUTS[name]
        layout = case.open()
        optim = dataclasses.replace(OPTIM, overlap_grad_reduce=case.overlap)
        whole = dataclasses.replace(optim, use_distributed_optimizer=False)  # whose ranks have all of each gradient
        for model, (folder, expected) in models.items():
            make = functools.partial(
                make_policy, folder, layout, options=case.options, token_alignment=case.token_alignment
            )
            changes = _changes(make(rows=4, optim=optim), folder)
            change = _worst("change", changes, _minus_start(expected.weights.items(), folder))
            for rows in ROWS_EACH:
                policy = make(rows=rows, optim=whole)
                scores = policy.score(
                    make_responses(), step=STEP, views="both", divergence="kl_full", with_visual_focus=True
                )
                policy.accumulate_gradients(make_batch(make_responses(), "entropy"))
                policy.trainable.optimizer.prepare_grads()
                norm = float(policy.trainable.optimizer.get_grad_norm())
                assert scores.perturbed_logp_BT is not None and scores.divergence_BT is not None
                assert scores.perturbed_entropy_BT is not None and expected.perturbed_entropy_BT is not None
                assert scores.visual_focus_BT is not None and expected.visual_focus_BT is not None
                pairs = (
                    (scores.old_logp_BT, expected.logp_BT),
                    (scores.perturbed_logp_BT, expected.perturbed_logp_BT),
                    (scores.entropy_BT, expected.entropy_BT),
                    (scores.perturbed_entropy_BT, expected.perturbed_entropy_BT),
                )
                found[name, model, rows] = Found(
                    logp=max(float((mine - right).abs().max()) for mine, right in pairs),
                    kl=float((scores.divergence_BT - expected.kl_BT).abs().max()),
                    focus=float((scores.visual_focus_BT - expected.visual_focus_BT).abs().max()),
                    norm=abs(norm / expected.metrics["actor/grad_norm"] - 1.0),
                    **_worst("gradient", hf_gradients(policy), expected.gradients),
                    **change,
                )
        parallel_state.destroy_model_parallel()
    return found


def _changes(policy: MegatronPolicy, folder: Path) -> dict[str, Tensor]:
    policy.update(make_batch(make_responses(), "entropy"))
    return _minus_start(policy.hf_weights(), folder)


def _minus_start(weights: Iterable[tuple[str, Tensor]], folder: Path) -> dict[str, Tensor]:
    start = load_file(folder / "model.safetensors")
    return {name: weight - start[name] for name, weight in weights}


def _worst(what: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    """The largest relative difference of a tensor, and its name."""
    assert found.keys() == expected.keys()
    off = {name: float((found[name] - right).norm() / right.norm()) for name, right in expected.items()}
    worst = max(off, key=lambda name: off[name])
    return {what: off[worst], f"{what}_of": worst}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.extended] if is_extended(name) else []) for name in LAYOUTS],
)
def test_equals_transformers(
    name: str, results_of: Callable[[str], Results], record_property: Callable[[str, object], None]
) -> None:
    results = {key: found for key, found in results_of(name).items() if key[0] == name}
    assert len(results) == len(MODELS) * len(ROWS_EACH)
    for (_, model, rows), found in results.items():
        where = f"{name}, {model}, {rows} rows a micro-batch"
        assert found.logp < LOGP_TOLERANCE, f"{where}: log-probs off by {found.logp:.1e}"
        assert found.kl < KL_TOLERANCE, f"{where}: divergence off by {found.kl:.1e}"
        assert found.focus < FOCUS_TOLERANCE, f"{where}: visual focus off by {found.focus:.1e}"
        assert found.norm < NORM_TOLERANCE, f"{where}: norm of all gradients off by {found.norm:.1e}"
        off = f"{found.gradient:.1e} of its norm"
        assert found.gradient < GRADIENT_TOLERANCE, f"{where}: gradient of {found.gradient_of} off by {off}"
        off = f"{found.change:.1e} of its norm"
        assert found.change < CHANGE_TOLERANCE, f"{where}: change of {found.change_of} off by {off}"
    for model in MODELS:
        mine = [found for key, found in results.items() if key[1] == model]
        record_property(f"{model}: log-probs", max(found.logp for found in mine))
        record_property(f"{model}: gradients", max(found.gradient for found in mine))


def _rank_rounded(rank: int, world: int, folders: dict[str, Path]) -> dict[str, tuple[Tensor, float]]:
    """Differences of log-probs, and of the gradient of all parameters together relative to its norm."""
    layout = Case(tensor=2, context=2, options=SP_IMAGES).open()
    optim = dataclasses.replace(OPTIM, use_distributed_optimizer=False)
    found = {}
    for model, folder in folders.items():
        expected: Outcome = pickle.loads((folder / EXPECTED).read_bytes())
        policy = make_policy(folder, layout, rows=8, optim=optim, options=SP_IMAGES, dtype=torch.bfloat16)
        scores = policy.score(make_responses(), step=STEP, views="both")
        policy.accumulate_gradients(make_batch(make_responses(), "entropy"))
        gradients = hf_gradients(policy)
        off = sum(float((gradients[name] - right).square().sum()) for name, right in expected.gradients.items())
        norm = sum(float(right.square().sum()) for right in expected.gradients.values())
        found[model] = ((scores.old_logp_BT - expected.logp_BT).abs(), (off / norm) ** 0.5)
    return found


@pytest.mark.distributed
def test_bfloat16_is_near(models: dict[str, tuple[Path, Outcome]]) -> None:
    """Parameters and activations have eight bits; sums of gradients are in float32."""
    folders = {model: folder for model, (folder, _) in models.items()}
    for model, (logp_off_BT, gradient) in run_gloo(_rank_rounded, 4, folders, timeout_seconds=600)[0].items():
        assert logp_off_BT.mean() < BFLOAT16_MEAN, model
        assert logp_off_BT.max() < BFLOAT16_LARGEST, model
        assert gradient < BFLOAT16_GRADIENT, f"{model}: {gradient:.3f}"


def test_every_gradient_matters(models: dict[str, tuple[Path, Outcome]]) -> None:
    for name, (_, expected) in models.items():
        weakest = min(expected.gradients, key=lambda n: float(expected.gradients[n].norm()))
        assert float(expected.gradients[weakest].norm()) > 1e-4, f"{name}: {weakest}"
