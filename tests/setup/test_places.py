"""GPUs, cores and engines of ranks on hosts, by tables: CUDA is not asked."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import pytest

from megatron_vppo.setup.places import (
    Place,
    device_number,
    engine_devices,
    engine_threads,
    place_problems,
    place_warnings,
    ranks_by_host,
    seat_engines,
)


def place(host: str = "n1", local: int = 0, ids: str = "0,1,2,3,4,5,6,7", uuids: str | None = None) -> Place:
    """A rank that sees the GPUs `ids`; their UUIDs are the host's name and the same numbers, if not said otherwise."""
    numbers = tuple(filter(None, ids.split(",")))
    names = numbers if uuids is None else tuple(uuids.split(","))
    return Place(
        host=host,
        local_rank=local,
        gpu_ids=numbers,
        uuids=tuple(f"GPU-{host}-{name}" for name in names),
        cores=tuple(range(64)),
        host_cores=64,
        allotted_gpus=0,
    )


def block(hosts: int, per_host: int, ids: str = "0,1,2,3,4,5,6,7") -> list[Place]:
    return [place(f"n{host + 1}", local, ids) for host in range(hosts) for local in range(per_host)]


def one_each(hosts: int, per_host: int) -> list[Place]:
    """Every rank sees its own GPU alone, by its number on the host."""
    return [place(f"n{host + 1}", local, str(local)) for host in range(hosts) for local in range(per_host)]


def hidden(per_host: int) -> list[Place]:
    """Every rank sees its own GPU alone, as number 0: the others do not exist for it."""
    return [place("n1", local, "0", str(local)) for local in range(per_host)]


def cyclic(hosts: int, per_host: int) -> list[Place]:
    return [place(f"n{host + 1}", local) for local in range(per_host) for host in range(hosts)]


def on_cpu(places: Sequence[Place]) -> list[Place]:
    return [dataclasses.replace(place, gpu_ids=(), uuids=()) for place in places]


@pytest.mark.parametrize(
    ("places", "numbers"),
    [
        (block(2, 4), [0, 1, 2, 3, 0, 1, 2, 3]),
        (one_each(1, 4), [0, 0, 0, 0]),
        (hidden(3), [0, 0, 0]),
        (block(1, 3, "2,5,GPU-5f"), [0, 1, 2]),
        (on_cpu(block(1, 2)), [None, None]),
    ],
)
def test_the_gpu_of_a_rank(places: list[Place], numbers: list[int | None]) -> None:
    assert [device_number(place) for place in places] == numbers


def test_a_rank_without_a_gpu_is_refused() -> None:
    places = block(1, 3, "4,6")
    with pytest.raises(ValueError, match=r"n1: the rank with local number 2 sees 2 GPUs \(4, 6\)"):
        device_number(places[2])
    assert [*place_problems(places, tensor=1)] == [
        "n1: the rank with local number 2 sees 2 GPUs (4, 6); start at most 2 ranks per host, or show each rank more"
    ]


@pytest.mark.parametrize(
    ("places", "size", "count", "leaders", "devices"),
    [
        (block(1, 8), 2, None, [0, 2, 4, 6], ["0,1", "2,3", "4,5", "6,7"]),
        (block(1, 8), 2, 2, [0, 4], ["0,1", "4,5"]),
        (block(2, 4), 2, 2, [0, 4], ["0,1", "0,1"]),
        (block(2, 3), 2, None, [0, 3], ["0,1", "0,1"]),  # the third GPU of each host has no other next to it
        (block(2, 8), 8, None, [0, 8], ["0,1,2,3,4,5,6,7"] * 2),
        (block(1, 4, "2,5,GPU-5f,7"), 2, None, [0, 2], ["2,5", "GPU-5f,7"]),
        (one_each(2, 4), 2, None, [0, 2, 4, 6], ["0,1", "2,3"] * 2),
        (hidden(2), 1, None, [0, 1], ["0", "0"]),
        (cyclic(2, 4), 2, None, [0, 4, 1, 5], ["0,1", "2,3"] * 2),
        ([*block(1, 2), place("n2", 0)], 1, 3, [0, 1, 2], ["0", "1", "0"]),
    ],
)
def test_engines_take_gpus_of_one_host(
    places: list[Place], size: int, count: int | None, leaders: list[int], devices: list[str]
) -> None:
    seats = seat_engines(places, count=count, size=size, on_gpu=True)
    assert [seat.leader for seat in seats] == leaders
    assert [engine_devices(places, seat) for seat in seats] == devices
    for seat in seats:
        assert len({places[rank].host for rank in seat.ranks}) == 1 and len(seat.ranks) == size


