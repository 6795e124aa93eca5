"""Grouping, weights, shaping of negative advantages, padding and settings, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from megatron_vppo.algorithm.advantages import group_advantages
from megatron_vppo.algorithm.grouping import keep_group
from megatron_vppo.algorithm.loss import dual_clip_surrogate, surrogate_loss
from megatron_vppo.algorithm.padding import length_mask, pad_rows
from megatron_vppo.algorithm.reference_split import emulated_split
from megatron_vppo.algorithm.settings import VppoSettings
from megatron_vppo.algorithm.shaping import shape_advantages
from megatron_vppo.algorithm.token_filter import kept_counts, top_token_mask
from megatron_vppo.algorithm.token_weights import entropy_penalty_weight, policy_gradient_weight, rollout_correction
from megatron_vppo.algorithm.types import LossSpec, TokenTerms
from megatron_vppo.config.schema import AlgorithmConfig
from tests.algorithm.rows import settings


def test_keep_group_bounds_are_strict() -> None:
    assert [keep_group([1.0] * c + [0.0] * (8 - c), low=0.01, high=0.99) for c in (0, 1, 7, 8)] == [
        False,
        True,
        True,
        False,
    ]
    assert not keep_group([0.5, 0.5], low=0.5, high=0.99)
    assert not keep_group([0.5, 0.5], low=0.01, high=0.5)
    with pytest.raises(ValueError, match="without responses"):
        keep_group([], low=0.01, high=0.99)


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="group 4 has 1 response"):
        group_advantages(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([3, 3, 4]))


def test_equal_rewards_have_no_advantage() -> None:
    assert group_advantages(torch.ones(4), torch.zeros(4, dtype=torch.int64)).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("rows", "devices", "size", "device_B", "micro_B"),
    [
        (8, 2, 2, [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 8, 8, 9, 9]),
        (8, 1, 3, [0] * 8, [0, 0, 0, 1, 1, 1, 2, 2]),
        (7, 2, 2, [0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 7, 7, 8]),
        (3, 5, 4, [0, 1, 3], [0, 3, 9]),
    ],
)
def test_emulated_split(rows: int, devices: int, size: int, device_B: list[int], micro_B: list[int]) -> None:
    actual_device_B, actual_micro_B = emulated_split(rows, devices=devices, micro_batch_size=size)
    assert actual_device_B.tolist() == device_B
    assert actual_micro_B.tolist() == micro_B


def test_emulated_split_refuses_nothing_to_split_into() -> None:
    with pytest.raises(ValueError, match="devices is 0"):
        emulated_split(4, devices=0, micro_batch_size=1)
    with pytest.raises(ValueError, match="micro_batch_size 0"):
        emulated_split(4, devices=1, micro_batch_size=0)


def test_negative_advantages() -> None:
    advantage_B = torch.tensor([2.0, 2.0, -2.0, -2.0, -2.0])
    scale_B = torch.tensor([0.9, 1.5, 0.9, 1.5, 2.5])
    expected = {
        "same": [1.8, 3.0, -1.8, -3.0, -5.0],
        "unscaled": [1.8, 3.0, -2.0, -2.0, -2.0],
        # 2 - alpha; at alpha 2.5 it would turn the sign, so it stops at zero.
        "mirrored": [1.8, 3.0, -2.2, -1.0, 0.0],
    }
    for negative, values in expected.items():
        assert shape_advantages(advantage_B, scale_B, negative=negative).tolist() == pytest.approx(values)
    with pytest.raises(ValueError, match="flipped"):
        shape_advantages(advantage_B, scale_B, negative="flipped")


KEPT = torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 0, 0], [0, 0, 0, 0]])
TOKENS = torch.tensor([[1.0, 1, 1, 1], [1.0, 1, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("denominator", "average", "first_row", "second_row"),
    [
        ("all", "token", 1 / 6, 1 / 6),
        ("selected", "token", 1 / 3, 1 / 3),
        ("all", "seq", 1 / 2 / 4, 1 / 2 / 2),
        ("selected", "seq", 1 / 2 / 1, 1 / 2 / 2),
    ],
)
def test_policy_gradient_weight(denominator: str, average: str, first_row: float, second_row: float) -> None:
    """Two responses with tokens (the third is empty or left out): 1 of 4 and 2 of 2 tokens kept."""
    weight_BT = policy_gradient_weight(KEPT, TOKENS, denominator=denominator, average=average)
    expected_BT = KEPT * torch.tensor([[first_row], [second_row], [0.0]])
    torch.testing.assert_close(weight_BT, expected_BT, rtol=1e-7, atol=0)


def test_kept_tokens_of_rows_left_out_carry_nothing() -> None:
    weight_BT = policy_gradient_weight(torch.ones(3, 4), TOKENS, denominator="selected", average="token")
    torch.testing.assert_close(weight_BT, TOKENS / 6)
    nothing_BT = torch.zeros(2, 3)
    for average in ("token", "seq"):
        weight_BT = policy_gradient_weight(torch.ones(2, 3), nothing_BT, denominator="all", average=average)
        assert torch.equal(weight_BT, nothing_BT)


def test_entropy_penalty_weight() -> None:
    everywhere = entropy_penalty_weight(KEPT, TOKENS, coefficient=0.06, tokens="all")
    torch.testing.assert_close(everywhere, TOKENS * 0.01)
    kept = entropy_penalty_weight(KEPT, TOKENS, coefficient=0.06, tokens="selected")
    torch.testing.assert_close(kept, KEPT * 0.02)
    assert not entropy_penalty_weight(KEPT, torch.zeros(3, 4), coefficient=0.06, tokens="all").any()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="loss_denominator is 'none'"):
        policy_gradient_weight(KEPT, TOKENS, denominator="none", average="token")
    with pytest.raises(ValueError, match="loss_avg_mode is 'row'"):
        policy_gradient_weight(KEPT, TOKENS, denominator="all", average="row")
    with pytest.raises(ValueError, match="entropy_tokens is 'none'"):
        entropy_penalty_weight(KEPT, TOKENS, coefficient=0.1, tokens="none")
    for fraction in (0.0, 1.1):
        with pytest.raises(ValueError, match="keep_fraction"):
            kept_counts(torch.tensor([5]), keep_fraction=fraction, integer_ceil=True)


def test_rollout_correction() -> None:
    old_BT = torch.tensor([0.5, 1.0, 4.0, 1.0]).log()[None]
    weight_BT = rollout_correction(old_BT, torch.zeros(1, 4), torch.tensor([[1.0, 1, 1, 0]]), cap=2.0)
    assert weight_BT.tolist()[0] == pytest.approx([0.5, 1.0, 2.0, 0.0])
    with pytest.raises(ValueError, match="rollout_correction_cap is 0"):
        rollout_correction(old_BT, old_BT, torch.ones(1, 4), cap=0.0)


def test_entropy_term_by_kind() -> None:
    logp_N, entropy_N = torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 0.25])
    zero_N, weight_N = torch.zeros(2), torch.tensor([0.1, 0.2])

    def loss(kind: str, entropy_N: torch.Tensor | None) -> float:
        spec = LossSpec(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_dual=3.0, entropy_kind=kind)
        terms = TokenTerms(logp_N, zero_N, zero_N, weight_N)
        return surrogate_loss(logp_N, terms, spec=spec, entropy_N=entropy_N).loss.item()

    assert loss("nll", entropy_N) == pytest.approx(0.1 + 0.4)
    assert loss("entropy", entropy_N) == pytest.approx(0.05 + 0.05)
    with pytest.raises(ValueError, match="needs entropy_N"):
        loss("entropy", None)
    with pytest.raises(ValueError, match="'gini'"):
        loss("gini", entropy_N)


def test_padding() -> None:
    assert length_mask([2, 0, 3]).tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
    assert length_mask([1], width=3).tolist() == [[1, 0, 0]]
    padded = pad_rows([[1, 2], [], [3]], dtype=torch.int64, width=3, fill=-1)
    assert padded.dtype == torch.int64 and padded.tolist() == [[1, 2, -1], [-1, -1, -1], [3, -1, -1]]
    assert pad_rows([], dtype=torch.float32).shape == (0, 0)
    for make in (lambda: length_mask([4], width=3), lambda: pad_rows([[0.0] * 4], dtype=torch.float32, width=3)):
        with pytest.raises(ValueError, match="4 entries, more than the width of 3"):
            make()


def test_every_algorithm_setting_is_ours_or_named_here() -> None:
    ours = {field.name for field in fields(VppoSettings)}
    elsewhere = {
        "preset",  # filled into the others
        "resize",  # the image pipeline
        "online_filtering",  # whether the loop calls keep_group
        "filter_low",  # arguments of keep_group
        "filter_high",
        "max_try_make_batch",  # the loop
        "perturb",  # the image perturbation
        "score_banned_tokens",  # the vocabulary head
    }
    assert ours.isdisjoint(elsewhere)
    assert ours | elsewhere == set(AlgorithmConfig.model_fields)


def test_settings_refuse_unknown_choices() -> None:
    assert settings().shaping_mean_scope == "minibatch"
    assert settings(preset="reference").shaping_mean_scope == "microbatch"
    values = {field.name: getattr(settings(), field.name) for field in fields(VppoSettings)}
    with pytest.raises(ValueError, match=r"algorithm\.dependency is 'kl_topM'; set it to one of 'k3_sampled'"):
        VppoSettings(**{**values, "dependency": "kl_topM"})


def test_padding_is_never_ranked() -> None:
    """Whatever stands there: larger, not a number, or larger only than negative dependencies."""
    dependency_BT = torch.tensor([[-1.0, -2.0, -3.0, 9.0, float("nan"), 0.0]])
    mask_BT = length_mask([3], width=6)
    kept_BT = top_token_mask(dependency_BT, mask_BT, keep_fraction=0.5, stable=True, integer_ceil=True)
    assert kept_BT.tolist() == [[1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("advantage", "ratio", "clipped", "dual"),
    [
        (1.0, 0.5, False, False),
        (1.0, 1.0, False, False),
        (1.0, 1.5, True, False),
        (-1.0, 0.5, True, False),
        (-1.0, 1.0, False, False),
        (-1.0, 1.5, False, False),
        (-1.0, 4.0, False, True),
        (1.0, 4.0, True, False),
    ],
)
def test_which_tokens_count_as_clipped(advantage: float, ratio: float, clipped: bool, dual: bool) -> None:
    surrogate = dual_clip_surrogate(
        torch.tensor([ratio]).log(),
        torch.zeros(1),
        torch.tensor([advantage]),
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio_dual=3.0,
    )
    assert surrogate.clipped_high_N.tolist() == [clipped]
    assert surrogate.clipped_dual_N.tolist() == [dual]
