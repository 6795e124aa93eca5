"""kl_full, jsd and the expm1 form of k3 against float64 definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_vppo.algorithm.dependency import jsd, k3_sampled, kl_full


def random_views(*, difference: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logit_NV = 3 * torch.randn(64, 50, generator=generator, dtype=torch.float64)
    other_NV = logit_NV + difference * torch.randn(64, 50, generator=generator, dtype=torch.float64)
    return logit_NV.to(dtype), other_NV.to(dtype)


def defined_kl(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """sum p log(p / q)."""
    return (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1)


def defined_jsd(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """Entropy of the mixture minus the mean entropy: shares no step with the code under test."""
    p_NV, q_NV = logp_NV.exp(), logq_NV.exp()
    m_NV = (p_NV + q_NV) / 2

    def entropy(x_NV: Tensor) -> Tensor:
        return -torch.special.xlogy(x_NV, x_NV).sum(-1)

    return entropy(m_NV) - (entropy(p_NV) + entropy(q_NV)) / 2


@pytest.mark.parametrize("difference", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(("ours", "defined"), [(kl_full, defined_kl), (jsd, defined_jsd)])
def test_equal_their_definitions(ours, defined, difference: float) -> None:
    a_NV, b_NV = (x.log_softmax(-1) for x in random_views(difference=difference, dtype=torch.float64))
    torch.testing.assert_close(ours(a_NV, b_NV), defined(a_NV, b_NV), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(ours(a_NV.float(), b_NV.float()).double(), defined(a_NV, b_NV), rtol=2e-5, atol=1e-7)


def test_known_values() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert kl_full(p, q).item() == pytest.approx(0.5 * math.log(25 / 9), rel=1e-6)
    assert kl_full(q, p).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-6)
    assert jsd(p, q).item() == jsd(q, p).item()
    apart = torch.tensor([[0.0, -60.0]]), torch.tensor([[-60.0, 0.0]])
    assert jsd(*apart).item() == pytest.approx(math.log(2), rel=1e-6)
    assert kl_full(*apart).item() == pytest.approx(60.0, rel=1e-6)


@pytest.mark.parametrize(("ours", "defined"), [(kl_full, defined_kl), (jsd, defined_jsd)])
def test_near_equal_views_keep_their_digits_in_float32(ours, defined) -> None:
    a_NV, b_NV = random_views(difference=1e-3, dtype=torch.float32)
    expected_N = defined(a_NV.double().log_softmax(-1), b_NV.double().log_softmax(-1))
    actual_N = ours(a_NV.log_softmax(-1), b_NV.log_softmax(-1))
    assert expected_N.median() < 1e-6
    torch.testing.assert_close(actual_N.double(), expected_N, rtol=5e-3, atol=0)
    # The plain sum in float32 is off by far more: this is what the other form is for.
    plain_N = defined_kl(a_NV.log_softmax(-1), b_NV.log_softmax(-1))
    assert ((plain_N.double() - expected_N).abs() / expected_N).max() > 0.05


def test_slices_of_the_vocabulary_add_up() -> None:
    a_NV, b_NV = (x.log_softmax(-1) for x in random_views(difference=1.0, dtype=torch.float64))
    for kind in (kl_full, jsd):
        parts = sum(kind(a_NV[:, s], b_NV[:, s]) for s in (slice(0, 7), slice(7, 30), slice(30, 50)))
        torch.testing.assert_close(parts, kind(a_NV, b_NV), rtol=1e-12, atol=1e-15)


def test_k3_estimates_the_full_divergence() -> None:
    """E[k3] over tokens sampled from the original view is KL(original || perturbed)."""
    a_NV, b_NV = (x.log_softmax(-1) for x in random_views(difference=0.5, dtype=torch.float64))
    k3_NV = k3_sampled(a_NV, b_NV, torch.ones_like(a_NV), expm1=True, maximum=math.inf)
    torch.testing.assert_close((a_NV.exp() * k3_NV).sum(-1), kl_full(a_NV, b_NV), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_expm1_form_against_a_series(dtype: torch.dtype) -> None:
    x = torch.tensor([[1e-6, 1e-4, -1e-4, 1e-2, -1e-2, 0.5, -0.5, 2.0]], dtype=dtype)
    exact = sum(x.double() ** n / float(math.factorial(n)) for n in range(2, 30))
    actual = k3_sampled(torch.zeros_like(x), x, torch.ones_like(x), expm1=True)
    # expm1(x) - x still loses about log10(1/x) digits; exp(x) - x - 1 loses twice as many.
    allowed = 4 * torch.finfo(dtype).eps / x.double().abs() + 1e-15
    assert ((actual.double() - exact).abs() / exact <= allowed).all()


def test_log_ratios_beyond_20_count_as_20() -> None:
    x = torch.tensor([[25.0, -25.0]], dtype=torch.float64)
    for expm1 in (False, True):
        k3 = k3_sampled(torch.zeros_like(x), x, torch.ones_like(x), expm1=expm1, maximum=math.inf)
        assert k3.tolist()[0] == pytest.approx([math.exp(20) - 21, math.exp(-20) + 19], rel=1e-12)


def test_k3_is_never_negative() -> None:
    """exp(x) - 1 - x is at least zero; in float32 it rounds below for many small x."""
    x = torch.linspace(-1e-3, 1e-3, 2001)[None]
    assert (x.exp() - x - 1).min() < -1e-8
    for expm1 in (False, True):
        assert k3_sampled(torch.zeros_like(x), x, torch.ones_like(x), expm1=expm1).min() == 0.0


def test_padding_never_reaches_the_result() -> None:
    old_BT, perturbed_BT = torch.tensor([[-1.0, math.nan]]), torch.tensor([[-2.0, math.inf]])
    k3_BT = k3_sampled(old_BT, perturbed_BT, torch.tensor([[1.0, 0.0]]), expm1=True)
    assert k3_BT[0, 1] == 0.0 and k3_BT[0, 0] == pytest.approx(math.exp(-1), rel=1e-6)


def test_k3_is_one_sided() -> None:
    """W8: a token ten times likelier without the image scores 6.70, one ten times less likely 1.40."""
    x = torch.tensor([[math.log(10), -math.log(10)]])
    assert k3_sampled(torch.zeros(1, 2), x, torch.ones(1, 2), expm1=True).tolist()[0] == pytest.approx(
        [9 - math.log(10), math.log(10) - 0.9], rel=1e-6
    )
