"""The models on a GPU against transformers, with layers of torch and of TransformerEngine, in bfloat16 and FP8.

One process over NCCL. Rounding is judged by rounding: transformers' own bfloat16 run on the same GPU is how far from
float32 one may be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vppo.config.choices import Fp8Phase, Fp8Recipe
from megatron_vppo.models.layers.te_support import has_transformer_engine, recipe_refusal
from megatron_vppo.models.options import Backend, Fp8Options, ModelOptions
from megatron_vppo.models.precision import TOKEN_ALIGNMENT
from megatron_vppo.parallel.layout import Layout, destroy_layout, init_layout
from megatron_vppo.parallel.policy import MegatronPolicy
from tests.gpu.rig import gpu_configs
from tests.parallel.policy_rig import (
    OPTIM,
    RESUMED_OPTIM,
    STEP,
    Outcome,
    constant,
    expected_outcome,
    hf_gradients,
    make_batch,
    make_policy,
    make_responses,
    resumed_equals_straight,
    saved_models,
)

pytestmark = pytest.mark.gpu
needs_te = pytest.mark.skipif(not has_transformer_engine(), reason="TransformerEngine is not installed")

FAMILIES = ("Qwen2.5-VL", "Qwen3-VL")
BACKENDS = ("torch", pytest.param("te", marks=needs_te))
SPREAD = 0.05
"""The spread of the random weights: less than in other tests, where rounding alone turns a gradient by ten degrees."""
ROUNDING = 2.0
"""The factor by which we may be farther from float32 than transformers' bfloat16: in log-probs on average (0.010 and
0.012 nats on CPU), and in all gradients together (2 and 4 % there)."""
BFLOAT16_COSINE = 0.99
"""Between each parameter's gradient and that in float32, at least; transformers' own have 0.999 on CPU."""
SINGLE_LOGP, SINGLE_GRADIENT = 1e-4, 1e-3
DEVICE = "cuda"
FP8_LOGP = (0.02, 0.5)
"""Nats, mean difference from bfloat16: more than rounding, so FP8 was in force, and not nonsense. 0.08 to 0.13 when
emulated on CPU."""
FP8_GRADIENT = 0.6
"""Distance from float32, of the norm: 0.15 to 0.28 when products and their gradients were emulated on CPU. The least is
`ROUNDING` times transformers' bfloat16."""
FP8_COSINE = 0.8
"""The least cosine of a parameter's gradient; 0.95 when emulated."""


LOWERING_RATE, LOWERED = 2e-4, 2.0
"""Adam's rate, and the least amount that one step takes off the loss. On CPU it fell from 10.2 to 1.7."""


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    torch.backends.cuda.matmul.allow_tf32 = False
    yield init_layout(tensor=1, pipeline=1, timeout_seconds=300)
    destroy_layout()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Outcome]]:
    return saved_models(gpu_configs(), tmp_path_factory.mktemp("models"), entropy_kind="entropy", spread=SPREAD)


def policy_for(
    folder: Path,
    layout: Layout,
    backend: Backend,
    *,
    dtype: torch.dtype = torch.bfloat16,
    recipe: Fp8Recipe | None = None,
    scope: frozenset[Fp8Phase] = frozenset(),
    recompute: Any = "none",
) -> MegatronPolicy:
    options = ModelOptions(backend=backend, fp8=Fp8Options(recipe) if recipe else None, recompute=recompute)
    alignment = TOKEN_ALIGNMENT[recipe] if recipe else 1
    return make_policy(folder, layout, rows=8, options=options, dtype=dtype, token_alignment=alignment, fp8_scope=scope)


@pytest.fixture(scope="module")
def rounded(models: dict[str, tuple[Path, Outcome]]) -> dict[str, Outcome]:
    """Computes the outcome of transformers for the same in bfloat16 on this GPU."""
    return {
        family: expected_outcome(folder, "entropy", OPTIM, dtype=torch.bfloat16, device=DEVICE)
        for family, (folder, _) in models.items()
    }


