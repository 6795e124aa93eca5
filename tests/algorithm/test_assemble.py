"""Whole mini-batches: the shared example, every setting, rows without an image, truncation, errors."""

from __future__ import annotations

import dataclasses
from array import array
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vppo.algorithm.assemble import Minibatch, assemble
from megatron_vppo.algorithm.loss import surrogate_loss
from tests.algorithm.rows import GOLDEN, SharedExample, graded, response, scores, settings

# Two rewards of one group become +-this instead of the +-1 of the shared example: half the difference of 1 over the
# unbiased deviation sqrt(1/2), plus 1e-6.
PAIR_ADVANTAGE = 0.5 / (0.5**0.5 + 1e-6)


def shared_example(**changes: Any) -> Minibatch:
    e = SharedExample
    rows = [response(length, sample=i) for i, length in enumerate(e.lengths)]
    (minibatch,) = assemble(
        graded(rows, [1.0, 0.0]),
        scores(e.old_logp_BT, e.perturbed_logp_BT, divergence_BT=torch.linspace(0, 1, 12).view(2, 6)),
        settings=settings(**changes),
        responses_per_minibatch=2,
        micro_batch_size=2,
    )
    return minibatch


def loss_of(minibatch: Minibatch, new_logp_BT: Tensor, entropy_BT: Tensor | None = None) -> float:
    b = minibatch.batch
    at = b.response_mask_BT.nonzero(as_tuple=True)
    return surrogate_loss(
        new_logp_BT[at],
        b.terms_at(at),
        spec=b.loss,
        entropy_N=None if entropy_BT is None else entropy_BT[at],
    ).loss.item()


@pytest.mark.parametrize("preset", ["reference", "global"])
def test_shared_example_from_end_to_end(preset: str) -> None:
    """One device and one micro-batch, no ties: both presets give the authors' number."""
    g6, minibatch = GOLDEN["G6"], shared_example(preset=preset)
    expected = PAIR_ADVANTAGE * g6["pg_loss"] + 0.06 * g6["entropy_loss"]
    assert loss_of(minibatch, SharedExample.new_logp_BT) == pytest.approx(expected, abs=5e-8)
    record = minibatch.record
    assert torch.equal(record.token_mask_BT, torch.tensor(GOLDEN["G3_mask"]))
    torch.testing.assert_close(record.scale_B, torch.tensor(GOLDEN["G4"]["alpha"]), rtol=0, atol=2e-7)
    torch.testing.assert_close(record.dependency_mean_B, torch.tensor(GOLDEN["G4"]["S"]), rtol=0, atol=2e-7)
    valid_k3_BT = torch.tensor(GOLDEN["G2_k3"]) * SharedExample.wide_mask_BT
    torch.testing.assert_close(record.dependency_BT, valid_k3_BT, rtol=0, atol=5e-7)
    assert record.group_advantage_B.tolist() == pytest.approx([PAIR_ADVANTAGE, -PAIR_ADVANTAGE])


def test_metrics_of_the_shared_example() -> None:
    metrics = shared_example(preset="reference").metrics
    k3, score = GOLDEN["G2_k3"], GOLDEN["G4"]["S"]
    kept = [k3[0][1], k3[0][3], k3[1][2], k3[1][3]]
    rejected = [k3[0][0], k3[0][2], k3[0][4], k3[1][0], k3[1][1]]
    expected = {
        "actor/trained_row_fraction": 1.0,
        "actor/perception_token_fraction": 4 / 9,
        "actor/low_var_kl_mean_selected": sum(kept) / 4,
        "actor/low_var_kl_mean_rejected": sum(rejected) / 5,
        "actor/low_var_kl_threshold": (k3[0][1] + k3[1][2]) / 2,
        "actor/sensitivity_score_mean": sum(score) / 2,
        "actor/global_sensitivity_score_min": score[1],
        "actor/global_sensitivity_score_max": score[0],
        "actor/scaling_factor_mean": 1.0,
        # Five tokens at 1.1 and four at -0.9 times the advantage.
        "critic/advantages/mean": PAIR_ADVANTAGE * 1.9 / 9,
        "critic/advantages/max": PAIR_ADVANTAGE * 1.1,
        "critic/advantages/min": -PAIR_ADVANTAGE * 0.9,
        "actor/dynamic_scaling_max": 1.1,
    }
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_padding_stays_empty() -> None:
    batch = shared_example().batch
    padding = ~SharedExample.wide_mask_BT.bool()
    for value_BT in (batch.advantage_BT, batch.pg_weight_BT, batch.entropy_weight_BT, batch.response_mask_BT):
        assert not value_BT[padding].any()
    assert torch.equal(batch.response_mask_BT, SharedExample.wide_mask_BT)


