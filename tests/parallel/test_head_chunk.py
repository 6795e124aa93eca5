"""The passes over a chunk of logits: against autograd of the plain formulas in float64, and compiled against eager."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from megatron_vppo.parallel import head_chunk
from megatron_vppo.parallel.head_chunk import (
    NO_LOGIT,
    add_product,
    chunk_gradient,
    chunk_logits,
    chunk_sums,
    compiled,
    divergence_sum,
    logit_gradient,
    softmax_sums,
)

TEMPERATURE = 0.7
POSITIONS, VOCABULARY, HIDDEN = 5, 23, 4
BANNED = (2, 9)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TARGETS_U = torch.tensor([0, 22, 7, 7, 3])
HERE = {"local_U": TARGETS_U, "owned_U": torch.ones(POSITIONS, dtype=torch.bool)}
ELSEWHERE = {"local_U": TARGETS_U, "owned_U": torch.zeros(POSITIONS, dtype=torch.bool)}


def reference(logits_UV: Tensor, grad_logp_U: Tensor, grad_entropy_U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the targets, entropies, and the gradient of the logits, by autograd of log_softmax."""
    logits_UV = logits_UV.clone().requires_grad_()
    logp_UV = (logits_UV / TEMPERATURE).log_softmax(1)
    logp_U = logp_UV.gather(1, TARGETS_U[:, None])[:, 0]
    entropy_U = -(logp_UV.exp() * logp_UV).sum(1)
    (logp_U * grad_logp_U + entropy_U * grad_entropy_U).sum().backward()
    assert logits_UV.grad is not None
    return logp_U.detach(), entropy_U.detach(), logits_UV.grad


def logsumexp_of(logits_UV: Tensor) -> Tensor:
    return (logits_UV / TEMPERATURE).logsumexp(1)


def test_sums_give_the_log_softmax_and_the_entropy() -> None:
    logits_UV = 3 * normal(POSITIONS, VOCABULARY, seed=1)
    expected_logp_U, expected_entropy_U, _ = reference(logits_UV, torch.ones(POSITIONS), torch.ones(POSITIONS))
    peak_U, total_U, weighted_U, target_U = chunk_sums(logits_UV, **HERE, temperature=TEMPERATURE)
    torch.testing.assert_close(target_U - peak_U - total_U.log(), expected_logp_U, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(total_U.log() - weighted_U / total_U, expected_entropy_U, rtol=1e-13, atol=1e-13)
    elsewhere_RU = chunk_sums(logits_UV, **ELSEWHERE, temperature=TEMPERATURE)
    assert torch.equal(elsewhere_RU, torch.stack([peak_U, total_U, weighted_U, torch.zeros_like(peak_U)]))


@pytest.mark.parametrize("with_entropy", [True, False])
def test_gradient_of_the_logits_equals_autograd(with_entropy: bool) -> None:
    logits_UV = 3 * normal(POSITIONS, VOCABULARY, seed=1)
    grad_logp_U, grad_entropy_U = normal(2, POSITIONS, seed=2)
    if not with_entropy:
        grad_entropy_U.zero_()
    _, entropy_U, expected_UV = reference(logits_UV, grad_logp_U, grad_entropy_U)
    of_entropy = (entropy_U, grad_entropy_U) if with_entropy else (None, None)
    lse_U = logsumexp_of(logits_UV)
    grad_UV = chunk_gradient(logits_UV, lse_U, grad_logp_U, *of_entropy, **HERE, temperature=TEMPERATURE)
    torch.testing.assert_close(grad_UV, expected_UV, rtol=1e-12, atol=1e-13)
    # Where another rank holds the targets, only the probabilities are left.
    elsewhere_UV = chunk_gradient(logits_UV, lse_U, grad_logp_U, *of_entropy, **ELSEWHERE, temperature=TEMPERATURE)
    one_hot_UV = torch.nn.functional.one_hot(TARGETS_U, VOCABULARY) * grad_logp_U[:, None] / TEMPERATURE
    torch.testing.assert_close(elsewhere_UV, expected_UV - one_hot_UV, rtol=1e-12, atol=1e-13)


def test_gradient_at_a_likely_target_keeps_its_digits_in_bfloat16() -> None:
    """With 1 - p of 1.5e-4 a sum of bfloat16 numbers around one would be 0 or 2^-8."""
    logits_UV = torch.tensor([[8.0, -1.0, -1.5]], dtype=torch.bfloat16)
    exact_UV = logits_UV.double()
    p_UV = exact_UV.softmax(1)
    one_U = torch.ones(1)
    grad_UV = chunk_gradient(
        logits_UV,
        exact_UV.logsumexp(1).float(),
        one_U,
        None,
        None,
        local_U=torch.tensor([0]),
        owned_U=one_U.bool(),
        temperature=1.0,
    )
    expected_UV = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64) - p_UV
    assert grad_UV.dtype == torch.bfloat16 and expected_UV[0, 0] < 2e-4
    torch.testing.assert_close(grad_UV.double(), expected_UV, rtol=4e-3, atol=0)  # half a unit in the last place


