"""The pretended device: every kind of wait and copy counts once, and what is none does not count."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from bench.pretend_device import PretendDevice
from bench.pretended_memory import BLOCKING_COPY, DEVICE, TO_HOST, Moment, is_pinned, on_device
from torch import Tensor


@pytest.fixture
def device() -> Iterator[PretendDevice]:
    with PretendDevice(sources=("tests/tools",)) as pretended:
        yield pretended


def numbers(*, on: torch.device | str = DEVICE) -> Tensor:
    return torch.arange(4, device=on)


def write_at_mask(x: Tensor) -> None:
    x[x > 1] = x[:2] + 1


WAITS: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    "item": (".item()", lambda x: x[1].item()),
    "float": (".item()", lambda x: float(x[1])),
    "int": (".item()", lambda x: int(x.sum())),
    "bool": (".item()", lambda x: bool((x > 0).any())),
    "branch": (".item()", lambda x: 1 if x[0] > 0 else 2),
    "format": (".item()", lambda x: f"{x[1]}"),
    "index by a scalar": (".item()", lambda x: x[x[1]]),
    "nonzero": ("nonzero", lambda x: x.nonzero()),
    "where with one argument": ("nonzero", lambda x: torch.where(x > 1)),
    "argwhere": ("nonzero", lambda x: x.argwhere()),
    "read by a mask": ("boolean mask", lambda x: x[x > 1]),
    "write by a mask": ("boolean mask", write_at_mask),
    "masked_select": ("boolean mask", lambda x: x.masked_select(x > 1)),
    "equal": ("equal", lambda x: torch.equal(x, x)),
    "allclose": ("equal", lambda x: torch.allclose(x, x)),
    "unique": ("unique", lambda x: x.unique()),
    "unique_consecutive": ("unique", lambda x: x.unique_consecutive()),
    "bincount": ("bincount", lambda x: x.bincount()),
    "repeat_interleave": ("repeat_interleave", lambda x: x.repeat_interleave(x)),
    "tolist": (TO_HOST, lambda x: x.tolist()),
    "cpu": (TO_HOST, lambda x: x.cpu()),
    "to the host": (TO_HOST, lambda x: x.to("cpu")),
    "copy into host memory": (TO_HOST, lambda x: torch.empty(4, dtype=torch.int64).copy_(x)),
    "not pinned, copy into it": (TO_HOST, lambda x: torch.empty(4, dtype=torch.int64).copy_(x, non_blocking=True)),
    "tensor": (BLOCKING_COPY, lambda x: torch.tensor([1, 2], device=x.device)),
    "new_tensor": (BLOCKING_COPY, lambda x: x.new_tensor([1, 2])),
    "to the device": (BLOCKING_COPY, lambda x: numbers(on="cpu").to(x.device)),
    "like another": (BLOCKING_COPY, lambda x: numbers(on="cpu").to(x)),
    "not pinned": (BLOCKING_COPY, lambda x: numbers(on="cpu").to(x.device, non_blocking=True)),
    "pinned, but blocking": (BLOCKING_COPY, lambda x: numbers(on="cpu").pin_memory().to(x.device)),
    "pinned in another dtype": (
        BLOCKING_COPY,
        lambda x: numbers(on="cpu").pin_memory().to(x.device, torch.int32, non_blocking=True),
    ),
    "pinned with gaps": (
        BLOCKING_COPY,
        lambda x: torch.zeros(4, 2).pin_memory()[:, 0].to(x.device, non_blocking=True),
    ),
    "copy from host memory": (BLOCKING_COPY, lambda x: x.copy_(numbers(on="cpu"))),
    "index in host memory": (BLOCKING_COPY, lambda x: x[torch.tensor([0, 2])]),
    "list as an index": (BLOCKING_COPY, lambda x: x[[0, 2]]),
    "mask in host memory": (BLOCKING_COPY, lambda x: x[numbers(on="cpu") > 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", WAITS)
def test_each_kind_of_wait_counts_once(name: str, device: PretendDevice) -> None:
    kind, work = WAITS[name]
    x = numbers()
    device.restart()
    work(x)
    assert {what: times for (what, _), times in device.tally.waits.items()} == {kind: 1}
    assert device.tally.waits_of(kind) == 1


NO_WAITS: dict[str, Callable[[Tensor], object]] = {
    "arithmetic with a number": lambda x: (2 * x + 1).sum(),
    "where with three arguments": lambda x: torch.where(x > 1, x, 0),
    "masked_fill": lambda x: x.masked_fill(x > 1, 0),
    "write a number by a mask": lambda x: x.__setitem__(x > 1, 0),
    "index on the device": lambda x: x[x],
    "repeat_interleave with its size": lambda x: x.repeat_interleave(x, output_size=6),
    "slices": lambda x: x[1:3].view(2, 1).expand(2, 5),
    "shape and dtype": lambda x: (x.shape, x.numel(), x.dtype, x.device),
    "to where it is": lambda x: x.to(DEVICE),
    "dtype": lambda x: x.to(torch.float32).double(),
    "on the host": lambda x: (numbers(on="cpu").nonzero().tolist(), numbers(on="cpu").cpu()),
    "made there": lambda x: (torch.zeros(3, device=DEVICE), x.new_ones(3), torch.empty_like(x)),
    "pinned": lambda x: numbers(on="cpu").pin_memory().to(DEVICE, non_blocking=True),
    "copy from pinned memory": lambda x: x.copy_(numbers(on="cpu").pin_memory(), non_blocking=True),
    "to the host, read later": lambda x: x.to("cpu", non_blocking=True),
    "copy into pinned memory": lambda x: torch.empty(4, dtype=torch.int64, pin_memory=True).copy_(x, non_blocking=True),
    "scalar of the host": lambda x: x * torch.tensor(2.0),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_WAITS)
def test_the_rest_does_not_wait(name: str, device: PretendDevice) -> None:
    x = numbers()
    device.restart()
    NO_WAITS[name](x)
    assert not device.tally.waits


def test_results_are_where_their_inputs_are(device: PretendDevice) -> None:
    there, here = numbers(), numbers(on="cpu")
    results = [
        there + here.sum(),
        there[1:],
        there.float(),
        torch.cat([there, there]),
        there.new_zeros(2),
        here.to(there),
    ]
    assert all(map(on_device, results)) and {x.device for x in results} == {DEVICE}
    results = [here + 1, here[1:], here.float(), there.cpu(), torch.zeros(2), torch.zeros_like(there, device="cpu")]
    assert not any(map(on_device, results)) and {x.device for x in results} == {torch.device("cpu")}


def test_pinned_memory_is_known_by_each_of_its_views(device: PretendDevice) -> None:
    made, copied, plain = torch.empty(8, pin_memory=True), torch.ones(8).pin_memory(), torch.ones(8)
    assert is_pinned(made[2:]) and is_pinned(copied) and copied.is_pinned() and not plain.is_pinned()
    device.pin(plain)
    assert plain[1:].is_pinned() and not (plain + 1).is_pinned()


def test_copies_count_their_bytes_by_line(device: PretendDevice) -> None:
    numbers(on="cpu").to(DEVICE)  # int64
    numbers(on="cpu").to(DEVICE, torch.int32)  # converted before it goes
    torch.zeros(10, 2, device=DEVICE)[:, 0].copy_(torch.ones(10, dtype=torch.float64))
    numbers()[numbers(on="cpu") > 0]  # three places
    assert list(device.tally.bytes_to_device.values()) == [32, 16, 40, 24]
    assert list(device.tally.copies_to_device.values()) == [1] * 4
    numbers().to("cpu", torch.float64)
    numbers().tolist()
    assert list(device.tally.bytes_to_host.values()) == [32, 32] and sum(device.tally.copies_to_host.values()) == 2
    function = test_copies_count_their_bytes_by_line
    lines = [line.rpartition(" ") for line in device.tally.bytes_to_device]
    assert {name for _, _, name in lines} == {function.__name__}
    first = function.__code__.co_firstlineno
    assert [place for place, _, _ in lines] == [f"tests/tools/test_pretend_device.py:{first + n}" for n in (1, 2, 3, 4)]


def test_kernels_and_host_operations_are_kept_apart(device: PretendDevice) -> None:
    x, y = numbers(), numbers(on="cpu")
    device.restart()
    (x[1:].view(3, 1) + 1).sum()
    (y[1:] + 1).sum()
    assert {name: times for (name, _), times in device.tally.kernels.items()} == {"add": 1, "sum": 1}
    assert {name: times for (name, _), times in device.tally.host_operations.items()} == {
        "slice": 1,
        "add": 1,
        "sum": 1,
    }
    device.restart()
    y.to(DEVICE)
    assert not device.tally.kernels and not device.tally.host_operations


def test_a_backward_pass_is_seen(device: PretendDevice) -> None:
    x = torch.ones(4, device=DEVICE, requires_grad=True)
    chosen = x[x.detach() > 0]
    device.restart()
    chosen.sum().backward()
    assert device.tally.waits_of("boolean mask") == 1
    assert x.grad is not None and on_device(x.grad)


def test_threads_that_start_within_are_seen(device: PretendDevice) -> None:
    class Own(threading.Thread):
        def run(self) -> None:
            numbers().nonzero()

    thread = Own()
    thread.start()
    thread.join()
    with ThreadPoolExecutor(max_workers=2) as pool:
        moved = pool.submit(lambda: numbers(on="cpu").to(DEVICE)).result()
    assert on_device(moved) and device.tally.waits_of(BLOCKING_COPY) == device.tally.waits_of("nonzero") == 1


def test_parameters_are_taken_over(device: PretendDevice) -> None:
    flat = torch.zeros(6)
    model = torch.nn.Linear(2, 3, bias=False)
    model.weight.data = flat.view(3, 2)
    device.take_over(model.parameters())
    assert on_device(flat) and on_device(model(torch.ones(1, 2, device=DEVICE)))


def test_moments_hold_the_counts_so_far(device: PretendDevice) -> None:
    x = numbers()
    x.tolist()
    device.note()
    x[0].item(), x.nonzero(), numbers(on="cpu").to(DEVICE)
    device.note()
    assert device.tally.moments == [Moment(1, 0), Moment(4, 1)]


def test_nothing_is_left_behind() -> None:
    start = threading.Thread.start
    with PretendDevice() as device:
        numbers().tolist()
    counted = device.tally.waits.copy()
    numbers().tolist()
    assert device.tally.waits == counted and threading.Thread.start is start