def logps(policy: MegatronPolicy) -> Tensor:
    return policy.score(make_responses(), step=STEP, views="both").old_logp_BT


def gradients(policy: MegatronPolicy) -> dict[str, Tensor]:
    policy.accumulate_gradients(make_batch(make_responses(), "entropy"))
    return {name: gradient.cpu() for name, gradient in hf_gradients(policy).items()}


def apart(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """All gradients together, relative to their norm."""
    off = sum(float((found[name] - gradient).square().sum()) for name, gradient in right.items())
    return (off / sum(float(gradient.square().sum()) for gradient in right.values())) ** 0.5


def least_cosine(found: dict[str, Tensor], right: dict[str, Tensor]) -> tuple[float, str]:
    """Finds the parameter whose gradient points elsewhere most: a wrong bias would not show among all matrices."""
    cosines = {name: F.cosine_similarity(found[name].flatten(), right[name].flatten(), dim=0) for name in right}
    return min((float(cosine), name) for name, cosine in cosines.items())


def logps_apart(found_BT: Tensor, right_BT: Tensor) -> float:
    """Mean absolute difference over real tokens, nats."""
    return float((found_BT - right_BT)[right_BT != 0].abs().mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_single_precision_equals_transformers(family: str, layout: Layout, models: Any) -> None:
    folder, expected = models[family]
    policy = policy_for(folder, layout, "torch", dtype=torch.float32)
    assert (logps(policy) - expected.logp_BT).abs().max() < SINGLE_LOGP
    assert apart(gradients(policy), expected.gradients) < SINGLE_GRADIENT


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_as_transformers(
    family: str, backend: Backend, recompute: str, layout: Layout, models: Any, rounded: dict[str, Outcome]
) -> None:
    folder, expected = models[family]
    policy = policy_for(folder, layout, backend, recompute=recompute)
    ours = logps_apart(logps(policy), expected.logp_BT)
    theirs = logps_apart(rounded[family].logp_BT, expected.logp_BT)
    assert ours < ROUNDING * theirs, f"ours {ours:.4f}, transformers {theirs:.4f} nats from float32"
    found = gradients(policy)
    ours, theirs = apart(found, expected.gradients), apart(rounded[family].gradients, expected.gradients)
    assert ours < ROUNDING * theirs, f"ours {ours:.4f}, transformers {theirs:.4f} of the gradients' norm"
    assert least_cosine(found, expected.gradients) > (BFLOAT16_COSINE, "")


@needs_te
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_both_backends_hold_the_same_weights(family: str, layout: Layout, models: Any) -> None:
    folder, _ = models[family]
    exported = [dict(policy_for(folder, layout, backend).hf_weights()) for backend in ("torch", "te")]
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])


RECIPES: tuple[Fp8Recipe, ...] = ("blockwise", "tensorwise", "delayed", "mxfp8")


def skip_unless_possible(recipe: Fp8Recipe) -> None:
    if (refusal := recipe_refusal(recipe, on_gpu=True)) is not None:
        pytest.skip(f"{recipe} needs {refusal}")


@needs_te
@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "delayed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_is_in_force_for_scoring_alone(
    family: str, recipe: Fp8Recipe, layout: Layout, models: Any, rounded: dict[str, Outcome]
) -> None:
    skip_unless_possible(recipe)
    folder, expected = models[family]
    before = logps(policy_for(folder, layout, "te", recipe=recipe))
    scoring = policy_for(folder, layout, "te", recipe=recipe, scope=frozenset({"scoring"}))
    least, most = FP8_LOGP
    assert least < logps_apart(logps(scoring), before) < most
    rounding = apart(rounded[family].gradients, expected.gradients)
    assert apart(gradients(scoring), expected.gradients) < ROUNDING * rounding, "the update stays in bfloat16"


