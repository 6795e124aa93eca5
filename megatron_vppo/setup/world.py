"""All ranks of a run on all hosts: they meet, agree on the network, and check everything that can be wrong, together.

It takes seconds, and comes before process groups, engines and models. What is wrong is told once, by rank 0, and every
rank ends with the same status.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_vppo.config.checks import check_layout
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.parallel.all_reduce_speed import AllReduceSpeed
from megatron_vppo.setup.hosts import (
    HostReport,
    as_record,
    described_versions,
    host_problems,
    host_table,
    host_warnings,
)
from megatron_vppo.setup.own_host import own_place, own_report
from megatron_vppo.setup.places import (
    EngineSeat,
    Place,
    device_number,
    place_problems,
    place_warnings,
    ranks_by_host,
    seat_engines,
)
from megatron_vppo.setup.run_folder import RunFolder
from megatron_vppo.setup.shared_folder import begin_check, end_check, give_up_check
from megatron_vppo.system.rendezvous import (
    Meeting,
    Refused,
    candidate_ports,
    meet_alone,
    meet_by_environment,
    meet_by_word,
)
from megatron_vppo.system.slurm import SlurmTask

MEETING_SECONDS = 600.0
"""The time that a rank waits for another one before there are process groups: tasks may start minutes apart, and rank 0
reads settings, model and data from a file system that may be slow."""
DEFAULT_PORT = 29500
"""torch's own."""


@dataclass(frozen=True)
class World:
    """The ranks of a run and their places."""

    places: tuple[Place, ...]
    """By rank."""
    rank: int
    meeting: Meeting
    """Kept, because rank 0's store serves the process groups as well."""
    lines: tuple[str, ...] = ()
    """The text to show of the hosts, and of every rank; on rank 0."""
    rank_lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """The unusual; on rank 0."""

    @property
    def place(self) -> Place:
        return self.places[self.rank]

    @property
    def device(self) -> int | None:
        """The number of this rank's GPU among those that it sees; None on a machine without CUDA."""
        return device_number(self.place)

    @property
    def num_hosts(self) -> int:
        return len(ranks_by_host(self.places))

    @property
    def on_gpu(self) -> bool:
        return bool(self.place.uuids)


def world_of_one() -> World:
    """Returns the world of a process that is the only rank."""
    return World((own_place(),), 0, meet_alone())


def engine_seats(config: RunConfig, places: Sequence[Place]) -> tuple[EngineSeat, ...]:
    """Returns the ranks of every engine. Raises ValueError if there is no room for as many as are set."""
    rollout = config.rollout
    return seat_engines(
        places, count=rollout.num_engines, size=rollout.tensor_parallel_size, on_gpu=bool(places[0].uuids)
    )


def open_world(config: RunConfig, task: SlurmTask | None, *, check_settings: Callable[[int], None] | None) -> World:
    """Lets this rank meet all others, and checks the run with them.

    Args:
        task: what SLURM has said about this rank; None if another launcher has started it.
        check_settings: the checks that one rank makes for all, given the number of ranks on its host. None: whoever
            started the ranks has made them.

    Raises:
        Refused: on every rank, if something is wrong.
        ValueError: this rank does not find the others.
    """
    meeting = _meet(task)
    folder = RunFolder.of(config.trainer).root
    try:
        return _check_together(config, meeting, folder, check_settings)
    except Refused:
        if meeting.rank == 0:
            give_up_check(folder)
        raise


def _check_together(
    config: RunConfig, meeting: Meeting, folder: Path, check_settings: Callable[[int], None] | None
) -> World:
    words: list[str] = []
    meeting.check("layout", partial(_check_start, config, meeting.size, folder, words))
    gathered = meeting.gather("places", {"place": dataclasses.asdict(own_place()), "word": "".join(words)})
    places = tuple(_as_place(values["place"]) for values in gathered)
    meeting.check("places", partial(_check_places, config, places))
    if check_settings is not None:
        meeting.check("settings", partial(check_settings, len(ranks_by_host(places)[places[0].host])))
    world = World(places, meeting.rank, meeting)
    report = own_report(config, places, meeting.rank, folder, gathered[0]["word"])
    reports = [as_record(values) for values in meeting.gather("hosts", dataclasses.asdict(report))]
    meeting.check("hosts", partial(_check_hosts, places, reports, folder, gathered[0]["word"]))
    if world.rank != 0:
        return world
    warnings = [*place_warnings(places, engine_seats(config, places), tensor=_tensor(config))]
    warnings += host_warnings(places, reports)
    return dataclasses.replace(
        world,
        lines=tuple(_lines(world, reports)),
        rank_lines=tuple(host_table(places, reports, every_rank=True)),
        warnings=tuple(warnings),
    )


