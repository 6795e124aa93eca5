"""The numbers that the authors' code gave on CPU in float32, one formula at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_vppo.algorithm.advantages import group_advantages
from megatron_vppo.algorithm.dependency import k3_sampled
from megatron_vppo.algorithm.loss import dual_clip_surrogate, surrogate_loss
from megatron_vppo.algorithm.reference_split import emulated_split
from megatron_vppo.algorithm.shaping import dependency_means, shape_advantages, trajectory_scale
from megatron_vppo.algorithm.token_filter import kept_counts, top_token_mask
from megatron_vppo.algorithm.token_weights import entropy_penalty_weight, policy_gradient_weight
from megatron_vppo.algorithm.types import LossSpec, TokenTerms
from tests.algorithm.rows import CHECKS, GOLDEN, SharedExample

CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_dual": 3.0}
SPEC = LossSpec(
    **CLIP,
    entropy_kind="nll",
    kl_kind="k3",
    policy_loss="clip",
    sapo_tau_positive=1.0,
    sapo_tau_negative=1.05,
)
# Golden tables are printed with 8 digits, so half a unit of the last one plus float32 rounding.
PRINTED = 2e-8


def k3(x: Tensor, *, expm1: bool = False) -> Tensor:
    return k3_sampled(torch.zeros_like(x), x, torch.ones_like(x), expm1=expm1)


# --- Token dependency -------------------------------------------------------------------------------------------------


# The table prints these inputs with six digits.
UNROUNDED = {0.693147: math.log(2), -0.693147: -math.log(2), 2.302585: math.log(10), -2.302585: -math.log(10)}


@pytest.mark.parametrize(("x", "official", "exact"), GOLDEN["G1"])
def test_token_dependency(x: float, official: float, exact: float) -> None:
    x_BT = torch.tensor([[UNROUNDED.get(x, x)]])
    assert k3(x_BT).item() == official
    assert k3(x_BT.double()).item() == pytest.approx(exact, abs=1e-15, rel=1e-12)


@pytest.mark.parametrize(("x", "official", "with_expm1", "exact"), CHECKS["cancel"])
def test_cancellation_and_its_cure(x: float, official: float, with_expm1: float, exact: float) -> None:
    x_BT = torch.tensor([[x]])
    assert k3(x_BT).item() == official
    assert k3(x_BT, expm1=True).item() == with_expm1
    assert with_expm1 == pytest.approx(exact, rel=2e-3)


def test_share_of_small_differences_that_cancel_to_zero() -> None:
    x = torch.linspace(-3e-4, 3e-4, 200_001)[None, :]
    cancelled = (k3(x) <= 0).float().mean().item()
    assert cancelled == pytest.approx(CHECKS["cancel_frac_le0"], abs=0.02)
    assert (k3(x, expm1=True) > 0).float().mean().item() > 0.999


# --- Two responses, all quantities known ------------------------------------------------------------------------------


def shared_dependency() -> Tensor:
    e = SharedExample
    return k3_sampled(e.old_logp_BT, e.perturbed_logp_BT, e.wide_mask_BT, expm1=False)


def shared_mask() -> Tensor:
    return top_token_mask(
        shared_dependency(), SharedExample.wide_mask_BT, keep_fraction=0.4, stable=False, integer_ceil=False
    )


def shared_scale() -> Tensor:
    dependency_mean_B = dependency_means(shared_dependency(), SharedExample.wide_mask_BT)
    return trajectory_scale(dependency_mean_B, torch.tensor([True, True]), scale_min=0.9).scale_B


def shared_loss(
    token_mask_BT: Tensor,
    scale_B: Tensor,
    *,
    coefficient: float = 0.0,
    denominator: str = "all",
    average: str = "token",
) -> tuple[float, dict[str, float]]:
    e = SharedExample
    advantage_BT = (e.advantage_B * scale_B)[:, None] * e.wide_mask_BT
    at = e.wide_mask_BT.bool()
    terms = surrogate_loss(
        e.new_logp_BT[at],
        TokenTerms(
            e.old_logp_BT[at],
            advantage_BT[at],
            policy_gradient_weight(token_mask_BT, e.wide_mask_BT, denominator=denominator, average=average)[at],
            entropy_penalty_weight(token_mask_BT, e.wide_mask_BT, coefficient=coefficient, tokens="all")[at],
        ),
        spec=SPEC,
    )
    return terms.loss.item(), {name: value.item() / 9 for name, value in terms.token_sums.items()}


def test_shared_example_dependency() -> None:
    e = SharedExample
    everywhere = k3_sampled(e.old_logp_BT, e.perturbed_logp_BT, torch.ones(2, 6), expm1=False)
    torch.testing.assert_close(everywhere, torch.tensor(GOLDEN["G2_k3"]), rtol=0, atol=5e-7)
    torch.testing.assert_close(shared_dependency(), everywhere * e.wide_mask_BT, rtol=0, atol=0)


def test_shared_example_mask() -> None:
    assert torch.equal(shared_mask(), torch.tensor(GOLDEN["G3_mask"]))


def test_shared_example_shaping() -> None:
    e, g4 = SharedExample, GOLDEN["G4"]
    dependency_mean_B = dependency_means(shared_dependency(), e.wide_mask_BT)
    torch.testing.assert_close(dependency_mean_B, torch.tensor(g4["S"]), rtol=0, atol=PRINTED)
    scale = trajectory_scale(dependency_mean_B, torch.tensor([True, True]), scale_min=0.9)
    assert (scale.smallest_means, scale.largest_means) == ((g4["gmin"],), (g4["gmax"],))
    assert scale.target_maxima == (g4["target_max"],)
    torch.testing.assert_close(scale.scale_B, torch.tensor(g4["alpha"]), rtol=0, atol=PRINTED)
    shaped_BT = shape_advantages(e.advantage_B, scale.scale_B, negative="same")[:, None] * e.wide_mask_BT
    torch.testing.assert_close(shaped_BT, torch.tensor(GOLDEN["G5_adv_shaped"]), rtol=0, atol=PRINTED)


def test_shared_example_token_losses() -> None:
    e = SharedExample
    advantage_BT = (e.advantage_B * shared_scale())[:, None] * e.wide_mask_BT
    loss_BT = dual_clip_surrogate(e.new_logp_BT, e.old_logp_BT, advantage_BT, **CLIP).loss_N
    torch.testing.assert_close(loss_BT, torch.tensor(GOLDEN["G5_token_losses_unmasked"]), rtol=1e-7, atol=PRINTED)


def test_shared_example_losses() -> None:
    g6, mask, scale = GOLDEN["G6"], shared_mask(), shared_scale()
    every, one = SharedExample.wide_mask_BT, torch.ones(2)
    assert shared_loss(mask, scale)[0] == pytest.approx(g6["pg_loss"], abs=3e-8)
    loss, metrics = shared_loss(mask, scale, coefficient=0.06)
    assert loss == pytest.approx(g6["loss"], abs=3e-8)
    for name, value in g6["metrics"].items():
        assert metrics[f"actor/{name}"] == pytest.approx(value, abs=1e-7), name
    assert shared_loss(every, one)[0] + 0.06 * g6["entropy_loss"] == pytest.approx(
        shared_loss(every, one, coefficient=0.06)[0], abs=3e-8
    )


def test_shared_example_ablations() -> None:
    g6, mask, scale = GOLDEN["G6"], shared_mask(), shared_scale()
    every, one = SharedExample.wide_mask_BT, torch.ones(2)
    assert shared_loss(every, one)[0] == pytest.approx(g6["plain_GRPO_token_level"], abs=3e-8)
    assert shared_loss(mask, one)[0] == pytest.approx(g6["TGF_only"], abs=3e-8)
    assert shared_loss(every, scale)[0] == pytest.approx(g6["TAS_only"], abs=3e-8)
    selected = shared_loss(mask, scale, denominator="selected")[0]
    assert selected == pytest.approx(g6["alt_selected_denominator"], abs=3e-8)
    per_response = shared_loss(mask, scale, average="seq")[0]
    assert per_response == pytest.approx(g6["alt_paper_eq6_per_sequence"], abs=3e-8)


# --- Advantage shaping ------------------------------------------------------------------------------------------------

# Measured in float64 on scores that were float32.
SCORES = torch.tensor([0.02, 0.05, 0.08, 0.25]).double()
ALL = torch.ones(4, dtype=torch.bool)


def authors_scale(micro_batch_size: int) -> tuple[Tensor, tuple[float, ...]]:
    _, micro_batch_B = emulated_split(4, devices=1, micro_batch_size=micro_batch_size)
    scale = trajectory_scale(SCORES, ALL, scale_min=0.9, mean_scope_B=micro_batch_B)
    return scale.scale_B, scale.target_maxima


@pytest.mark.parametrize(
    ("micro_batch_size", "parts"),
    [
        (4, ["G9_micro4"]),
        (2, ["G9_micro2_first", "G9_micro2_second"]),
        (1, ["G9_micro1_0", "G9_micro1_1", "G9_micro1_2", "G9_micro1_3"]),
    ],
)
def test_shaping_in_the_authors_scopes(micro_batch_size: int, parts: list[str]) -> None:
    scale_B, target_maxima = authors_scale(micro_batch_size)
    expected_B = [alpha for part in parts for alpha in GOLDEN[part]["alpha"]]
    torch.testing.assert_close(scale_B, torch.tensor(expected_B, dtype=torch.float64), rtol=0, atol=PRINTED)
    assert target_maxima == pytest.approx([GOLDEN[part]["target_max"] for part in parts], rel=1e-12)


def test_shaping_over_all_rows() -> None:
    scale = trajectory_scale(SCORES, ALL, scale_min=0.9)
    expected_B = torch.tensor(GOLDEN["G9_micro4"]["alpha"], dtype=torch.float64)
    torch.testing.assert_close(scale.scale_B, expected_B, rtol=0, atol=PRINTED)


def test_shaping_edge_cases() -> None:
    def alphas(values: list[float], counted: list[bool], mean_scope: list[int] | None = None) -> list[float]:
        scope_B = None if mean_scope is None else torch.tensor(mean_scope)
        scale = trajectory_scale(torch.tensor(values), torch.tensor(counted), scale_min=0.9, mean_scope_B=scope_B)
        return scale.scale_B.tolist()

    assert alphas([0.3], [True]) == [1.0]
    assert alphas([0.3, 0.3], [True, True]) == [1.0, 1.0]
    for difference in (4.8e-7, 7.2e-7):
        assert alphas([0.3, 0.3 + difference], [True, True]) == [1.0, 1.0]
    assert alphas([0.3, 0.3 + 2e-6], [True, True]) != [1.0, 1.0]
    smallest_twice = alphas([0.1, 0.1, 0.5], [True] * 3, mean_scope=[0, 0, 1])
    assert smallest_twice == pytest.approx([0.9, 0.9, 1.0], abs=1e-7)
    assert alphas([0.3, 0.0], [True, False]) == [1.0, 1.0]
    # A row that is not counted changes nothing for the others and keeps scale one.
    assert alphas([0.02, 0.05, 0.25, 0.0], [True, True, True, False]) == [*alphas([0.02, 0.05, 0.25], [True] * 3), 1.0]


def test_bounds_of_the_scale() -> None:
    """0.9 <= alpha <= 0.9 + 0.1 * rows of the mean scope, with mean one (docs/algorithm.md, Shaping)."""
    dependency_mean_B = torch.distributions.Exponential(10.0).sample((256,))
    for size in (4, 16, 128):
        _, micro_batch_B = emulated_split(256, devices=2, micro_batch_size=size)
        scale_B = trajectory_scale(
            dependency_mean_B, dependency_mean_B >= 0, scale_min=0.9, mean_scope_B=micro_batch_B
        ).scale_B
        assert scale_B.min() >= 0.9 and scale_B.max() <= 0.9 + 0.1 * size + 1e-6
        torch.testing.assert_close(scale_B.view(-1, size).mean(1), torch.ones(256 // size), rtol=0, atol=1e-6)


# --- Clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("advantage", "ratio", "loss", "gradient"), GOLDEN["G7"])
def test_clip_table_with_its_kinks(advantage: float, ratio: float, loss: float, gradient: float) -> None:
    new_logp_N = torch.tensor([math.log(ratio)], requires_grad=True)
    surrogate = dual_clip_surrogate(new_logp_N, torch.zeros(1), torch.tensor([advantage]), **CLIP)
    surrogate.loss_N.sum().backward()
    assert new_logp_N.grad is not None
    assert surrogate.loss_N.item() == pytest.approx(loss, abs=3e-7)
    assert new_logp_N.grad.item() == pytest.approx(gradient, abs=3e-7)


def test_runaway_ratios_stay_finite() -> None:
    new_logp_N = torch.tensor([0.0, -500.0], requires_grad=True)
    old_logp_N = torch.tensor([-500.0, 0.0])
    for sign in (1.0, -1.0):
        loss = dual_clip_surrogate(new_logp_N, old_logp_N, torch.full((2,), sign), **CLIP).loss_N.sum()
        (gradient_N,) = torch.autograd.grad(loss, new_logp_N)
        assert loss.isfinite() and gradient_N.isfinite().all()


# --- The number of kept tokens ----------------------------------------------------------------------------------------


def test_kept_counts() -> None:
    for length, expected in [*GOLDEN["G10_k"], [0, 0]]:
        for integer_ceil in (True, False):
            counts = kept_counts(torch.tensor([length]), keep_fraction=0.4, integer_ceil=integer_ceil)
            assert counts.tolist() == [expected]


@pytest.mark.parametrize("fraction", ["0.1", "0.2", "0.3", "0.4", "0.6", "0.7", "0.8", "0.9"])
def test_integer_ceil_is_exact_and_float_ceil_is_the_authors(fraction: str) -> None:
    numerator = int(fraction[2:])
    length_B = torch.arange(1, 8193)
    exact_B = (length_B * numerator + 9) // 10
    assert torch.equal(kept_counts(length_B, keep_fraction=float(fraction), integer_ceil=True), exact_B)
    float_B = kept_counts(length_B, keep_fraction=float(fraction), integer_ceil=False)
    expected_off = len(CHECKS["ceil_bad_0.4"]) if fraction == "0.4" else CHECKS[f"ceil_bad_{fraction}"]
    assert int((float_B != exact_B).sum()) == expected_off
    assert int((float_B - exact_B).abs().max()) <= 1


def test_integer_ceil_of_a_long_decimal_does_not_overflow() -> None:
    assert kept_counts(torch.tensor([10, 2048]), keep_fraction=0.1 + 0.2, integer_ceil=True).tolist() == [4, 615]


def test_ties_go_to_the_earlier_token() -> None:
    tie_BT = torch.tensor([[0.3, 0.3, 0.3, 0.3, 0.3, 9.0]])
    mask_BT = torch.tensor([[1.0, 1, 1, 1, 1, 0]])
    for stable in (True, False):
        kept_BT = top_token_mask(tie_BT, mask_BT, keep_fraction=0.4, stable=stable, integer_ceil=True)
        assert kept_BT.tolist() == [GOLDEN["G10_ties"]["mask"]]
    # Long enough that torch's unstable sort does reorder equals: only the stable one may promise.
    long_BT = torch.zeros(1, 4096)
    kept_BT = top_token_mask(long_BT, torch.ones(1, 4096), keep_fraction=0.4, stable=True, integer_ceil=True)
    assert kept_BT[0, :1639].all() and not kept_BT[0, 1639:].any()


def test_an_empty_response_keeps_nothing() -> None:
    kept_BT = top_token_mask(torch.ones(1, 4), torch.zeros(1, 4), keep_fraction=0.4, stable=False, integer_ceil=False)
    assert kept_BT.tolist() == [GOLDEN["G10_empty"]["mask"]]
    assert dependency_means(torch.ones(1, 4), torch.zeros(1, 4)).tolist() == [0.0]


# --- Group advantages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("correct", "right", "wrong"), GOLDEN["G8"])
def test_group_advantages(correct: int, right: float, wrong: float) -> None:
    rewards = [1.0] * correct + [0.0] * (8 - correct)
    # A second group with it, interleaved: groups must not see each other.
    reward_B = torch.tensor([value for reward in rewards for value in (reward, 100 * reward + 7)])
    advantage_B = group_advantages(reward_B, torch.tensor([5, 3] * 8))[::2]
    expected_B = torch.tensor([right] * correct + [wrong] * (8 - correct))
    torch.testing.assert_close(advantage_B, expected_B, rtol=0, atol=1e-6)


# --- Entropy penalty, and the mean over unequal ranks -----------------------------------------------------------------


def test_entropy_penalty_is_an_advantage_shift_at_ratio_one() -> None:
    """The gradient of pg(A m) + c NLL is the gradient of pg(A m + c on every token)."""
    generator = torch.Generator().manual_seed(1)
    logit_NV = torch.randn(40, 11, dtype=torch.float64, generator=generator, requires_grad=True)
    target_N = torch.randint(0, 11, (40,), generator=generator)
    advantage_N = torch.randn(40, dtype=torch.float64, generator=generator)
    token_mask_N = (torch.rand(40, generator=generator) < 0.4).double()
    coefficient = 0.06
    new_logp_N = logit_NV.log_softmax(-1).gather(1, target_N[:, None])[:, 0]

    def gradient(advantage_N: Tensor, pg_weight_N: Tensor, entropy_weight_N: Tensor) -> Tensor:
        terms = surrogate_loss(
            new_logp_N, TokenTerms(new_logp_N.detach(), advantage_N, pg_weight_N, entropy_weight_N), spec=SPEC
        )
        return torch.autograd.grad(terms.loss, logit_NV, retain_graph=True)[0]

    mean_N = torch.full((40,), 1 / 40, dtype=torch.float64)
    with_penalty = gradient(advantage_N, token_mask_N * mean_N, coefficient * mean_N)
    shifted = gradient(advantage_N * token_mask_N + coefficient, mean_N, torch.zeros_like(mean_N))
    assert (with_penalty - shifted).abs().max() < 1e-16
    assert with_penalty.abs().max() > 1e-3


def test_expected_penalty_gradient_is_zero_for_nll_but_not_for_entropy() -> None:
    logit_V = torch.tensor([1.0, 0.2, -0.5, 2.0], dtype=torch.float64, requires_grad=True)
    logp_V = logit_V.log_softmax(-1)
    expected_nll = sum(
        p * torch.autograd.grad(-logp, logit_V, retain_graph=True)[0]
        for p, logp in zip(logp_V.detach().exp(), logp_V, strict=True)
    )
    assert expected_nll.abs().max() < 2e-16
    entropy_N = -(logp_V.exp() * logp_V).sum()[None]
    zero_N = torch.zeros(1, dtype=torch.float64)
    terms = surrogate_loss(
        logp_V[:1],
        TokenTerms(zero_N, zero_N, zero_N, zero_N + 1),
        spec=LossSpec(
            **CLIP,
            entropy_kind="entropy",
            kl_kind="k3",
            policy_loss="clip",
            sapo_tau_positive=1.0,
            sapo_tau_negative=1.05,
        ),
        entropy_N=entropy_N,
    )
    assert torch.autograd.grad(terms.loss, logit_V)[0].abs().max() > 0.05


def test_losses_of_unequal_ranks_add_up_to_the_token_mean() -> None:
    """3 tokens of advantage +1 on one rank, 7 of -1 on the other. The plain sum is (-3 + 7) / 10."""
    mask_BT = torch.tensor([[1.0] * 3 + [0.0] * 4, [1.0] * 7])
    weight_BT = policy_gradient_weight(mask_BT, mask_BT, denominator="all", average="token")
    losses = []
    for row, advantage in ((0, 1.0), (1, -1.0)):
        zero_N = torch.zeros(7)
        terms = surrogate_loss(zero_N, TokenTerms(zero_N, zero_N + advantage, weight_BT[row], zero_N), spec=SPEC)
        losses.append(terms.loss.item())
    # The authors scale each rank's loss by the number of ranks, and FSDP divides the gradient by it again.
    assert [2 * loss for loss in losses] == pytest.approx([-0.6, 1.4], abs=1e-7)
    assert sum(losses) == pytest.approx(0.4, abs=1e-7)


# --- Rows whose views agree -------------------------------------------------------------------------------------------


def test_rows_whose_views_agree() -> None:
    logp_BT, mask_BT = torch.full((3, 5), -0.7), torch.ones(3, 5)
    dependency_BT = k3_sampled(logp_BT, logp_BT, mask_BT, expm1=False)
    token_mask_BT = top_token_mask(dependency_BT, mask_BT, keep_fraction=0.4, stable=False, integer_ceil=False)
    assert token_mask_BT.tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0]] * 3
    scale = trajectory_scale(dependency_means(dependency_BT, mask_BT), torch.tensor([True] * 3), scale_min=0.9)
    assert scale.scale_B.tolist() == [1.0, 1.0, 1.0]
    weight_BT = policy_gradient_weight(token_mask_BT, mask_BT, denominator="all", average="token")
    terms = surrogate_loss(
        logp_BT.flatten(),
        TokenTerms(logp_BT.flatten(), torch.ones(15), weight_BT.flatten(), torch.zeros(15)),
        spec=SPEC,
    )
    assert terms.loss.item() == pytest.approx(-0.4, abs=1e-7)