@pytest.mark.parametrize(
    ("places", "count", "leaders"),
    [
        (block(1, 2), None, [0]),
        (block(1, 4), 3, [0, 1, 2]),
        (block(2, 2), 2, [0, 2]),
        (block(1, 3), 3, [0, 1, 2]),
    ],
)
def test_engines_on_cpu(places: list[Place], count: int | None, leaders: list[int]) -> None:
    """One in all by default; otherwise each is led by a rank of its own, however many workers it has."""
    seats = seat_engines(on_cpu(places), count=count, size=2, on_gpu=False)
    assert [seat.leader for seat in seats] == leaders


def test_engines_without_room_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_engines=3 .*tensor_parallel_size=2: there is room for 2.* n1 3, n2 3\)"):
        seat_engines(block(2, 3), count=3, size=2, on_gpu=True)
    with pytest.raises(ValueError, match=r"num_engines=1 .*tensor_parallel_size=4: there is room for 0.* n1 2, n2 2\)"):
        seat_engines(block(2, 2), count=None, size=4, on_gpu=True)


def test_gpus_that_a_leader_is_not_shown_are_named() -> None:
    (seat, _) = seat_engines(hidden(4), count=None, size=2, on_gpu=True)
    with pytest.raises(ValueError, match=r"of rank 0 on n1 needs the GPUs of ranks 0 to 1, .* alone, as 0; use "):
        engine_devices(hidden(4), seat)


def test_threads_are_shared_with_engines_that_may_use_the_same_cores() -> None:
    def threads(places: list[Place], count: int, size: int = 1) -> list[int]:
        seats = seat_engines(on_cpu(places), count=count, size=size, on_gpu=False)
        return [engine_threads(on_cpu(places), seats, number, size=size) for number in range(count)]

    assert threads(block(2, 2), 2) == [64, 64], "one engine per host"
    assert threads(block(2, 2), 4) == [32, 32, 32, 32]
    assert threads(block(2, 2), 4, size=2) == [16, 16, 16, 16]
    own = [dataclasses.replace(p, cores=tuple(range(8 * i, 8 * i + 8))) for i, p in enumerate(block(1, 4))]
    assert threads(own, 4) == [8, 8, 8, 8], "tasks with cores of their own"
    few = [dataclasses.replace(p, cores=(0, 1)) for p in block(1, 4)]
    assert threads(few, 4) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("places", "tensor", "pattern"),
    [
        (block(2, 4), 4, None),
        (block(2, 2), 4, None),  # a tensor-parallel group over two hosts: slow, and said so, but it works
        (cyclic(2, 4), 1, None),
        (cyclic(2, 4), 2, r"in turn \(0 on n1, 1 on n2, 2 on n1\), .* groups of 2; .* --distribution=block"),
        ([place("n1", 0, "0"), place("n1", 1, "0")], 1, r"^n1: 2 ranks have 1 GPU, as several are shown GPU-n1-0"),
        ([place("n1"), *on_cpu([place("n2")])], 1, r"^n2: not every rank sees a GPU, others do"),
        (on_cpu(block(2, 2)), 2, None),
    ],
)
def test_what_cannot_work(places: list[Place], tensor: int, pattern: str | None) -> None:
    problems = [*place_problems(places, tensor=tensor)]
    assert len(problems) == (pattern is not None)
    assert pattern is None or re.search(pattern, problems[0])


def warnings(places: list[Place], tensor: int = 1) -> list[str]:
    on_gpu = any(place.uuids for place in places)
    return [*place_warnings(places, seat_engines(places, count=None, size=1, on_gpu=on_gpu), tensor=tensor)]


def test_what_works_but_not_as_it_could() -> None:
    assert warnings(block(2, 8), 8) == []
    assert warnings(block(2, 1)) == ["n1, n2: 8 GPUs and 1 rank: 7 GPUs stay idle; --ntasks-per-node=8"]
    allotted = [dataclasses.replace(place, allotted_gpus=8) for place in one_each(1, 4)]
    assert warnings(allotted) == ["n1: 8 GPUs and 4 ranks: 4 GPUs stay idle; --ntasks-per-node=8"]
    assert warnings(block(1, 7)) == ["n1: 8 GPUs and 7 ranks: 1 GPU stays idle; --ntasks-per-node=8"]
    assert warnings(on_cpu(allotted))[0] == "n1: SLURM has given 8 GPUs, and torch sees none: the run is on CPU"
    across = "1 tensor-parallel groups of 4 lie across hosts, where they talk over the network"
    assert warnings(block(2, 2, "0,1"), 4) == [across]
    assert warnings(on_cpu(block(2, 2)), 4) == []
    narrow = [dataclasses.replace(place, cores=(place.local_rank,)) for place in block(1, 8)]
    (said,) = warnings(narrow)
    assert said.startswith("rank 0 on n1 shares 1 of 64 cores with its engine, and so do 7 others; export SRUN_CPUS")


def test_hosts_come_in_the_order_of_their_ranks() -> None:
    assert ranks_by_host(cyclic(3, 2)) == {"n1": [0, 3], "n2": [1, 4], "n3": [2, 5]}