def _as_place(values: dict[str, object]) -> Place:
    return Place(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})  # type: ignore[arg-type]


def _meet(task: SlurmTask | None) -> Meeting:
    if task is None:
        return meet_by_environment(timeout_seconds=MEETING_SECONDS) if "RANK" in os.environ else meet_alone()
    address, port = os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT")
    if port is not None:
        ports: tuple[int, ...] = (int(port),)
    else:
        ports = (DEFAULT_PORT,) if task.name is None else candidate_ports(task.name)
    meeting = meet_by_word(
        address, ports, task.name or "alone", rank=task.rank, size=task.size, timeout_seconds=MEETING_SECONDS
    )
    os.environ["MASTER_PORT"] = str(meeting.port)  # for the process groups, which use the same store
    return meeting


# --- Checks of rank 0 -------------------------------------------------------------------------------------------------


def _check_start(config: RunConfig, size: int, folder: Path, words: list[str]) -> None:
    """Checks the number of ranks, and makes the run folder."""
    check_layout(config, size)
    words.append(begin_check(folder))


def _check_places(config: RunConfig, places: Sequence[Place]) -> None:
    _refuse([*place_problems(places, tensor=_tensor(config))])
    engine_seats(config, places)


def _check_hosts(places: Sequence[Place], reports: Sequence[HostReport], folder: Path, word: str) -> None:
    firsts = {host: ranks[0] for host, ranks in ranks_by_host(places).items()}
    answered = {host: rank for host, rank in firsts.items() if rank != 0 and reports[rank].shared is None}
    unseen = end_check(folder, word, answered)
    problems = [*host_problems(places, reports)]
    there = places[0].host
    problems += [f"{host}: what it writes into {folder.absolute()} does not appear on {there}" for host in unseen]
    if unseen or any(reports[rank].shared for rank in firsts.values()):
        problems.append("trainer.runs_dir has to lie on a file system that all hosts share, and may write to")
    _refuse(problems)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        heading = ["the hosts cannot run this together:"] if len(problems) > 1 else []
        raise ValueError("\n  - ".join([*heading, *problems]))


def _tensor(config: RunConfig) -> int:
    return config.parallel.tensor_model_parallel_size


# --- What is shown ----------------------------------------------------------------------------------------------------


def _lines(world: World, reports: Sequence[HostReport]) -> list[str]:
    """Formats what all hosts have in common, and the table."""
    network = "" if world.num_hosts == 1 else f"; gloo and NCCL use {_interfaces(reports)}"
    return [
        f"{world.num_hosts} hosts, {len(world.places)} ranks; store at {_store()}{network}",
        *(f"  {line}" for line in host_table(world.places, reports, every_rank=False)),
        f"all hosts: {described_versions(reports[0])}; {reports[0].free_disk / 1e9:.0f} GB free for the run folder",
    ]


def _store() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _interfaces(reports: Sequence[HostReport]) -> str:
    return ", ".join(sorted({str(report.interface) for report in reports}))


def show_world(world: World, speed: AllReduceSpeed | None, *, logs: Path, say: Callable[[str], None]) -> None:
    """Shows the hosts where there are several, and what is unusual in any case; writes all of it to logs/hosts.txt."""
    lines = [*world.lines, *([] if speed is None else [speed.text()])]
    warnings = [f"note: {text}" for text in world.warnings]
    shown = [*lines, *warnings] if world.num_hosts > 1 else warnings
    if shown:
        say("\n".join(shown))
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "hosts.txt").write_text("\n".join([*lines, *world.rank_lines, *warnings]) + "\n", encoding="utf-8")