@pytest.mark.parametrize(
    ("changes", "pg_loss", "coefficient"),
    [
        ({"use_entropy_penalty": False}, "pg_loss", 0.0),
        ({"use_advantage_shaping": False}, "TGF_only", 0.06),
        ({"use_vppo_on_perception": False}, "TAS_only", 0.06),
        ({"use_vppo_on_perception": False, "use_advantage_shaping": False}, "plain_GRPO_token_level", 0.06),
        ({"loss_denominator": "selected"}, "alt_selected_denominator", 0.06),
        ({"loss_avg_mode": "seq"}, "alt_paper_eq6_per_sequence", 0.06),
        ({"entropy_penalty_coef": 0.2}, "pg_loss", 0.2),
    ],
)
def test_settings_with_known_losses(changes: dict[str, Any], pg_loss: str, coefficient: float) -> None:
    expected = PAIR_ADVANTAGE * GOLDEN["G6"][pg_loss] + coefficient * GOLDEN["G6"]["entropy_loss"]
    assert loss_of(shared_example(**changes), SharedExample.new_logp_BT) == pytest.approx(expected, abs=5e-8)


def test_entropy_forms() -> None:
    e, pg_loss = SharedExample, PAIR_ADVANTAGE * GOLDEN["G6"]["pg_loss"]
    entropy_BT = torch.arange(12.0).view(2, 6)
    full = loss_of(shared_example(entropy_kind="entropy"), e.new_logp_BT, entropy_BT)
    assert full == pytest.approx(pg_loss + 0.06 * (0 + 1 + 2 + 3 + 4 + 6 + 7 + 8 + 9) / 9, abs=1e-6)
    kept_nll = -e.new_logp_BT[shared_example().record.token_mask_BT.bool()]
    selected = loss_of(shared_example(entropy_tokens="selected"), e.new_logp_BT)
    assert selected == pytest.approx(pg_loss + 0.06 * kept_nll.mean().item(), abs=5e-8)


