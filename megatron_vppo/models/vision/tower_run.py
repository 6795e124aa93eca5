"""Runs of the vision tower, and features that several micro-batches read.

An image that neighbouring micro-batches show goes through the tower once, forward and backward:

    micro-batch        0                       1                 2
    forward pass       tower; reads            reads             reads
    backward pass      its gradient waits      waits             all gradients; tower

Pipeline schedules run the backward passes of a stage in the order of its forward passes, so the last reader's comes
last.

Shape suffix legend: M = merged vision features; h = hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vppo.models.vision.tower import Grid, VisionFeatures


class KeptFeatures:
    """The features of a run of the tower, kept for some micro-batches. Each of them reads once, in their order."""

    def __init__(self, readers: int) -> None:
        """`readers`: the micro-batches that read them, that of the run included."""
        self._left = readers
        self._features: tuple[Tensor, ...] = ()
        self._waiting: tuple[_Waiting, ...] = ()

    def put(self, features: VisionFeatures) -> None:
        """Takes the features of the run, with the tower's graph behind them unless nothing of it is trained."""
        self._features = (features.merged_Mh, *features.deepstack_Mh)
        self._waiting = tuple(_Waiting() for _ in self._features)

    def read(self) -> VisionFeatures:
        """Returns the features. The graph of the tower is behind those of the last reader alone."""
        self._left -= 1
        pairs = zip(self._features, self._waiting, strict=True)
        if self._left:
            cut_off = ((one_Mh.detach().requires_grad_(one_Mh.requires_grad), waiting) for one_Mh, waiting in pairs)
            merged_Mh, *deepstack_Mh = (_KeepGradient.apply(*pair) for pair in cut_off)
        else:
            merged_Mh, *deepstack_Mh = (_AddWaiting.apply(*pair) for pair in pairs)
            self._features, self._waiting = (), ()
        return VisionFeatures(merged_Mh, tuple(deepstack_Mh))


@dataclass(frozen=True)
class TowerRun:
    """Images that go through the vision tower together, in one micro-batch."""

    grids_thw: tuple[Grid, ...]
    """Each image once."""
    images_of_ranks: tuple[tuple[int, ...], ...] | None = None
    """The numbers of the images that each rank takes, from `assign_images` in image_parallel.py. None: a single rank
    takes all."""
    kept: KeptFeatures | None = None
    """The place of the features for the micro-batches that follow. None: no other one reads them."""


class _Waiting:
    """The sum of the gradients that wait, in float32 at least: in bfloat16 each addition would round it."""

    def __init__(self) -> None:
        self._sum_Mh: Tensor | None = None

    def add(self, grad_Mh: Tensor) -> None:
        self._sum_Mh = self.plus(grad_Mh)

    def plus(self, grad_Mh: Tensor) -> Tensor:
        """Returns the sum with another gradient."""
        exact_Mh = grad_Mh.to(torch.promote_types(grad_Mh.dtype, torch.float32))
        return exact_Mh if self._sum_Mh is None else self._sum_Mh + exact_Mh


class _Unchanged(torch.autograd.Function):
    """Features as they are. What becomes of their gradient, the classes below say."""

    @staticmethod
    def forward(ctx: Any, features_Mh: Tensor, waiting: _Waiting) -> Tensor:
        ctx.waiting = waiting
        return features_Mh.view_as(features_Mh)


class _KeepGradient(_Unchanged):
    """Backward: the gradient waits."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        ctx.waiting.add(grads[0])
        return None, None


class _AddWaiting(_Unchanged):
    """Backward: the gradients that wait are added."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.waiting.plus(grads[0]).to(grads[0].dtype), None
