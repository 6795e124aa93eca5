"""The vocabulary head on a GPU, where its passes are compiled: against float64, and what it keeps in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from megatron_vppo.parallel.head_chunk import add_product
from megatron_vppo.parallel.vocab_head import VocabHead

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
VOCABULARY, HIDDEN = 19008, 256
"""An eighth of the vocabulary of Qwen2.5-VL-7B."""
TEMPERATURE = 0.8
BANNED = (3, 19000)


def make_head(weight_Vh: Tensor, *, chunk_tokens: int, weight_grad_Vh: Tensor | None = None) -> VocabHead:
    return VocabHead(weight_Vh, VOCABULARY, TEMPERATURE, chunk_tokens, banned_ids=BANNED, weight_grad_Vh=weight_grad_Vh)


def make_inputs(positions: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states of two views, weight, targets, gradient of the log-probs; bfloat16 and logits of order three."""
    generator = torch.Generator().manual_seed(positions)
    hidden_Nh = torch.randn(positions, HIDDEN, generator=generator)
    perturbed_hidden_Nh = hidden_Nh + 0.1 * torch.randn(positions, HIDDEN, generator=generator)
    weight_Vh = torch.randn(VOCABULARY, HIDDEN, generator=generator) * 3 / HIDDEN**0.5
    targets_N = torch.randint(4, VOCABULARY - 10, (positions,), generator=generator)
    grad_N = torch.randn(positions, generator=generator)
    views = [x.to(DEVICE, torch.bfloat16) for x in (hidden_Nh, perturbed_hidden_Nh, weight_Vh)]
    return views[0], views[1], views[2], targets_N.to(DEVICE), grad_N.to(DEVICE)


def exact_logps(hidden_Nh: Tensor, weight_Vh: Tensor, *, rows: int) -> Tensor:
    """Computes log-probs of the logits that bfloat16 products of `rows` rows give, from there on in float64.

    The head multiplies as many rows at once. A product of others may round single logits otherwise.
    """
    logits_NV = torch.cat([chunk_Uh @ weight_Vh.T for chunk_Uh in hidden_Nh.split(rows)]).double() / TEMPERATURE
    return logits_NV.index_fill(1, torch.tensor(BANNED, device=DEVICE), -1e30).log_softmax(-1)


def test_log_probs_entropies_and_divergence_are_exact_to_float32() -> None:
    hidden_Nh, perturbed_hidden_Nh, weight_Vh, targets_N, _ = make_inputs(300)
    head = make_head(weight_Vh, chunk_tokens=256)  # of two views: 128 rows of each
    scores = head.two_views(hidden_Nh, perturbed_hidden_Nh, targets_N, kind="kl_full")
    a_NV, b_NV = (exact_logps(view_Nh, weight_Vh, rows=128) for view_Nh in (hidden_Nh, perturbed_hidden_Nh))
    expected = (
        (scores.logp_N, a_NV.gather(1, targets_N[:, None])[:, 0]),
        (scores.entropy_N, -(a_NV.exp() * a_NV).sum(1)),
        (scores.perturbed_logp_N, b_NV.gather(1, targets_N[:, None])[:, 0]),
        (scores.divergence_N, (a_NV.exp() * (a_NV - b_NV)).sum(1)),
    )
    for actual_N, expected_N in expected:
        torch.testing.assert_close(actual_N.double(), expected_N, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("into_sum", [True, False])
def test_gradients_are_as_near_as_bfloat16_allows(into_sum: bool) -> None:
    hidden_Nh, _, weight_Vh, targets_N, grad_N = make_inputs(300)
    exact = [x.double().requires_grad_() for x in (hidden_Nh, weight_Vh)]
    logits_NV = exact[0] @ exact[1].T / TEMPERATURE
    logp_NV = logits_NV.index_fill(1, torch.tensor(BANNED, device=DEVICE), -1e30).log_softmax(-1)
    (logp_NV.gather(1, targets_N[:, None])[:, 0] * grad_N).sum().backward()
    ours = [x.detach().requires_grad_() for x in (hidden_Nh, weight_Vh)]
    sum_Vh = torch.zeros(VOCABULARY, HIDDEN, device=DEVICE) if into_sum else None
    head = make_head(ours[1], chunk_tokens=128, weight_grad_Vh=sum_Vh)
    logp_N, _ = head.token_logps(ours[0], targets_N, with_entropy=False)
    logp_N.backward(grad_N)
    assert (ours[1].grad is None) == into_sum
    found = (ours[0].grad, sum_Vh if into_sum else ours[1].grad)
    for actual, expected in zip(found, (exact[0].grad, exact[1].grad), strict=True):
        assert actual is not None and expected is not None
        assert (actual.double() - expected).norm() / expected.norm() < 1e-2
    assert not found[1][list(BANNED)].any()


def test_products_are_added_to_the_sum_without_rounding() -> None:
    """Fails where this torch cannot multiply bfloat16 and add to float32 in one kernel: the head is slower then."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator, device=DEVICE).bfloat16() for _ in range(2))
    total = torch.randn(256, 256, generator=generator, device=DEVICE)
    expected = total.double() + left.double() @ right.double()
    add_product(total, left, right)
    assert (total - expected).abs().max() < 1e-4


def test_nothing_is_compiled_for_further_lengths() -> None:
    def run(positions: int) -> None:
        hidden_Nh, _, weight_Vh, targets_N, grad_N = make_inputs(positions)
        hidden_Nh.requires_grad_()
        logp_N, _ = make_head(weight_Vh, chunk_tokens=64).token_logps(hidden_Nh, targets_N, with_entropy=False)
        logp_N.backward(grad_N)

    for positions in (64, 40, 64 + 17):
        run(positions)
    before = counters["stats"]["unique_graphs"]
    for positions in (50, 63, 128 + 9):
        run(positions)
    assert counters["stats"]["unique_graphs"] == before


def test_memory_is_two_chunks_of_logits() -> None:
    hidden_Nh, _, weight_Vh, targets_N, grad_N = make_inputs(1024)
    hidden_Nh.requires_grad_()
    weight_Vh.requires_grad_()
    sum_Vh, chunk = torch.zeros(VOCABULARY, HIDDEN, device=DEVICE), 256
    head = make_head(weight_Vh, chunk_tokens=chunk, weight_grad_Vh=sum_Vh)
    for measured in (False, True):  # compilation allocates too
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logp_N, _ = head.token_logps(hidden_Nh, targets_N, with_entropy=False)
        logp_N.backward(grad_N)
        if measured:
            assert torch.cuda.max_memory_allocated() - before < 2.2 * chunk * VOCABULARY * 2 + 2**22