def test_without_filter_and_shaping_no_second_view_is_needed() -> None:
    e = SharedExample
    plain = settings(use_vppo_on_perception=False, use_advantage_shaping=False)
    assert not plain.needs_dependency
    rows = graded([response(n, sample=i) for i, n in enumerate(e.lengths)], [1.0, 0.0])
    (minibatch,) = assemble(rows, scores(e.old_logp_BT, None), settings=plain, responses_per_minibatch=2)
    assert minibatch.record.dependency_BT is None and minibatch.record.dependency_mean_B is None
    assert torch.equal(minibatch.record.token_mask_BT, e.wide_mask_BT)
    assert "actor/low_var_kl_mean_selected" not in minibatch.metrics


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_vppo_on_perception", False),
        ("use_advantage_shaping", False),
        ("use_entropy_penalty", False),
        ("top_p_perception_tokens", 0.6),
        ("advantage_scaling_min", 0.8),
        ("entropy_penalty_coef", 0.1),
        ("dependency", "kl_full"),
        ("dependency_expm1", False),
        ("stable_ranking", False),
        ("integer_ceil", False),
        ("shaping_min_scope", "device_minibatch"),
        ("shaping_mean_scope", "microbatch"),
        ("negative_advantages", "unscaled"),
        ("negative_advantages", "mirrored"),
        ("text_only_rows", "rank"),
        ("loss_denominator", "selected"),
        ("loss_avg_mode", "seq"),
        ("entropy_kind", "entropy"),
        ("entropy_tokens", "selected"),
        ("clip_ratio_low", 0.1),
        ("clip_ratio_high", 0.1),
        ("clip_ratio_dual", 2.0),
        ("truncated_responses", "mask"),
        ("rollout_correction_cap", 1.5),
        ("rollout_correction", "sequence_mask"),
        ("rollout_correction", "geometric_mask"),
        ("reference_devices", 4),
        ("advantage", "dr_grpo"),
        ("advantage", "reinforce_pp"),
        ("policy_loss", "gspo"),
        ("sapo_tau_positive", 2.0),
        ("sapo_tau_negative", 2.0),
        ("loss_avg_mode", "fixed_length"),
        ("token_scores", "entropy"),
        ("token_scores", "dependency_or_entropy"),
        ("token_scores", "random"),
        ("token_weighting", "soft"),
        ("token_weighting", "pgpo"),
        ("pgpo_tau", 0.2),
        ("pgpo_beta", 1.0),
        ("advantage_scaling_max", 1.05),
        ("kl_coef", 0.1),
        ("kl_kind", "k1"),
        ("kl_in", "reward"),
        ("dependency", "top1_drop"),
        ("dependency", "visual_focus"),
        ("token_scores", "vepo"),
        ("vepo_alpha", 0.2),
        ("token_weighting", "vgpo"),
        ("shaping_kind", "vgpo"),
        ("vgpo_strength", 0.9),
        ("vgpo_tail", 0.8),
        ("vgpo_top", 0.6),
        ("shaping_in", "reward"),
    ],
)
def test_every_setting_changes_the_minibatch(name: str, value: Any) -> None:
    """A setting that silently did nothing would make a run that is not what its config says."""
    # 70 tokens: float32 ceil(0.3 * 70) is 22. Blocks of equal tokens make ties; small differences need expm1.
    generator = torch.Generator().manual_seed(5)
    lengths = [70, 41, 33, 50, 21, 64, 70, 18]
    rows = [
        response(n, group=i // 4, sample=i % 4, image=i != 2, finish="length" if i == 5 else "stop",
                 rollout_logps=[-1.0 - 0.3 * (i % 3)] * n)
        for i, n in enumerate(lengths)
    ]  # fmt: skip
    old_BT = torch.full((8, 70), -1.0)
    steps_BT = torch.randint(0, 4, (8, 70), generator=generator)
    perturbed_BT = old_BT - torch.tensor([0.0, 1e-4, 3e-4, 1.0])[steps_BT] * torch.arange(1, 9)[:, None] / 4
    inputs = dataclasses.replace(
        scores(old_BT, perturbed_BT, divergence_BT=torch.rand(8, 70, generator=generator)),
        entropy_BT=torch.rand(8, 70, generator=generator),
        reference_logp_BT=old_BT - torch.rand(8, 70, generator=generator),
        perturbed_entropy_BT=torch.rand(8, 70, generator=generator),
        visual_focus_BT=2 * torch.rand(8, 70, generator=generator) - 1,
    )
    base: dict[str, Any] = {"top_p_perception_tokens": 0.3, "text_only_rows": "bypass"}
    needed: dict[str, dict[str, Any]] = {
        "reference_devices": {"shaping_min_scope": "device_minibatch"},
        "rollout_correction": {"rollout_correction_cap": 1.5},
        "pgpo_tau": {"token_weighting": "pgpo"},
        "pgpo_beta": {"token_weighting": "pgpo"},
        "kl_kind": {"kl_coef": 0.1},
        "kl_in": {"kl_coef": 0.1},
        "vepo_alpha": {"dependency": "jsd", "token_scores": "vepo"},
        "vgpo_strength": {"shaping_kind": "vgpo"},
        "vgpo_tail": {"token_weighting": "vgpo"},
        "vgpo_top": {"token_weighting": "vgpo"},
    }
    base |= needed.get(name, {})

    def run(**changes: Any) -> Any:
        (minibatch,) = assemble(
            graded(rows, [1.0, 0, 0, 1, 1, 1, 0, 1]),
            inputs,
            settings=settings(**{**base, **changes}),
            responses_per_minibatch=8,
            data_parallel_size=2,
            micro_batch_size=2,
            longest_response=80,
        )
        return minibatch.batch

    before, again, after = run(), run(), run(**{name: value})
    tensors = [field.name for field in dataclasses.fields(before) if field.name.endswith("_BT")]

    def same(one: Any, other: Any) -> bool:
        pairs = [(getattr(one, name), getattr(other, name)) for name in tensors]
        return one.loss == other.loss and all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)

    assert same(before, again)
    assert not same(before, after)


