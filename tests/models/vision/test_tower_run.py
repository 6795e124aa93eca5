"""Features that several micro-batches read, against autograd over all of them at once."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from megatron_vppo.models.vision.tower import VisionFeatures
from megatron_vppo.models.vision.tower_run import KeptFeatures

PIXELS = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
READERS = tuple(torch.tensor(weights, dtype=torch.float64) for weights in ([1.0, 2.0], [-3.0, 0.5], [0.25, 4.0]))
"""The factors of the features in the loss of each micro-batch."""


def features_of(weight: Tensor) -> VisionFeatures:
    """A tower of one weight, with one deepstack feature."""
    return VisionFeatures(PIXELS * weight.exp(), (PIXELS * weight.sin(),))


def loss_of(features: VisionFeatures, reader_2: Tensor) -> Tensor:
    return ((features.merged_Mh @ reader_2) ** 2).sum() + (features.deepstack_Mh[0] @ reader_2).sum()


@pytest.mark.parametrize("readers", [2, 3])
@pytest.mark.parametrize("in_flight", [False, True], ids=["one by one", "all forward passes first"])
def test_the_last_reader_runs_the_tower_backward_for_all(readers: int, in_flight: bool) -> None:
    expected = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    sum(loss_of(features_of(expected), reader) for reader in READERS[:readers]).backward()
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    kept, losses = KeptFeatures(readers), []
    kept.put(features_of(weight))
    for number, reader in enumerate(READERS[:readers]):
        losses.append(loss_of(kept.read(), reader))
        if not in_flight:
            assert weight.grad is None, "the tower has not run backward"
            losses[number].backward()
    if in_flight:
        for loss in losses:
            assert weight.grad is None
            loss.backward()
    assert expected.grad is not None and weight.grad is not None
    torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-14, atol=0)


def test_gradients_in_bfloat16_are_rounded_once() -> None:
    """256 + 1 + 1 is 256 in bfloat16 if each sum is rounded: the step from 256 to the next number is 2."""
    leaf = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    kept = KeptFeatures(3)
    kept.put(VisionFeatures(leaf * 1))
    for factor in (256.0, 1.0, 1.0):
        (kept.read().merged_Mh * factor).sum().backward()
    assert leaf.grad is not None and leaf.grad.item() == 258.0


def test_a_frozen_tower_and_a_scoring_pass_have_no_gradient() -> None:
    weight = torch.tensor(0.7, dtype=torch.float64)
    kept = KeptFeatures(2)
    kept.put(features_of(weight))
    for _ in range(2):
        features = kept.read()
        assert not features.merged_Mh.requires_grad and torch.equal(features.merged_Mh, features_of(weight).merged_Mh)


def test_the_tower_is_let_go_with_its_last_reader() -> None:
    kept = KeptFeatures(2)
    features = features_of(torch.tensor(0.7, dtype=torch.float64, requires_grad=True))
    graph = weakref.ref(features.merged_Mh)
    kept.put(features)
    del features
    kept.read()
    assert graph() is not None
    kept.read()
    assert graph() is None
