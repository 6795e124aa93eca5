"""The models on a GPU against transformers, with layers of torch and of TransformerEngine, in bfloat16 and FP8.

One process over NCCL. Rounding is judged by rounding: transformers' own bfloat16 run on the same GPU is how far from
float32 one may be.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vppo.models.options import Backend, Fp8Options, Fp8Recipe, ModelOptions
from megatron_vppo.models.precision import TOKEN_ALIGNMENT
from megatron_vppo.models.te_support import has_transformer_engine, recipe_refusal
from megatron_vppo.parallel.layout import Layout, destroy_layout, init_layout
from megatron_vppo.parallel.policy import MegatronPolicy, Phase
from tests.gpu.rig import gpu_configs
from tests.parallel.policy_rig import (
    OPTIM,
    STEP,
    Outcome,
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
ROUNDING = 2.0
"""How much farther from float32 than transformers' bfloat16 we may be: log-probs on average, and all gradients
together. 1.6 was seen on CPU, where the few rows of this test decide."""
SINGLE_LOGP, SINGLE_GRADIENT = 1e-4, 1e-3
DEVICE = "cuda"
FP8_LOGP = (0.01, 2.0)
"""Nats, mean difference from bfloat16: more than nothing, so FP8 was in force, and not nonsense. Emulated on CPU it is
0.3 to 0.9 on these models, whose random weights are steep, and 7 to 9 times the rounding error of bfloat16."""
FP8_GRADIENT = 15.0
"""Times the rounding error of bfloat16."""


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    torch.backends.cuda.matmul.allow_tf32 = False
    yield init_layout(tensor=1, pipeline=1, timeout_seconds=300)
    destroy_layout()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Outcome]]:
    return saved_models(gpu_configs(), tmp_path_factory.mktemp("models"), entropy_kind="entropy")


def policy_for(
    folder: Path,
    layout: Layout,
    backend: Backend,
    *,
    dtype: torch.dtype = torch.bfloat16,
    recipe: Fp8Recipe | None = None,
    scope: frozenset[Phase] = frozenset(),
    recompute: Any = "none",
) -> MegatronPolicy:
    options = ModelOptions(backend=backend, fp8=Fp8Options(recipe) if recipe else None, recompute=recompute)
    alignment = TOKEN_ALIGNMENT[recipe] if recipe else 1
    return make_policy(folder, layout, rows=6, options=options, dtype=dtype, token_alignment=alignment, fp8_scope=scope)


@pytest.fixture(scope="module")
def rounded(models: dict[str, tuple[Path, Outcome]]) -> dict[str, Outcome]:
    """What transformers makes of the same in bfloat16 on this GPU."""
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
    ours = apart(gradients(policy), expected.gradients)
    theirs = apart(rounded[family].gradients, expected.gradients)
    assert ours < ROUNDING * theirs, f"ours {ours:.4f}, transformers {theirs:.4f} of the gradients' norm"


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
    assert ROUNDING * rounding < apart(gradients(update), expected.gradients) < FP8_GRADIENT * rounding


@needs_te
@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise"])
def test_fp8_sees_the_weights_of_the_last_update(recipe: Fp8Recipe, layout: Layout, models: Any) -> None:
    """Layers keep 8-bit copies of their weights: after an update those of a model that never had other weights."""
    skip_unless_possible(recipe)
    folder, _ = models["Qwen2.5-VL"]
    both: frozenset[Phase] = frozenset({"scoring", "update"})
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
    """Of four layers, none, two or all are in FP8."""
    skip_unless_possible(recipe)
    folder, _ = models["Qwen2.5-VL"]
    plain = logps(policy_for(folder, layout, "te"))
    off = []
    for ends in (0, 1):
        options = ModelOptions(backend="te", fp8=Fp8Options(recipe, bf16_layers_at_ends=ends))
        policy = make_policy(
            folder, layout, rows=6, options=options, dtype=torch.bfloat16,
            token_alignment=TOKEN_ALIGNMENT[recipe], fp8_scope=frozenset({"scoring"}),
        )  # fmt: skip
        off.append(logps_apart(logps(policy), plain))
    assert 0 < off[1] < off[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_resume_is_exact(
    backend: Backend, distributed_optimizer: bool, layout: Layout, models: Any, tmp_path: Path
) -> None:
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
    policy = policy_for(folder, layout, backend)
    batch = make_batch(make_responses(), "nll")
    for group in policy.trainable.optimizer.param_groups:
        group["lr"] = 1e-3
    first = policy.update(batch)
    second = policy.accumulate_gradients(batch)
    assert OPTIM.eps == 1.0 and second["actor/pg_loss"] < first["actor/pg_loss"]