def test_text_only_rows_are_bypassed_or_ranked() -> None:
    """Rows whose views agree, in a mixed mini-batch: the third row has no image."""
    rows = [response(5, group=i // 2, sample=i % 2, image=i != 2) for i in range(4)]
    divergence_BT = torch.tensor([[0.1] * 5, [0.3] * 5, [7.0] * 5, [0.8] * 5])
    inputs = scores(torch.full((4, 5), -1.0), None, divergence_BT)

    def run(text_only_rows: str) -> Minibatch:
        (minibatch,) = assemble(
            graded(rows, [1.0, 0.0, 1.0, 0.0]),
            inputs,
            settings=settings(dependency="kl_full", text_only_rows=text_only_rows),
            responses_per_minibatch=4,
        )
        return minibatch

    bypass, rank = run("bypass"), run("rank")
    assert bypass.record.token_mask_BT[2].tolist() == [1.0] * 5
    assert bypass.record.scale_B[2] == 1.0
    # 0.1, 0.3, 0.8 span z = 0, 2/7, 1 with mean 3/7: beta_max = 0.9 + 0.1 * 7 / 3.
    assert bypass.record.scale_B[[0, 1, 3]].tolist() == pytest.approx([0.9, 0.9 + 0.2 / 3, 0.9 + 0.7 / 3], abs=1e-6)
    assert rank.record.token_mask_BT[2].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    # Its dependency counts as zero, whatever the scores hold: it becomes the smallest score.
    assert rank.metrics["actor/global_sensitivity_score_min"] == 0.0
    assert rank.record.scale_B[2].item() == pytest.approx(0.9, abs=1e-7)
    assert rank.record.scale_B.mean().item() == pytest.approx(1.0, abs=1e-6)
    assert not bypass.record.dependency_BT[2].any() and not rank.record.dependency_BT[2].any()


def test_all_rows_text_only() -> None:
    rows = [response(5, sample=i, image=False) for i in range(2)]
    inputs = scores(torch.full((2, 5), -1.0), torch.full((2, 5), -1.0))
    for preset, kept in (("reference", 2), ("global", 5)):
        (minibatch,) = assemble(
            graded(rows, [1.0, 0.0]), inputs, settings=settings(preset=preset), responses_per_minibatch=2
        )
        assert minibatch.record.scale_B.tolist() == [1.0, 1.0]
        assert minibatch.record.token_mask_BT.sum(1).tolist() == [kept, kept]


def test_truncated_responses_leave_loss_denominator_and_statistics() -> None:
    rows = [response(4, sample=0), response(4, sample=1), response(2, sample=2, finish="length")]
    divergence_BT = torch.tensor([[0.1] * 4, [0.3] * 4, [5.0] * 4])
    rewards = [1.0, 0.0, 0.0]

    def run(truncated: str) -> Minibatch:
        (minibatch,) = assemble(
            graded(rows, rewards),
            scores(torch.full((3, 4), -1.0), None, divergence_BT),
            settings=settings(dependency="jsd", truncated_responses=truncated, top_p_perception_tokens=0.5),
            responses_per_minibatch=3,
        )
        return minibatch

    mask, train = run("mask"), run("train")
    assert not mask.batch.pg_weight_BT[2].any() and not mask.batch.entropy_weight_BT[2].any()
    assert mask.batch.pg_weight_BT.max().item() == pytest.approx(1 / 8)
    assert mask.batch.entropy_weight_BT.sum().item() == pytest.approx(0.06, rel=1e-6)
    assert mask.record.scale_B.tolist() == pytest.approx([0.9, 1.1, 1.0], abs=1e-6)
    assert mask.metrics["actor/trained_row_fraction"] == pytest.approx(2 / 3)
    # Still an answer to its question: it counts in the baseline of its group, and stays visible in the response mask.
    assert torch.equal(mask.record.group_advantage_B, train.record.group_advantage_B)
    assert mask.batch.response_mask_BT[2].sum() == 2
    assert train.batch.pg_weight_BT.max().item() == pytest.approx(1 / 10)
    assert train.record.scale_B[2] > 1.1


def test_metrics_of_rows_that_are_trained_on() -> None:
    """Two rows of two tokens, one of each kept; the third, truncated and left out, has far larger numbers."""
    rows = [response(2, sample=0), response(2, sample=1), response(2, sample=2, finish="length")]
    divergence_BT = torch.tensor([[0.1, 0.3], [0.7, 0.5], [5.0, 9.0]])
    (minibatch,) = assemble(
        graded(rows, [1.0, 1.0, 0.0]),
        scores(torch.full((3, 2), -1.0), None, divergence_BT),
        settings=settings(
            dependency="jsd", truncated_responses="mask", top_p_perception_tokens=0.5, shaping_mean_scope="microbatch"
        ),
        responses_per_minibatch=3,
    )
    # Micro-batches of one row: a mean scale of one, unless the row is the least dependent one.
    assert minibatch.record.scale_B.tolist() == pytest.approx([0.9, 1.0, 1.0], abs=1e-6)
    advantage = 1 / 3 / ((1 / 3) ** 0.5 + 1e-6)  # of rewards 1, 1, 0: mean 2/3, unbiased deviation sqrt(1/3)
    expected = {
        "actor/trained_row_fraction": 2 / 3,
        "actor/perception_token_fraction": 2 / 4,
        "actor/low_var_kl_mean_selected": (0.3 + 0.7) / 2,
        "actor/low_var_kl_mean_rejected": (0.1 + 0.5) / 2,
        "actor/low_var_kl_threshold": (0.3 + 0.7) / 2,
        "actor/sensitivity_score_mean": (0.2 + 0.6) / 2,
        "actor/scaling_factor_mean": 0.95,
        "critic/advantages/mean": 0.95 * advantage,
        "critic/advantages/max": advantage,
        "critic/advantages/min": 0.9 * advantage,
    }
    found = {name: minibatch.metrics[name] for name in expected}
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_minibatch_of_truncated_responses_only() -> None:
    rows = [response(3, sample=i, finish="length") for i in range(2)]
    inputs = scores(torch.full((2, 3), -1.0), torch.full((2, 3), -2.0))
    (minibatch,) = assemble(
        graded(rows, [1.0, 0.0]), inputs, settings=settings(truncated_responses="mask"), responses_per_minibatch=2
    )
    assert not minibatch.batch.pg_weight_BT.any() and not minibatch.batch.entropy_weight_BT.any()
    assert minibatch.metrics == {"actor/trained_row_fraction": 0.0}


def test_rollout_correction_weights_the_policy_gradient_only() -> None:
    rows = [response(2, sample=i, rollout_logps=[-1.5, -9.0]) for i in range(2)]
    inputs = scores(torch.full((2, 2), -1.0), None)
    arguments = {"use_vppo_on_perception": False, "use_advantage_shaping": False}
    plain, corrected = (
        assemble(
            graded(rows, [1.0, 0.0]),
            inputs,
            settings=settings(rollout_correction_cap=cap, **arguments),
            responses_per_minibatch=2,
        )[0]
        for cap in (None, 3.0)
    )
    factor_BT = corrected.batch.pg_weight_BT / plain.batch.pg_weight_BT
    torch.testing.assert_close(factor_BT, torch.tensor([[0.5, 8.0]] * 2).exp().clamp(max=3.0))
    assert torch.equal(corrected.batch.entropy_weight_BT, plain.batch.entropy_weight_BT)
    expected = (1.6487212707 + 3.0) / 2
    assert corrected.metrics["actor/rollout_correction_mean"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="response 1 has 1 of them for 2 tokens"):
        short = [rows[0], response(2, sample=1, rollout_logps=[-1.0])]
        assemble(
            graded(short, [1.0, 0.0]),
            inputs,
            settings=settings(rollout_correction_cap=3.0, **arguments),
            responses_per_minibatch=2,
        )


def test_the_divergence_from_a_reference_model_in_the_loss_or_in_the_reward() -> None:
    """Three responses of 1 and 2 tokens, each 0.5 nats above the reference; k1, coefficient 0.2."""
    rows = [response(n, sample=i) for i, n in enumerate((1, 2, 2))]
    inputs = dataclasses.replace(scores(torch.full((3, 2), -1.0), None), reference_logp_BT=torch.full((3, 2), -1.5))
    arguments = {"use_vppo_on_perception": False, "use_advantage_shaping": False, "kl_coef": 0.2, "kl_kind": "k1"}

    def run(**changes: Any) -> Minibatch:
        (found,) = assemble(
            graded(rows, [1.0, 0.0, 0.5]),
            inputs,
            settings=settings(**{**arguments, **changes}),
            responses_per_minibatch=3,
        )
        return found

    in_loss = run()
    weight_BT = in_loss.batch.kl_weight_BT
    assert weight_BT is not None
    torch.testing.assert_close(weight_BT, torch.tensor([[0.2, 0.0], [0.2, 0.2], [0.2, 0.2]]) / 5)
    assert in_loss.metrics["actor/reference_kl"] == pytest.approx(0.5)
    in_reward = run(kl_in="reward", advantage="dr_grpo")
    assert in_reward.batch.kl_weight_BT is None and in_reward.batch.reference_logp_BT is None
    # Rewards less 0.2 x 0.5 for each token: 0.9, -0.2 and 0.3, whose mean is 1/3.
    expected = [0.9 - 1 / 3, -0.2 - 1 / 3, 0.3 - 1 / 3]
    assert in_reward.batch.advantage_BT[:, 0].tolist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="kl_coef needs reference_logp_BT"):
        inputs = dataclasses.replace(inputs, reference_logp_BT=None)
        run(kl_in="reward")


def test_minibatches_take_rows_in_order_and_keep_the_step_baseline() -> None:
    rows = [response(3, group=i // 4, sample=i % 4) for i in range(12)]
    rewards = [1.0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0]
    dependency_BT = torch.arange(36.0).view(12, 3) / 36
    inputs = scores(torch.full((12, 3), -1.0), None, dependency_BT)
    whole, parts = (
        assemble(graded(rows, rewards), inputs, settings=settings(dependency="kl_full"), responses_per_minibatch=n)
        for n in (12, 5)
    )
    assert [len(part.batch.responses) for part in parts] == [5, 5, 2]
    assert tuple(r for part in parts for r in part.batch.responses) == tuple(rows)
    joined_B = torch.cat([part.record.group_advantage_B for part in parts])
    assert torch.equal(joined_B, whole[0].record.group_advantage_B)
    # Denominators and shaping are each mini-batch's own.
    assert [part.batch.pg_weight_BT.max().item() for part in parts] == pytest.approx([1 / 15, 1 / 15, 1 / 6])
    for part in parts:
        assert part.record.scale_B.mean().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("shaping", [True, False])
def test_minibatches_of_one_response_of_one_token(shaping: bool) -> None:
    rows = graded([response(1, sample=i) for i in range(2)], [1.0, 0.0])
    inputs = scores(torch.full((2, 1), -1.0), torch.full((2, 1), -2.0))
    minibatches = assemble(rows, inputs, settings=settings(use_advantage_shaping=shaping), responses_per_minibatch=1)
    assert [m.batch.advantage_BT.tolist() for m in minibatches] == [
        [[pytest.approx(sign * PAIR_ADVANTAGE)]] for sign in (1, -1)
    ]
    assert [m.batch.pg_weight_BT.tolist() for m in minibatches] == [[[1.0]]] * 2


def test_a_response_of_one_token_is_shaped() -> None:
    rows = graded([response(1, sample=i) for i in range(2)], [1.0, 0.0])
    inputs = scores(torch.full((2, 1), -1.0), None, torch.tensor([[0.25], [0.5]]))
    (minibatch,) = assemble(rows, inputs, settings=settings(dependency="kl_full"), responses_per_minibatch=2)
    assert minibatch.record.scale_B.tolist() == pytest.approx([0.9, 1.1], abs=1e-6)
    assert minibatch.metrics["actor/trained_row_fraction"] == 1.0


def test_one_device_and_micro_batches_of_one_row_unless_told_otherwise() -> None:
    """In the authors' scopes, which read both: every row is a micro-batch, the least dependent one at the minimum."""
    rows = graded([response(2, sample=i) for i in range(4)], [1.0, 0.0, 1.0, 0.0])
    inputs = scores(torch.full((4, 2), -1.0), None, torch.tensor([[0.1], [0.3], [0.5], [0.9]]).expand(4, 2))
    (minibatch,) = assemble(
        rows, inputs, settings=settings(preset="reference", dependency="kl_full"), responses_per_minibatch=4
    )
    # A micro-batch of one row has a mean scale of one unless its relative dependency is zero.
    assert minibatch.record.scale_B.tolist() == pytest.approx([0.9, 1.0, 1.0, 1.0], abs=1e-6)


def test_a_divergence_that_rounds_below_zero_counts_as_zero() -> None:
    rows = graded([response(2, sample=i) for i in range(2)], [1.0, 0.0])
    inputs = scores(torch.full((2, 2), -1.0), None, torch.tensor([[-1e-7, 0.5], [0.25, -1e-9]]))
    (minibatch,) = assemble(rows, inputs, settings=settings(dependency="kl_full"), responses_per_minibatch=2)
    assert minibatch.record.dependency_BT.tolist() == [[0.0, 0.5], [0.25, 0.0]]


def test_score_centering_has_the_weight_without_importance_weights() -> None:
    """Ratios e^0.5 and e^-0.5 of two responses of two tokens. A mask of responses counts for both, token weights do
    not. The terms of some tokens are theirs of the engine's likeliest ones.
    """
    rows = [
        dataclasses.replace(
            response(2, sample=i, rollout_logps=[rollout] * 2),
            likeliest_ids=array("i", [4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3]),
            likeliest_logps=array("d", [-0.1, -0.2, -0.3, -0.4]),
        )
        for i, rollout in enumerate((-1.5, -0.5))
    ]
    arguments = {"use_vppo_on_perception": False, "use_advantage_shaping": False, "policy_loss": "reinforce"}

    def run(**changes: Any) -> Any:
        inputs = scores(torch.full((2, 2), -1.0), None)
        arguments_now = settings(**arguments, **{"score_centering_tokens": 2, **changes})
        return assemble(graded(rows, [1.0, 0.0]), inputs, settings=arguments_now, responses_per_minibatch=2)[0].batch

    batch = run(rollout_correction_cap=1.2)
    assert batch.centering_weight_BT.tolist() == [[0.25] * 2] * 2 and batch.loss.centering_cap == 1.2
    assert batch.pg_weight_BT[0].tolist() == pytest.approx([0.3] * 2)
    of_whole = run(rollout_correction_cap=1.2, rollout_correction="geometric_mask")
    assert of_whole.centering_weight_BT.tolist() == [[0.0] * 2] * 2 and of_whole.loss.centering_cap is None
    assert run(score_centering_tokens=0).centering_weight_BT is None
    terms = batch.terms_at((torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1]))).likeliest
    assert terms.ids_NR.tolist() == [[2, 3], [4, 5], [6, 7]]
    torch.testing.assert_close(terms.rollout_logp_NR, torch.tensor([[-0.3, -0.4], [-0.1, -0.2], [-0.3, -0.4]]))
    assert terms.weight_N.tolist() == [0.25] * 3
    none = torch.zeros(0, dtype=torch.int64)
    assert batch.terms_at((none, none)).likeliest.ids_NR.shape[0] == 0


def test_a_drop_may_be_negative() -> None:
    """The top token may become likelier without the image: the response depends less than one of zero."""
    rows = graded([response(2, sample=i) for i in range(2)], [1.0, 0.0])
    inputs = scores(torch.full((2, 2), -1.0), None, torch.tensor([[-0.5, 0.25], [0.25, -0.125]]))
    (minibatch,) = assemble(rows, inputs, settings=settings(dependency="top1_drop"), responses_per_minibatch=2)
    assert minibatch.record.dependency_BT.tolist() == [[-0.5, 0.25], [0.25, -0.125]]
    assert minibatch.record.token_mask_BT.tolist() == [[0, 1], [1, 0]]
    assert minibatch.record.scale_B.tolist() == pytest.approx([0.9, 1.1], abs=1e-6)


def test_the_visual_focus_is_a_dependency_from_zero_to_one() -> None:
    """(1 + cosine) / 2; zero in a row without an image and where padded. No perturbed view is there."""
    rows = graded([response(2), response(1, sample=1), response(2, sample=2, image=False)], [1.0, 0.0, 1.0])
    cosine_BT = torch.tensor([[-0.5, 0.75], [1.0, 0.0], [0.0, 0.0]])
    inputs = dataclasses.replace(scores(torch.full((3, 2), -1.0), None), visual_focus_BT=cosine_BT)
    (minibatch,) = assemble(rows, inputs, settings=settings(dependency="visual_focus"), responses_per_minibatch=3)
    assert minibatch.record.dependency_BT.tolist() == [[0.25, 0.875], [1.0, 0.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match="needs visual_focus_BT"):
        assemble(
            rows, scores(torch.full((3, 2), -1.0), None), settings=settings(dependency="visual_focus"),
            responses_per_minibatch=3,
        )  # fmt: skip


def test_the_scale_in_the_reward() -> None:
    """Scales 0.9, 1.1 and 1.0 of the rewards 1, 1 and 0: 0.9, 1.1 and 0 have the mean 2/3. A reward of zero stays."""
    rows = graded([response(1, sample=i) for i in range(3)], [1.0, 1.0, 0.0])
    inputs = scores(torch.full((3, 1), -1.0), None, torch.tensor([[0.1], [0.5], [0.3]]))
    arguments = {"dependency": "kl_full", "advantage": "dr_grpo"}
    in_reward, in_advantage = (
        assemble(rows, inputs, settings=settings(shaping_in=place, **arguments), responses_per_minibatch=3)[0]
        for place in ("reward", "advantage")
    )
    assert in_reward.record.scale_B.tolist() == pytest.approx([0.9, 1.1, 1.0], abs=1e-6)
    expected = [0.9 - 2 / 3, 1.1 - 2 / 3, -2 / 3]
    assert in_reward.batch.advantage_BT[:, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert in_reward.record.group_advantage_B.tolist() == pytest.approx(expected, abs=1e-6)
    expected = [0.9 * (1 / 3), 1.1 * (1 / 3), -2 / 3]
    assert in_advantage.batch.advantage_BT[:, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_errors_name_the_fix() -> None:
    rows = graded([response(3, sample=i) for i in range(2)], [1.0, 0.0])
    old_BT = torch.full((2, 3), -1.0)

    def run(inputs: Any, **changes: Any) -> None:
        assemble(rows, inputs, settings=settings(**changes), responses_per_minibatch=2)

    with pytest.raises(ValueError, match="'k3_sampled' needs perturbed_logp_BT"):
        run(scores(old_BT, None))
    with pytest.raises(ValueError, match="'jsd' needs divergence_BT"):
        run(scores(old_BT, old_BT), dependency="jsd")
    with pytest.raises(ValueError, match=r"old_logp_BT has shape \[3, 3\] for 2 responses"):
        run(scores(torch.zeros(3, 3), torch.zeros(3, 3)))
    with pytest.raises(ValueError, match=r"perturbed_logp_BT has shape \[2, 4\]"):
        run(scores(old_BT, torch.zeros(2, 4)))
    with pytest.raises(ValueError, match=r"divergence_BT has shape \[2, 4\]"):
        run(scores(old_BT, None, torch.zeros(2, 4)), dependency="kl_full")
    run(scores(old_BT, old_BT, torch.zeros(2, 4)))  # not needed, so not looked at
    with pytest.raises(ValueError, match="3 entries, more than the width of 2"):
        run(scores(torch.zeros(2, 2), torch.zeros(2, 2)))
    for value in ("nan", "inf", "-inf"):
        broken_BT = old_BT.clone()
        broken_BT[1, 2] = float(value)
        broken = "has NaN or infinite entries in 1 of 2 rows, first row 1"
        with pytest.raises(RuntimeError, match=f"perturbed_logp_BT {broken}"):
            run(scores(old_BT, broken_BT))
        with pytest.raises(RuntimeError, match=f"old_logp_BT {broken}"):
            run(scores(broken_BT, old_BT))
        with pytest.raises(RuntimeError, match=f"divergence_BT {broken}"):
            run(scores(old_BT, None, broken_BT), dependency="jsd")
    with pytest.raises(ValueError, match="no responses"):
        assemble([], scores(old_BT, old_BT), settings=settings(), responses_per_minibatch=2)
    with pytest.raises(ValueError, match="responses_per_minibatch is 0"):
        assemble(rows, scores(old_BT, old_BT), settings=settings(), responses_per_minibatch=0)
