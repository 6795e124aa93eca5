"""The hosts, GPUs and cores of all ranks: a rank's GPU, the ranks whose GPUs an engine takes, what is wrong with them.

Functions of records, which every rank has of every other. A rank sees what its launcher shows it: all GPUs of the host,
some of them, or one alone.

    ranks of a host         0    1    2    3    4    5    6    7
    engines of 2 GPUs       0    0    1    1    2    2    3    3      led by ranks 0, 2, 4, 6
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """One rank's place on its host, as this rank sees it."""

    host: str
    local_rank: int
    gpu_ids: tuple[str, ...]
    """The GPUs that it sees, as CUDA_VISIBLE_DEVICES would name them."""
    uuids: tuple[str, ...]
    """The same GPUs by the names that all ranks use. Empty on a machine without CUDA."""
    cores: tuple[int, ...]
    """The numbers of the cores that it may run on."""
    host_cores: int
    """The number of cores of its host."""
    allotted_gpus: int
    """The GPUs that SLURM has given the job on this host; 0 if it says nothing."""


@dataclass(frozen=True)
class EngineSeat:
    """The ranks whose GPUs an engine takes, all of one host. The first one leads it."""

    ranks: tuple[int, ...]

    @property
    def leader(self) -> int:
        return self.ranks[0]


def ranks_by_host(places: Sequence[Place]) -> dict[str, list[int]]:
    """Returns the ranks of each host, hosts in the order of their first ranks."""
    found: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        found.setdefault(place.host, []).append(rank)
    return found


def device_number(place: Place) -> int | None:
    """Returns the number of the rank's GPU among those that it sees; None on a machine without CUDA.

    Raises:
        ValueError: it sees several, but not as many as its host has ranks.
    """
    if not place.uuids:
        return None
    if len(place.uuids) == 1:
        return 0
    if place.local_rank >= len(place.uuids):
        raise ValueError(
            f"{place.host}: the rank with local number {place.local_rank} sees {len(place.uuids)} GPUs "
            f"({', '.join(place.gpu_ids)}); start at most {len(place.uuids)} ranks per host, or show each rank more"
        )
    return place.local_rank


