"""The sum of gradients over data- and context-parallel ranks, which begins while the backward pass still runs.

Megatron keeps the gradients of a stage in buckets, in the order in which a backward pass makes them, and can reduce
each by itself without waiting. Its own rule for when to start one wants a gradient from autograd for every trained
parameter, on every rank, in the last micro-batch of every mini-batch, and ends the run by an assertion otherwise. Three
things here have none:

- the output weight: the vocabulary head adds its gradient to Megatron's sum without autograd (ADR 0011);
- the vision tower in a micro-batch without images;
- the tower on a rank that has none of a micro-batch's images, where others have.

So Megatron reduces, and its rule is off: under `no_sync` no gradient is registered with it, so that it takes every
mini-batch for its first one, whose sums it starts only where none has begun. The rule is here: a bucket starts when
its last gradient is complete, and after all buckets in front of it. Ranks complete buckets in different orders, but
the collectives of a group must come in one order on all of its ranks. What has not started by the end of the backward
pass starts then:

    gradients, in this order          with images              without
    output weight                     bucket 0                 bucket 0
    layers 3, 2                       bucket 1                 bucket 1
    layers 1, 0, embedding            bucket 2                 bucket 2
    tower                             bucket 3                 .
    the backward pass has ended                                bucket 3

Shape suffix legend: N = response tokens of a micro-batch, flat; h = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import Parameter


class GradientReduction:
    """Starts the reduction of each bucket of gradients on this rank as early as it is right."""

    def __init__(
        self, ddps: Sequence[DistributedDataParallel], *, head_weight: Parameter | None, tower: Sequence[Parameter]
    ) -> None:
        """
        Args:
            ddps: the stages of this rank, made with `overlap_grad_reduce`. None of them: Megatron reduces by itself
                when the last micro-batch has run.
            head_weight: the output weight if it has no gradient but that of the vocabulary head.
            tower: the parameters of the vision tower.
        """
        self._ddps = tuple(ddps)
        # Of several stages on a rank, the last is the first to have all its gradients.
        self._buckets = [bucket for ddp in reversed(self._ddps) for bucket in ddp.bucket_groups]
        self._bucket_of = {
            parameter: number for number, bucket in enumerate(self._buckets) for parameter in bucket.params
        }
        self._head_weight = head_weight if head_weight in self._bucket_of else None
        self._tower = frozenset(tower)
        self._comes_again: frozenset[Parameter] = frozenset()
        """The parameters whose gradient may come several times in the last micro-batch."""
        self._incomplete: list[set[Parameter]] = []
        """The parameters of each bucket whose gradient is still to come."""
        self._started = 0
        """The number of buckets whose reduction has begun, from the first."""
        self._is_last = False
        """True while the backward pass of a mini-batch's last micro-batch may run."""
        for parameter in self._bucket_of:
            # Runs after Megatron's own hook, which was there before and adds the gradient to the bucket.
            get_gradient_edge(parameter).node.register_hook(self._hook(parameter))

    @contextmanager
    def of_mini_batch(self, *, tower_again: bool) -> Iterator[None]:
        """Has gradients reduced that the micro-batches within the block make; `start_rest` belongs to their end.

        Args:
            tower_again: the last micro-batch reads several runs of the tower, and a recomputed layer makes a gradient
                for each of them. Those of the tower start at the end then.
        """
        self._comes_again = self._tower if tower_again else frozenset()
        self._incomplete = [set(bucket.params) for bucket in self._buckets]
        self._started, self._is_last = 0, True
        try:
            with ExitStack() as megatrons_rule:
                for ddp in self._ddps:
                    megatrons_rule.enter_context(ddp.no_sync())  # switches it off
                yield
        finally:
            self._started, self._is_last = 0, False

    @contextmanager
    def not_last(self) -> Iterator[None]:
        """Marks micro-batches after which others follow; the `no_sync_func` of Megatron's schedules."""
        before, self._is_last = self._is_last, False
        try:
            yield
        finally:
            self._is_last = before

    def after_head(self, hidden_Nh: Tensor) -> None:
        """Takes the output weight's gradient for complete when the backward pass has that of the head's input."""
        if (weight := self._head_weight) is not None:
            hidden_Nh.register_hook(lambda _: self._complete(weight))

    def start_rest(self) -> None:
        """Starts the reductions that have not begun yet. Megatron's `finish_grad_sync` waits for all of them."""
        while self._started < len(self._buckets):
            self._start_next()

    def _hook(self, parameter: Parameter) -> Callable[..., None]:
        return lambda *_: self._complete(parameter)

    def _complete(self, parameter: Parameter) -> None:
        bucket = self._bucket_of[parameter]
        assert bucket >= self._started, f"a gradient came after the reduction of its bucket, {bucket}, had begun"
        if not self._is_last or parameter in self._comes_again:
            return
        self._incomplete[bucket].discard(parameter)
        while self._started < len(self._buckets) and not self._incomplete[self._started]:
            self._start_next()

    def _start_next(self) -> None:
        self._buckets[self._started].start_grad_sync()
        self._started += 1
