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


TARGETS_C = torch.tensor([0, 22, 7, 7, 3])
HERE = {"local_C": TARGETS_C, "owned_C": torch.ones(POSITIONS, dtype=torch.bool)}
ELSEWHERE = {"local_C": TARGETS_C, "owned_C": torch.zeros(POSITIONS, dtype=torch.bool)}


def reference(logits_CV: Tensor, grad_logp_C: Tensor, grad_entropy_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the targets, entropies, and the gradient of the logits, by autograd of log_softmax."""
    logits_CV = logits_CV.clone().requires_grad_()
    logp_CV = (logits_CV / TEMPERATURE).log_softmax(1)
    logp_C = logp_CV.gather(1, TARGETS_C[:, None])[:, 0]
    entropy_C = -(logp_CV.exp() * logp_CV).sum(1)
    (logp_C * grad_logp_C + entropy_C * grad_entropy_C).sum().backward()
    assert logits_CV.grad is not None
    return logp_C.detach(), entropy_C.detach(), logits_CV.grad


def logsumexp_of(logits_CV: Tensor) -> Tensor:
    return (logits_CV / TEMPERATURE).logsumexp(1)


def test_sums_give_the_log_softmax_and_the_entropy() -> None:
    logits_CV = 3 * normal(POSITIONS, VOCABULARY, seed=1)
    expected_logp_C, expected_entropy_C, _ = reference(logits_CV, torch.ones(POSITIONS), torch.ones(POSITIONS))
    peak_C, total_C, weighted_C, target_C = chunk_sums(logits_CV, **HERE, temperature=TEMPERATURE)
    torch.testing.assert_close(target_C - peak_C - total_C.log(), expected_logp_C, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(total_C.log() - weighted_C / total_C, expected_entropy_C, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("with_entropy", [True, False])
def test_gradient_of_the_logits_equals_autograd(with_entropy: bool) -> None:
    logits_CV = 3 * normal(POSITIONS, VOCABULARY, seed=1)
    grad_logp_C, grad_entropy_C = normal(2, POSITIONS, seed=2)
    if not with_entropy:
        grad_entropy_C.zero_()
    _, entropy_C, expected_CV = reference(logits_CV, grad_logp_C, grad_entropy_C)
    of_entropy = (entropy_C, grad_entropy_C) if with_entropy else (None, None)
    lse_C = logsumexp_of(logits_CV)
    grad_CV = chunk_gradient(logits_CV, lse_C, grad_logp_C, *of_entropy, **HERE, temperature=TEMPERATURE)
    torch.testing.assert_close(grad_CV, expected_CV, rtol=1e-12, atol=1e-13)
    # Where another rank holds the targets, only the probabilities are left.
    elsewhere_CV = chunk_gradient(logits_CV, lse_C, grad_logp_C, *of_entropy, **ELSEWHERE, temperature=TEMPERATURE)
    one_hot_CV = torch.nn.functional.one_hot(TARGETS_C, VOCABULARY) * grad_logp_C[:, None] / TEMPERATURE
    torch.testing.assert_close(elsewhere_CV, expected_CV - one_hot_CV, rtol=1e-12, atol=1e-13)


def test_gradient_at_a_likely_target_keeps_its_digits_in_bfloat16() -> None:
    """With 1 - p of 1.5e-4 a sum of bfloat16 numbers around one would be 0 or 2^-8."""
    logits_CV = torch.tensor([[8.0, -1.0, -1.5]], dtype=torch.bfloat16)
    exact_CV = logits_CV.double()
    p_CV = exact_CV.softmax(1)
    one_C = torch.ones(1)
    grad_CV = chunk_gradient(
        logits_CV,
        exact_CV.logsumexp(1).float(),
        one_C,
        None,
        None,
        local_C=torch.tensor([0]),
        owned_C=one_C.bool(),
        temperature=1.0,
    )
    expected_CV = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64) - p_CV
    assert grad_CV.dtype == torch.bfloat16 and expected_CV[0, 0] < 2e-4
    torch.testing.assert_close(grad_CV.double(), expected_CV, rtol=4e-3, atol=0)  # half a unit in the last place


def test_banned_tokens_have_no_probability_and_no_gradient() -> None:
    hidden_CH, weight_VH = normal(POSITIONS, HIDDEN, seed=3), normal(VOCABULARY, HIDDEN, seed=4)
    logits_CV = chunk_logits(hidden_CH, weight_VH, torch.tensor(BANNED))
    assert bool((logits_CV[:, list(BANNED)] == NO_LOGIT).all())
    kept = [v for v in range(VOCABULARY) if v not in BANNED]
    few_CV = (hidden_CH @ weight_VH.T)[:, kept]
    peak_C, total_C, weighted_C = softmax_sums(logits_CV, temperature=TEMPERATURE)
    torch.testing.assert_close(peak_C + total_C.log(), logsumexp_of(few_CV), rtol=1e-13, atol=1e-13)
    entropy_C = total_C.log() - weighted_C / total_C
    logp_CV = (few_CV / TEMPERATURE).log_softmax(1)
    torch.testing.assert_close(entropy_C, -(logp_CV.exp() * logp_CV).sum(1), rtol=1e-13, atol=1e-13)
    grad_CV = logit_gradient(
        logits_CV, logsumexp_of(few_CV), *normal(1, POSITIONS, seed=5), entropy_C, *normal(1, POSITIONS, seed=6),
        temperature=TEMPERATURE,
    )  # fmt: skip
    assert not grad_CV[:, list(BANNED)].any() and bool((grad_CV[:, kept] != 0).all())


def test_a_rank_without_rows_has_neutral_statistics() -> None:
    sums_RC = chunk_sums(
        torch.zeros(3, 0), local_C=torch.zeros(3).long(), owned_C=torch.zeros(3).bool(), temperature=TEMPERATURE
    )
    assert torch.equal(sums_RC, torch.tensor([[NO_LOGIT] * 3, [0.0] * 3, [0.0] * 3, [0.0] * 3]))


@pytest.mark.parametrize("kind", ["kl_full", "jsd"])
def test_divergence_of_slices_adds_up_to_the_definition(kind: str) -> None:
    views = [3 * normal(POSITIONS, VOCABULARY, seed=seed) for seed in (7, 8)]
    lse = [logsumexp_of(view_CV) for view_CV in views]
    parts = [
        divergence_sum(views[0][:, part], views[1][:, part], *lse, kind=kind, temperature=TEMPERATURE)
        for part in (slice(0, 10), slice(10, VOCABULARY))
    ]
    p_CV, q_CV = ((view_CV / TEMPERATURE).softmax(1) for view_CV in views)
    m_CV = (p_CV + q_CV) / 2
    expected_C = {
        "kl_full": (p_CV * (p_CV / q_CV).log()).sum(1),
        "jsd": 0.5 * (p_CV * (p_CV / m_CV).log() + q_CV * (q_CV / m_CV).log()).sum(1),
    }[kind]
    torch.testing.assert_close(parts[0] + parts[1], expected_C, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_added_to_a_float32_sum(dtype: torch.dtype) -> None:
    left_VC, right_CH = normal(VOCABULARY, POSITIONS, seed=9).to(dtype), normal(POSITIONS, HIDDEN, seed=10).to(dtype)
    sum_VH = normal(VOCABULARY, HIDDEN, seed=11).float()
    expected_VH = sum_VH.double() + left_VC.double() @ right_CH.double()
    add_product(sum_VH, left_VC, right_CH)
    # Without a kernel for it, as on CPU, the product is rounded to bfloat16 first: half of 2^-7 of up to 8.
    torch.testing.assert_close(sum_VH.double(), expected_VH, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02)


@pytest.mark.slow
@pytest.mark.extended
def test_compiled_passes_equal_eager_ones_for_every_chunk_length() -> None:
    """By torch's C++ compiler; no GPU's. A third length compiles nothing more: every batch has another ragged chunk."""
    vocabulary = 1000
    for number, positions in enumerate((16, 7, 11, 16, 3)):
        views = [(3 * normal(positions, vocabulary, seed=20 + seed)).bfloat16() for seed in (number, 10 + number)]
        grad_logp_C, grad_entropy_C = normal(2, positions, seed=40).float()
        peak_C, total_C, weighted_C = softmax_sums(views[0], temperature=TEMPERATURE)
        lse_C, entropy_C = peak_C + total_C.log(), total_C.log() - weighted_C / total_C
        calls = [
            (softmax_sums, (views[0],), {}),
            (logit_gradient, (views[0], lse_C, grad_logp_C, entropy_C, grad_entropy_C), {}),
            (divergence_sum, (*views, lse_C, lse_C), {"kind": "kl_full"}),
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
