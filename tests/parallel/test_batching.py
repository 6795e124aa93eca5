"""Response tokens of a micro-batch: the hidden states that predict them, and those of each kind of view."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_vppo.parallel.batching import ResponseTokens


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def tokens_at(index_N: Tensor) -> ResponseTokens:
    zeros = torch.zeros_like(index_N)
    return ResponseTokens(index_N, zeros, at=None, num_perturbed=0)


def test_states_may_be_read_several_times() -> None:
    hidden_C1h = torch.arange(6.0).view(3, 1, 2).requires_grad_()
    predicting_Nh = tokens_at(torch.tensor([2, 0, 2])).predicting(hidden_C1h)
    assert predicting_Nh.tolist() == [[4, 5], [0, 1], [4, 5]]
    (gradient,) = torch.autograd.grad(predicting_Nh.sum(), hidden_C1h)
    assert gradient[:, 0].tolist() == [[1, 1], [0, 0], [2, 2]]


@pytest.mark.usefixtures("_two_threads")
def test_the_gradient_of_a_shared_state_repeats_with_several_threads() -> None:
    """With plain indexing nearly every repetition differs: the threads add to the same row in any order."""
    generator = torch.Generator().manual_seed(0)
    hidden_C1h = torch.randn(64, 1, 128, generator=generator, requires_grad=True)
    tokens = tokens_at(torch.randint(0, 64, (4096,), generator=generator))
    upstream_Nh = torch.randn(4096, 128, generator=generator)
    found = [torch.autograd.grad((tokens.predicting(hidden_C1h) * upstream_Nh).sum(), hidden_C1h)[0] for _ in range(50)]
    assert all(torch.equal(found[0], again) for again in found[1:])


def test_tokens_by_kind_of_view() -> None:
    """Seven tokens: three of a row without a perturbed view, then two of a row with one, then that row's perturbed."""
    numbers_N = torch.arange(7)
    tokens = ResponseTokens(numbers_N, 10 + numbers_N, at=(20 + numbers_N, 30 + numbers_N), num_perturbed=2)
    kinds = {"originals": [0, 1, 2, 3, 4], "single": [0, 1, 2], "paired": [3, 4], "perturbed": [5, 6]}
    for kind, members in kinds.items():
        chosen = tokens.select(getattr(tokens, kind))
        assert chosen.hidden_index_N.tolist() == members
        assert chosen.target_N.tolist() == [10 + number for number in members]
        assert chosen.at is not None and chosen.at[1].tolist() == [30 + number for number in members]
        assert chosen.num_perturbed == (2 if kind == "perturbed" else 0)