def seat_engines(places: Sequence[Place], *, count: int | None, size: int, on_gpu: bool) -> tuple[EngineSeat, ...]:
    """Spreads the engines evenly over the hosts.

    Args:
        count: the number of engines. None: as many as there are GPUs for, on a machine without GPUs one.
        size: GPUs of an engine. Engines on CPU have no rank's GPU, and each is led by a rank of its own.

    Raises:
        ValueError: there is room for fewer.
    """
    width = size if on_gpu else 1
    hosts = ranks_by_host(places)
    seats = [
        EngineSeat(tuple(ranks[start : start + width]))
        for ranks in hosts.values()
        for start in range(0, len(ranks) - width + 1, width)
    ]
    wanted = count if count is not None else max(1, len(seats)) if on_gpu else 1
    if wanted > len(seats):
        ranks = ", ".join(f"{host} {len(here)}" for host, here in _shown(list(hosts.items())))
        raise ValueError(
            f"rollout.num_engines={wanted} with rollout.tensor_parallel_size={size}: there is room for {len(seats)}, "
            f"as an engine takes ranks of one host (ranks: {ranks}); lower one of them"
        )
    return tuple(seats[number * len(seats) // wanted] for number in range(wanted))


def engine_devices(places: Sequence[Place], seat: EngineSeat) -> str:
    """Returns CUDA_VISIBLE_DEVICES of an engine.

    Raises:
        ValueError: its leader is not shown the GPUs of the other ranks.
    """
    ids = [places[rank].gpu_ids[device_number(places[rank]) or 0] for rank in seat.ranks]
    if len(set(ids)) < len(ids):
        # Each rank calls its own GPU by the same number, because the others do not exist for it (device cgroups).
        raise ValueError(
            f"rollout.tensor_parallel_size={len(ids)}: the engine of rank {seat.leader} on {places[seat.leader].host} "
            f"needs the GPUs of ranks {seat.ranks[0]} to {seat.ranks[-1]}, but each of them is shown its own alone, as "
            f"{ids[0]}; use --gpus-per-node and --gpu-bind=none in place of --gpus-per-task or --gpu-bind, or set "
            "rollout.tensor_parallel_size=1"
        )
    return ",".join(ids)


def engine_threads(places: Sequence[Place], seats: Sequence[EngineSeat], number: int, *, size: int) -> int:
    """Returns the CPU threads of a worker of engine `number`, which has `size` workers.

    It is a fair share of the cores that its leader may use, among the engines that may use them as well.
    """
    mine = places[seats[number].leader]
    leaders = [places[seat.leader] for seat in seats]
    sharing = sum(place.host == mine.host and bool({*place.cores} & {*mine.cores}) for place in leaders)
    return max(1, len(mine.cores) // (sharing * size))


# --- What is wrong ----------------------------------------------------------------------------------------------------


def place_problems(places: Sequence[Place], *, tensor: int) -> Iterator[str]:
    """Says why ranks cannot run where they are.

    Args:
        tensor: ranks of a tensor-parallel group; these follow each other.
    """
    hosts = ranks_by_host(places)
    without = [host for host, ranks in hosts.items() if not all(places[rank].uuids for rank in ranks)]
    if without and any(place.uuids for place in places):
        yield f"{_names(without)}: not every rank sees a GPU, others do; is the driver running there?"
        return
    for host, ranks in hosts.items():
        try:
            numbers = [device_number(places[rank]) for rank in ranks]
        except ValueError as error:
            yield str(error)
            continue
        used = Counter(places[r].uuids[n] for r, n in zip(ranks, numbers, strict=True) if n is not None)
        if twice := [uuid for uuid, times in used.items() if times > 1]:
            gpus = "1 GPU" if len(used) == 1 else f"{len(used)} GPUs"
            yield (
                f"{host}: {len(ranks)} ranks have {gpus}, as several are shown {twice[0]} alone; set "
                "CUDA_VISIBLE_DEVICES for no rank, or for each rank another one"
            )
    if _is_scattered(places) and any(len({p.host for p in group}) > 1 for group in _groups(places, tensor)):
        yield (
            f"ranks are dealt out over the hosts in turn ({', '.join(f'{r} on {places[r].host}' for r in range(3))}), "
            f"which splits the tensor-parallel groups of {tensor}; start them with srun --distribution=block"
        )


def place_warnings(places: Sequence[Place], seats: Sequence[EngineSeat], *, tensor: int) -> Iterator[str]:
    """Says what runs, but not as it could."""
    on_gpu = any(place.uuids for place in places)
    hosts = ranks_by_host(places)
    idle: dict[str, list[str]] = {}
    for host, ranks in hosts.items():
        seen = {uuid for rank in ranks for uuid in places[rank].uuids}
        gpus = max(len(seen), *(places[rank].allotted_gpus for rank in ranks))
        if not on_gpu and gpus:
            idle.setdefault(f"SLURM has given {gpus} GPUs, and torch sees none: the run is on CPU", []).append(host)
        elif gpus > len(ranks):
            here = "1 rank" if len(ranks) == 1 else f"{len(ranks)} ranks"
            left = "1 GPU stays" if gpus == len(ranks) + 1 else f"{gpus - len(ranks)} GPUs stay"
            idle.setdefault(f"{gpus} GPUs and {here}: {left} idle; --ntasks-per-node={gpus}", []).append(host)
    yield from (f"{_names(names)}: {text}" for text, names in idle.items())
    split = sum(len({place.host for place in group}) > 1 for group in _groups(places, tensor))
    if on_gpu and split:
        yield f"{split} tensor-parallel groups of {tensor} lie across hosts, where they talk over the network"
    starved = [seat.leader for seat in seats if len(places[seat.leader].cores) == 1 < places[seat.leader].host_cores]
    if starved:
        place = places[starved[0]]
        yield (
            f"rank {starved[0]} on {place.host} shares 1 of {place.host_cores} cores with its engine"
            + (f", and so do {len(starved) - 1} others" if len(starved) > 1 else "")
            + "; export SRUN_CPUS_PER_TASK in the batch script (srun does not take over --cpus-per-task)"
        )


def _is_scattered(places: Sequence[Place]) -> bool:
    """Returns True if the ranks of some host do not follow each other."""
    return any(ranks[-1] - ranks[0] >= len(ranks) for ranks in ranks_by_host(places).values())


def _groups(places: Sequence[Place], size: int) -> list[Sequence[Place]]:
    return [places[start : start + size] for start in range(0, len(places), size)]


def _names(hosts: Sequence[str]) -> str:
    return ", ".join(_shown(hosts))


def _shown(items: Sequence[Any]) -> list[Any]:
    """Returns the first items, enough for a message."""
    return list(items[:8])
