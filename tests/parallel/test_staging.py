"""Records of tensors on their way to a device: what arrives is what was sent, in one copy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from unittest.mock import patch

import pytest
import torch
from bench.pretend_device import PretendDevice
from bench.pretended_memory import DEVICE, on_device
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_vppo.parallel import staging
from megatron_vppo.parallel.staging import Stager

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Inner:
    hidden: Tensor
    index: Tensor | slice
    name: str


@dataclass(frozen=True)
class Outer:
    tokens: Tensor
    parts: tuple[Inner | None, ...]
    again: Tensor
    values: Tensor


def make_record() -> Outer:
    tokens = torch.tensor([[0, 70000, 151935]])
    transposed = torch.arange(6).view(2, 3).T  # not contiguous
    parts = (
        Inner(torch.tensor([True, False, True]), transposed, "first"),
        None,
        Inner(torch.zeros(0, dtype=torch.bool), slice(3, 5), "second"),
    )
    return Outer(tokens, parts, again=tokens, values=torch.randn(5, 3))


def sent(record: object, device: torch.device = CPU) -> object:
    stager = Stager(device)
    return stager.send(stager.pack(record))


def assert_equal(one: object, other: object) -> None:
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, tuple):
        assert isinstance(other, tuple) and len(one) == len(other)
        for of_one, of_other in zip(one, other, strict=True):
            assert_equal(of_one, of_other)
    elif isinstance(one, Outer | Inner):
        assert type(one) is type(other)
        for field in fields(one):
            assert_equal(getattr(one, field.name), getattr(other, field.name))
    else:
        assert one == other


def test_a_record_arrives_as_it_was_sent() -> None:
    record = make_record()
    arrived = sent(record)
    assert_equal(record, arrived)
    assert isinstance(arrived, Outer) and arrived.again is arrived.tokens, "it was sent once"
    assert arrived.tokens.data_ptr() != record.tokens.data_ptr()


@pytest.mark.parametrize(
    ("numbers", "travels_as"),
    [
        ([0, 255], torch.uint8),
        ([0, 256], torch.int16),
        ([-1, 3], torch.int16),
        ([-32768, 32767], torch.int16),
        ([0, 32768], torch.int32),
        ([-(2**31), 2**31 - 1], torch.int32),
        ([0, 2**31], torch.int64),
        ([], torch.uint8),
    ],
)
def test_integers_travel_in_the_narrowest_type_that_holds_them(numbers: list[int], travels_as: torch.dtype) -> None:
    stager = Stager(CPU)
    staged = stager.pack((torch.tensor(numbers, dtype=torch.int64),))
    assert [group.travels_as for group in staged.groups] == [travels_as]
    assert stager.send(staged)[0].tolist() == numbers


def test_other_types_are_read_in_place_where_kernels_can() -> None:
    """Each begins at a multiple of 16 bytes, though its neighbours have odd lengths."""
    record = tuple(torch.arange(n, dtype=torch.int32) for n in (1, 3, 5)) + (torch.arange(7, dtype=torch.uint8),) * 2
    arrived = sent(record)
    assert isinstance(arrived, tuple)
    assert_equal(record, arrived)
    start = arrived[0].data_ptr()
    assert [(tensor.data_ptr() - start) % 16 for tensor in arrived] == [0] * 5


def test_what_is_kept_for_long_does_not_keep_the_images() -> None:
    stager = Stager(CPU)
    images, mask = torch.ones(999, dtype=torch.uint8), torch.ones(3, dtype=torch.bool)
    bounds, terms = torch.ones(2, dtype=torch.int32), torch.ones(5)
    staged = stager.pack((images, mask, bounds, terms, torch.arange(4)))
    in_buffer = [
        tensor.untyped_storage().data_ptr() == staged.buffer.untyped_storage().data_ptr()
        for tensor in stager.send(staged)
    ]
    assert in_buffer == [True, False, False, False, False]


def test_what_holds_no_data_stays_as_it_is() -> None:
    mask = causal_lower_right(3, 5)
    record = (mask, None, "text", slice(2))
    assert sent(record) is record


def test_tensors_that_would_be_left_behind_are_refused() -> None:
    for record in (([torch.zeros(1)],), ({"a": torch.zeros(1)},)):
        with pytest.raises(TypeError, match="put its tensors in a tuple or a dataclass"):
            Stager(CPU).pack(record)


def test_a_record_needs_one_copy_that_nobody_waits_for() -> None:
    def pinned(num_bytes: int, device: torch.device) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    record = make_record()
    with PretendDevice() as device, patch.object(staging, "host_buffer", pinned):
        arrived = sent(record, DEVICE)
        assert isinstance(arrived, Outer)
        assert on_device(arrived.tokens) and on_device(arrived.values) and arrived.parts[0] is not None
        tally = device.restart()
    assert not tally.waits and sum(tally.copies_to_device.values()) == 1
    assert sum(tally.bytes_to_device.values()) <= 3 * 4 + 16 + 6 + 16 + 3 + 16 + 15 * 4 + 16
