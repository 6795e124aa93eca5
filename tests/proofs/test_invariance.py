"""'global' does not depend on how rows are split or ordered; 'reference' does, as the authors' code does.

The policy is a linear softmax over random features, small enough that loss and gradient are exact in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_vppo.algorithm.assemble import Minibatch, assemble
from megatron_vppo.algorithm.loss import surrogate_loss
from megatron_vppo.algorithm.types import Response
from tests.algorithm.rows import GOLDEN, graded, response, scores, settings

NUM_GROUPS, GROUP_SIZE, WIDTH, FEATURES, VOCAB = 6, 4, 24, 5, 9
NUM_ROWS = NUM_GROUPS * GROUP_SIZE
SPLITS = [(1, NUM_ROWS), (1, 1), (2, 3), (3, 8), (4, 2), (24, 1)]
"""(devices, rows per micro-batch)."""


@dataclass(frozen=True)
class Problem:
    """Rows of the step, in a fixed order that permutations refer to."""

    rows: list[Response]
    rewards: list[float]
    feature_BTF: Tensor
    perturbed_feature_BTF: Tensor
    target_BT: Tensor
    old_weight_FV: Tensor
    new_weight_FV: Tensor


def make_problem() -> Problem:
    g = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, WIDTH + 1, (NUM_ROWS,), generator=g).tolist()
    # The third group is a question without an image; one row of the fifth was cut at the limit.
    rows = [
        response(n, group=i // GROUP_SIZE, sample=i % GROUP_SIZE, image=i // GROUP_SIZE != 2,
                 finish="length" if i == 17 else "stop")
        for i, n in enumerate(lengths)
    ]  # fmt: skip
    rewards = [float(i % GROUP_SIZE < 1 + i // GROUP_SIZE % 3) for i in range(NUM_ROWS)]
    feature_BTF = torch.randn(NUM_ROWS, WIDTH, FEATURES, generator=g, dtype=torch.float64)
    noise_BTF = torch.randn(NUM_ROWS, WIDTH, FEATURES, generator=g, dtype=torch.float64)
    old_weight_FV = torch.randn(FEATURES, VOCAB, generator=g, dtype=torch.float64)
    step_FV = torch.randn(FEATURES, VOCAB, generator=g, dtype=torch.float64)
    return Problem(
        rows=rows,
        rewards=rewards,
        feature_BTF=feature_BTF,
        perturbed_feature_BTF=feature_BTF + 0.5 * noise_BTF,
        target_BT=torch.randint(0, VOCAB, (NUM_ROWS, WIDTH), generator=g),
        old_weight_FV=old_weight_FV,
        new_weight_FV=old_weight_FV + 0.15 * step_FV,
    )


def logps(feature_BTF: Tensor, weight_FV: Tensor, target_BT: Tensor) -> Tensor:
    return (feature_BTF @ weight_FV).log_softmax(-1).gather(-1, target_BT[..., None])[..., 0]


def assemble_rows(p: Problem, order: list[int], *, preset: str, devices: int, micro_batch_size: int) -> Minibatch:
    old_BT = logps(p.feature_BTF, p.old_weight_FV, p.target_BT)[order].float()
    perturbed_BT = logps(p.perturbed_feature_BTF, p.old_weight_FV, p.target_BT)[order].float()
    (minibatch,) = assemble(
        graded([p.rows[i] for i in order], [p.rewards[i] for i in order]),
        scores(old_BT, perturbed_BT),
        settings=settings(preset=preset, truncated_responses="mask"),
        responses_per_minibatch=NUM_ROWS,
        data_parallel_size=devices,
        micro_batch_size=micro_batch_size,
    )
    return minibatch


def loss_and_gradient(
    p: Problem, order: list[int], minibatch: Minibatch, *, devices: int, micro_batch_size: int
) -> tuple[float, Tensor]:
    """Sums loss and gradient over the micro-batches of all devices, packing the response tokens of each."""
    b, total, gradient_FV = minibatch.batch, 0.0, torch.zeros(FEATURES, VOCAB, dtype=torch.float64)
    rows_of_devices = torch.arange(NUM_ROWS).tensor_split(devices)
    for rows in (part for device_rows in rows_of_devices for part in device_rows.split(micro_batch_size)):
        at = b.response_mask_BT[rows].nonzero(as_tuple=True)
        original = torch.tensor(order)[rows]
        weight_FV = p.new_weight_FV.clone().requires_grad_()
        new_logp_BT = logps(p.feature_BTF[original], weight_FV, p.target_BT[original])
        terms = surrogate_loss(
            new_logp_BT[at],
            b.terms_at((rows[at[0]], at[1])),
            spec=b.loss,
        )
        terms.loss.backward()
        assert weight_FV.grad is not None
        total += terms.loss.item()
        gradient_FV += weight_FV.grad
    return total, gradient_FV


def run(p: Problem, order: list[int], *, preset: str, devices: int, micro_batch_size: int):
    minibatch = assemble_rows(p, order, preset=preset, devices=devices, micro_batch_size=micro_batch_size)
    split = {"devices": devices, "micro_batch_size": micro_batch_size}
    return minibatch, *loss_and_gradient(p, order, minibatch, **split)


IN_ORDER = list(range(NUM_ROWS))


@pytest.mark.parametrize(("devices", "micro_batch_size"), SPLITS[1:])
def test_global_is_the_same_for_every_split(devices: int, micro_batch_size: int) -> None:
    p = make_problem()
    whole, loss, gradient_FV = run(p, IN_ORDER, preset="global", devices=1, micro_batch_size=NUM_ROWS)
    split, split_loss, split_gradient_FV = run(
        p, IN_ORDER, preset="global", devices=devices, micro_batch_size=micro_batch_size
    )
    for name in ("advantage_BT", "pg_weight_BT", "entropy_weight_BT", "old_logp_BT", "response_mask_BT"):
        assert torch.equal(getattr(whole.batch, name), getattr(split.batch, name)), name
    for name in ("dependency_BT", "token_mask_BT", "scale_B", "dependency_mean_B"):
        assert torch.equal(getattr(whole.record, name), getattr(split.record, name)), name
    assert whole.metrics == split.metrics
    assert split_loss == pytest.approx(loss, abs=1e-14)
    torch.testing.assert_close(split_gradient_FV, gradient_FV, rtol=1e-12, atol=1e-15)
    # Alive: something is filtered, scaled, clipped and learned.
    assert abs(loss) > 1e-2 and gradient_FV.norm() > 1e-2
    assert 0.3 < whole.metrics["actor/perception_token_fraction"] < 0.7
    assert whole.record.scale_B.max() - whole.record.scale_B.min() > 0.1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_global_is_the_same_for_every_order(seed: int) -> None:
    """Groups in another order, and rows in another order within their group."""
    p = make_problem()
    g = torch.Generator().manual_seed(seed)
    groups = torch.randperm(NUM_GROUPS, generator=g).tolist()
    order = [GROUP_SIZE * k + i for k in groups for i in torch.randperm(GROUP_SIZE, generator=g).tolist()]
    assert order != IN_ORDER
    whole, loss, gradient_FV = run(p, IN_ORDER, preset="global", devices=1, micro_batch_size=NUM_ROWS)
    other, other_loss, other_gradient_FV = run(p, order, preset="global", devices=3, micro_batch_size=2)
    assert torch.equal(other.record.token_mask_BT, whole.record.token_mask_BT[order])
    assert torch.equal(other.batch.pg_weight_BT, whole.batch.pg_weight_BT[order])
    # Means over rows are float32 sums in another order.
    torch.testing.assert_close(other.record.scale_B, whole.record.scale_B[order], rtol=3e-7, atol=0)
    assert other_loss == pytest.approx(loss, abs=1e-7)
    torch.testing.assert_close(other_gradient_FV, gradient_FV, rtol=0, atol=1e-7)


def test_reference_depends_on_the_split() -> None:
    p = make_problem()
    results = [run(p, IN_ORDER, preset="reference", devices=d, micro_batch_size=m) for d, m in SPLITS]
    first_minibatch, first_loss, first_gradient_FV = results[0]
    for minibatch, loss, gradient_FV in results[1:]:
        # The filter works row by row: only the scale, and with it loss and gradient, changes.
        assert torch.equal(minibatch.record.token_mask_BT, first_minibatch.record.token_mask_BT)
        assert (minibatch.record.scale_B - first_minibatch.record.scale_B).abs().max() > 1e-2
        assert abs(loss - first_loss) > 1e-5
        assert (gradient_FV - first_gradient_FV).norm() > 1e-4


def four_scores(*, preset: str, micro_batch_size: int, devices: int = 1) -> Minibatch:
    """Four one-token responses with dependencies 0.02, 0.05, 0.08, 0.25."""
    rows = [response(1, sample=i) for i in range(4)]
    divergence_BT = torch.tensor([[0.02], [0.05], [0.08], [0.25]])
    (minibatch,) = assemble(
        graded(rows, [1.0, 0.0, 1.0, 0.0]),
        scores(torch.full((4, 1), -1.0), None, divergence_BT),
        settings=settings(preset=preset, dependency="kl_full"),
        responses_per_minibatch=4,
        data_parallel_size=devices,
        micro_batch_size=micro_batch_size,
    )
    return minibatch


def test_reference_gives_the_authors_scales() -> None:
    minibatch = four_scores(preset="reference", micro_batch_size=2)
    first, second = GOLDEN["G9_micro2_first"], GOLDEN["G9_micro2_second"]
    assert minibatch.record.scale_B.tolist() == pytest.approx(first["alpha"] + second["alpha"], abs=2e-7)
    mean_max = (first["target_max"] + second["target_max"]) / 2  # 2.4333 and 1.0586
    assert minibatch.metrics["actor/dynamic_scaling_max"] == pytest.approx(mean_max, abs=1e-6)
    # Two devices of two rows each: the second has a minimum of its own, and one row per micro-batch undoes the shaping.
    two_devices = four_scores(preset="reference", micro_batch_size=2, devices=2)
    assert two_devices.record.scale_B.tolist() == pytest.approx([0.9, 1.1, 0.9, 1.1], abs=1e-6)
    # Their log has the mean over the devices of each one's extremes, and so has one mini-batch here.
    assert two_devices.metrics["actor/global_sensitivity_score_min"] == pytest.approx((0.02 + 0.08) / 2)
    assert two_devices.metrics["actor/global_sensitivity_score_max"] == pytest.approx((0.05 + 0.25) / 2)
    single = four_scores(preset="reference", micro_batch_size=1)
    assert single.record.scale_B.tolist() == pytest.approx([0.9, 1.0, 1.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_global_gives_one_scale(micro_batch_size: int, devices: int) -> None:
    minibatch = four_scores(preset="global", micro_batch_size=micro_batch_size, devices=devices)
    assert minibatch.record.scale_B.tolist() == pytest.approx([0.9, 0.9375, 0.975, 1.1875], abs=2e-7)