@needs_te
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_is_in_force_for_updates_alone(
    family: str, recipe: Fp8Recipe, layout: Layout, models: Any, rounded: dict[str, Outcome]
) -> None:
    skip_unless_possible(recipe)
    folder, expected = models[family]
    before = logps(policy_for(folder, layout, "te", recipe=recipe))
    update = policy_for(folder, layout, "te", recipe=recipe, scope=frozenset({"update"}))
    for _ in range(2):  # 'delayed' takes its scales from passes before
        update.accumulate_gradients(make_batch(make_responses(), "entropy"))
    assert torch.equal(logps(update), before), "scoring stays in bfloat16"
    rounding = apart(rounded[family].gradients, expected.gradients)
    found = gradients(update)
    assert ROUNDING * rounding < apart(found, expected.gradients) < FP8_GRADIENT
    assert least_cosine(found, expected.gradients) > (FP8_COSINE, "")


@needs_te
@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise"])
def test_fp8_sees_the_weights_of_the_last_update(recipe: Fp8Recipe, layout: Layout, models: Any) -> None:
    """Layers keep 8-bit copies of their weights: after an update those of a model that never had other weights."""
    skip_unless_possible(recipe)
    folder, _ = models["Qwen2.5-VL"]
    both: frozenset[Fp8Phase] = frozenset({"scoring", "update"})
    trained, fresh = (policy_for(folder, layout, "te", recipe=recipe, scope=both) for _ in range(2))
    before = logps(trained)
    trained.update(make_batch(make_responses(), "nll"))
    pairs = zip(trained.trainable.stages, fresh.trainable.stages, strict=True)
    with torch.no_grad():
        for old, new in pairs:
            for source, target in zip(old.parameters(), new.parameters(), strict=True):
                target.copy_(source)
    after = logps(trained)
    assert not torch.equal(after, before)
    assert torch.equal(after, logps(fresh))


@needs_te
@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise"])
def test_layers_that_run_again_give_the_same_fp8_gradients(recipe: Fp8Recipe, layout: Layout, models: Any) -> None:
    """Megatron checkpoints FP8 layers by a way of its own."""
    skip_unless_possible(recipe)
    folder, _ = models["Qwen3-VL"]
    found = [
        gradients(policy_for(folder, layout, "te", recipe=recipe, scope=frozenset({"update"}), recompute=recompute))
        for recompute in ("none", "full")
    ]
    assert apart(found[1], found[0]) < 1e-3


@needs_te
@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise"])
def test_ends_stay_in_bfloat16(recipe: Fp8Recipe, layout: Layout, models: Any) -> None:
    """None, two or all of four layers are in FP8."""
    skip_unless_possible(recipe)
    folder, _ = models["Qwen2.5-VL"]
    plain = logps(policy_for(folder, layout, "te"))
    off = []
    for ends in (0, 1):
        options = ModelOptions(backend="te", fp8=Fp8Options(recipe, bf16_layers_at_ends=ends))
        policy = make_policy(
            folder, layout, rows=8, options=options, dtype=torch.bfloat16,
            token_alignment=TOKEN_ALIGNMENT[recipe], fp8_scope=frozenset({"scoring"}),
        )  # fmt: skip
        off.append(logps_apart(logps(policy), plain))
    assert 0 < off[1] < off[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_resume_is_exact(
    backend: Backend,
    distributed_optimizer: bool,
    layout: Layout,
    models: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    folder, _ = models["Qwen3-VL"]
    assert resumed_equals_straight(
        folder,
        layout,
        tmp_path,
        distributed_optimizer=distributed_optimizer,
        options=ModelOptions(backend=backend),
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_update_lowers_its_own_loss(backend: Backend, layout: Layout, models: Any) -> None:
    """Through the optimizer that Megatron chooses here (TransformerEngine's fused Adam where there is one)."""
    folder, _ = models["Qwen2.5-VL"]
    optim = dataclasses.replace(RESUMED_OPTIM, lr=constant(LOWERING_RATE))
    policy = make_policy(
        folder, layout, rows=8, optim=optim, options=ModelOptions(backend=backend), dtype=torch.bfloat16
    )
    batch = make_batch(make_responses(), "nll")
    first = policy.update(batch)
    second = policy.accumulate_gradients(batch)
    assert second["actor/loss"] < first["actor/loss"] - LOWERED
