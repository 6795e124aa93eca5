"""The FLOPs that the phases of a policy execute, counted by torch, and the least that they need if a prompt runs once
for all responses that see it alike.

Attention counts as in `megatron_vppo/models/flops.py`: causal calls at half the square, and calls with a mask, which
the continuations of a shared prompt have, whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from bench.causal_bias import made_outside_of_modes
from megatron_vppo.algorithm.types import PerturbKey, Response
from megatron_vppo.config.choices import PerturbUnit
from megatron_vppo.models.flops import ModelCost
from megatron_vppo.planning.step_flops import BACKWARD, HEAD_AGAIN

Groups = Sequence[Sequence[Response]]


def count_flops(work: Callable[[], object]) -> int:
    """Counts the FLOPs of everything that `work` runs on a CPU."""
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    counter.mod_tracker = _WholeModel()
    with made_outside_of_modes(), counter:
        work()
    return counter.get_total_flops()


class _WholeModel(ModuleTracker):
    """A tracker that knows no modules: torch's own fails on Megatron's hidden states where there is no gradient."""

    def __enter__(self) -> Self:
        self.parents = {"Global"}
        return self

    def __exit__(self, *error: object) -> None:
        pass


# The CPU's fused attention has no formula in torch.
def _attention(query: torch.Size, key: torch.Size, *, is_causal: bool) -> int:
    pieces, heads, queries, width = query
    return 4 * pieces * heads * queries * key[2] * width // (2 if is_causal else 1)


def _forward(
    q: torch.Size, k: torch.Size, v: torch.Size, dropout: float = 0.0, causal: bool = False, **_: object
) -> int:
    return _attention(q, k, is_causal=causal)


def _backward(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, out: object, sums: object, dropout: float,
    causal: bool, **_: object,
) -> int:  # fmt: skip
    return 2 * _attention(q, k, is_causal=causal)


_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


# --- Floors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Floor:
    """The least FLOPs over all tensor-parallel ranks."""

    cost: ModelCost
    patch_product: int
    """The forward FLOPs of the vision tower's first product for one patch."""
    ranks: int = 1
    """Tensor-parallel ranks. The first product is not split: each of them has it."""

    def scoring(self, groups: Groups, *, per: PerturbUnit | None) -> float:
        """Counts the least FLOPs of scoring.

        Args:
            groups: the responses to each prompt.
            per: the responses that share a perturbed view; None: only original images are scored.
        """
        total = sum(self._view(group) for group in groups)
        if per is None:
            return total
        alike: dict[tuple[int, PerturbKey], list[Response]] = {}
        for response in itertools.chain.from_iterable(groups):
            alike.setdefault((response.group_id, PerturbKey.of(response, 1, per=per)), []).append(response)
        return total + sum(self._view(responses) for responses in alike.values())

    def update(self, groups: Groups) -> float:
        """Counts the least FLOPs of forward and backward passes. Pixels need no gradient."""
        head = sum(self._head(group) for group in groups)
        first = self.ranks * self.patch_product * sum(_patches(group) for group in groups)
        return (1 + BACKWARD) * sum(self._view(group) for group in groups) + HEAD_AGAIN * head - first

    def _view(self, group: Sequence[Response]) -> float:
        """Counts one forward pass of responses that see their prompt alike."""
        prompt = group[0].prompt
        images = sum(self.cost.image(math.prod(grid)) for grid in prompt.grids_thw)
        images += (self.ranks - 1) * self.patch_product * _patches(group)
        tokens = len(prompt.token_ids)
        rest = sum(self.cost.continuation(tokens, len(response.token_ids) - 1) for response in group)
        return images + self.cost.sequence(tokens) + rest + self._head(group)

    def _head(self, group: Sequence[Response]) -> float:
        return self.cost.per_head_position * sum(len(response.token_ids) for response in group)


def _patches(group: Sequence[Response]) -> int:
    return sum(math.prod(grid) for grid in group[0].prompt.grids_thw)