def test_banned_tokens_have_no_probability_and_no_gradient() -> None:
    hidden_Uh, weight_Vh = normal(POSITIONS, HIDDEN, seed=3), normal(VOCABULARY, HIDDEN, seed=4)
    logits_UV = chunk_logits(hidden_Uh, weight_Vh, torch.tensor(BANNED))
    assert bool((logits_UV[:, list(BANNED)] == NO_LOGIT).all())
    kept = [v for v in range(VOCABULARY) if v not in BANNED]
    few_UV = (hidden_Uh @ weight_Vh.T)[:, kept]
    peak_U, total_U, weighted_U = softmax_sums(logits_UV, temperature=TEMPERATURE)
    torch.testing.assert_close(peak_U + total_U.log(), logsumexp_of(few_UV), rtol=1e-13, atol=1e-13)
    entropy_U = total_U.log() - weighted_U / total_U
    logp_UV = (few_UV / TEMPERATURE).log_softmax(1)
    torch.testing.assert_close(entropy_U, -(logp_UV.exp() * logp_UV).sum(1), rtol=1e-13, atol=1e-13)
    grad_UV = logit_gradient(
        logits_UV, logsumexp_of(few_UV), *normal(1, POSITIONS, seed=5), entropy_U, *normal(1, POSITIONS, seed=6),
        temperature=TEMPERATURE,
    )  # fmt: skip
    assert not grad_UV[:, list(BANNED)].any() and bool((grad_UV[:, kept] != 0).all())


def test_a_rank_without_rows_has_neutral_statistics() -> None:
    sums_RU = chunk_sums(
        torch.zeros(3, 0), local_U=torch.zeros(3).long(), owned_U=torch.zeros(3).bool(), temperature=TEMPERATURE
    )
    assert torch.equal(sums_RU, torch.tensor([[NO_LOGIT] * 3, [0.0] * 3, [0.0] * 3, [0.0] * 3]))


@pytest.mark.parametrize("kind", ["kl_full", "jsd"])
def test_divergence_of_slices_adds_up_to_the_definition(kind: str) -> None:
    views = [3 * normal(POSITIONS, VOCABULARY, seed=seed) for seed in (7, 8)]
    lse = [logsumexp_of(view_UV) for view_UV in views]
    parts = [
        divergence_sum(views[0][:, part], views[1][:, part], *lse, kind=kind, temperature=TEMPERATURE)
        for part in (slice(0, 10), slice(10, VOCABULARY))
    ]
    p_UV, q_UV = ((view_UV / TEMPERATURE).softmax(1) for view_UV in views)
    m_UV = (p_UV + q_UV) / 2
    expected_U = {
        "kl_full": (p_UV * (p_UV / q_UV).log()).sum(1),
        "jsd": 0.5 * (p_UV * (p_UV / m_UV).log() + q_UV * (q_UV / m_UV).log()).sum(1),
    }[kind]
    torch.testing.assert_close(parts[0] + parts[1], expected_U, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_added_to_a_float32_sum(dtype: torch.dtype) -> None:
    left_VU, right_Uh = normal(VOCABULARY, POSITIONS, seed=9).to(dtype), normal(POSITIONS, HIDDEN, seed=10).to(dtype)
    sum_Vh = normal(VOCABULARY, HIDDEN, seed=11).float()
    expected_Vh = sum_Vh.double() + left_VU.double() @ right_Uh.double()
    add_product(sum_Vh, left_VU, right_Uh)
    # Without a kernel for it, as on CPU, the product is rounded to bfloat16 first: half of 2^-7 of up to 8.
    torch.testing.assert_close(sum_Vh.double(), expected_Vh, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02)


@pytest.mark.slow
@pytest.mark.extended
def test_compiled_passes_equal_eager_ones_for_every_chunk_length() -> None:
    """By torch's C++ compiler; no GPU's. A third length compiles nothing more: every batch has another ragged chunk."""
    vocabulary = 1000
    for number, positions in enumerate((16, 7, 11, 16, 3)):
        views = [(3 * normal(positions, vocabulary, seed=20 + seed)).bfloat16() for seed in (number, 10 + number)]
        grad_logp_U, grad_entropy_U = normal(2, positions, seed=40).float()
        peak_U, total_U, weighted_U = softmax_sums(views[0], temperature=TEMPERATURE)
        lse_U, entropy_U = peak_U + total_U.log(), total_U.log() - weighted_U / total_U
        calls = [
            (softmax_sums, (views[0],), {}),
            (logit_gradient, (views[0], lse_U, grad_logp_U, entropy_U, grad_entropy_U), {}),
            (divergence_sum, (*views, lse_U, lse_U), {"kind": "kl_full"}),
        ]
        for function, tensors, settings in calls:
            expected = function(*tensors, **settings, temperature=TEMPERATURE)
            actual = compiled(function)(*tensors, **settings, temperature=TEMPERATURE)
            # bfloat16 results may differ by one rounding; sums of 1000 float32 terms by their order.
            torch.testing.assert_close(actual, expected, rtol=8e-3 if function is logit_gradient else 2e-6, atol=1e-6)
        if number == 0:
            before = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == before + len(calls)


def test_on_cpu_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_chunk, "compiled", None)
    chunk_sums(normal(POSITIONS, VOCABULARY, seed=1), **HERE, temperature=TEMPERATURE)
