"""Tensors that lie apart: the same values as the tensors in order, and each of them written once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vppo.rollout.transfer.scattered import Scattered, in_order
from megatron_vppo.weights.kinds import Gated, Kind, Split
from megatron_vppo.weights.qkv import FusedQKV, GroupedQKV

KINDS: dict[str, Kind] = {
    "columns": Split((6, 16), partition_dim=1),
    "padded columns": Split((6, 24), partition_dim=1, padded=True),
    "gate and up": Gated(16, (6,)),
    "queries, keys, values": GroupedQKV(heads=8, kv_heads=4, head_dim=3, tail=(5,)),
    "their biases": GroupedQKV(heads=8, kv_heads=4, head_dim=3, tail=()),
    "of the tower": FusedQKV(heads=4, head_dim=3, tail=(5,)),
}


class Written(TorchDispatchMode):
    """Counts the values that operations write."""

    num_values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(out, Tensor) and not isinstance(out, Scattered):
            self.num_values += out.numel()
        return out


def tensors(kind: Kind, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields each tensor of a kind as it lies in a buffer, gathered from ranks, and in order."""
    whole = [torch.randn(shape) for shape in kind.hf_shapes()]
    shards = torch.stack([kind.shard(whole, rank=rank, size=ranks) for rank in range(ranks)])
    yield from zip(kind.views(shards), whole, strict=True)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", KINDS)
def test_a_worker_copies_its_share_once(name: str, ranks: int) -> None:
    """The trainer has 1, 2 or 4 tensor-parallel ranks, the engine 1, 2 or 4 workers."""
    for lying, expected in tensors(KINDS[name], ranks):
        dims = [dim for dim in range(expected.ndim) if expected.shape[dim] % 4 == 0]
        for dim, workers in itertools.product(dims, (1, 2, 4)):
            size = expected.shape[dim] // workers
            for worker in range(workers):
                with Written() as written:
                    share = in_order(lying, expected.shape).narrow(dim, worker * size, size)
                    target = torch.empty(share.shape)
                    before = written.num_values
                    target.copy_(share)
                assert torch.equal(target, expected.narrow(dim, worker * size, size))
                assert before == target.numel(), "torch.empty, and no copy"
                assert written.num_values == 2 * target.numel()


def test_what_lies_in_order_is_a_view() -> None:
    memory = torch.arange(24.0)
    found = in_order(memory.view(2, 3, 4), (6, 4))
    assert type(found) is Tensor and found.data_ptr() == memory.data_ptr()
    apart = memory.view(4, 6)[:, :3]
    assert type(in_order(apart, (4, 3))) is Tensor


def test_whatever_else_is_asked_of_it() -> None:
    (lying, expected), *_ = tensors(KINDS["columns"], 2)
    scattered = in_order(lying, expected.shape)
    assert isinstance(scattered, Scattered)
    assert (scattered.shape, scattered.dtype, scattered.ndim, len(scattered)) == (expected.shape, expected.dtype, 2, 6)
    for found, wanted in [
        (scattered.clone(), expected),
        (scattered.detach(), expected),
        (scattered.data, expected),
        (scattered.t(), expected.t()),
        (scattered[2], expected[2]),
        (scattered[1:5, 3:9], expected[1:5, 3:9]),  # begins within one shard and ends within another
        (scattered[:, 2:5], expected[:, 2:5]),
        (scattered[:, ::2], expected[:, ::2]),
        (scattered[:, -3:], expected[:, -3:]),
        (scattered.narrow(-1, 8, 8), expected.narrow(-1, 8, 8)),
        (scattered.to(torch.float64), expected.double()),
        (torch.cat([scattered, scattered]), torch.cat([expected, expected])),
        (scattered + 1, expected + 1),
        (scattered.reshape(-1), expected.reshape(-1)),
    ]:
        assert torch.equal(torch.empty(wanted.shape, dtype=wanted.dtype).copy_(found), wanted)


def test_a_view_that_ends_within_a_dimension_is_copied() -> None:
    lying = torch.arange(24.0).view(2, 3, 4).transpose(0, 1)
    assert torch.equal(in_order(lying, (6, 2, 2)), lying.reshape(6, 2, 2))
    assert torch.equal(in_order(lying, (4, 6)), lying.reshape(4, 6))
    assert type(in_order(lying, (4, 6))) is Tensor


@torch.inference_mode()
def test_part_of_a_larger_parameter() -> None:
    """vLLM fills fused layers part by part."""
    (_, _), (lying, expected), _ = tensors(KINDS["queries, keys, values"], 2)
    fused = torch.zeros(30, 5)
    fused.narrow(0, 10, 12).copy_(in_order(lying, expected.shape))
    assert torch.equal(fused[10:22], expected) and not fused[:10].any() and not fused[22:].any()
