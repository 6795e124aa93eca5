"""Two ranks that meet by torch's environment, as under torchrun: what they agree on, and how they end when refused."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.setup.world import World, engine_seats, open_world, show_world, world_of_one
from megatron_vppo.system.rendezvous import Refused

pytestmark = pytest.mark.distributed


def config_of(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    trainer = {"runs_dir": str(folder), "project_name": "p", "experiment_name": "e"}
    data = {"train_files": str(folder / "rows.jsonl")}
    return RunConfig.model_validate({"data": data, "model": {"path": str(folder)}, "trainer": trainer, **sections})


def _open(results: Any, rank: int, port: int, config: RunConfig, refused_by: str | None) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    checked = []

    def check(local_ranks: int) -> None:
        checked.append(local_ranks)
        if refused_by is not None:
            raise ValueError(refused_by)

    try:
        world = open_world(config, None, check_settings=check)
        found: Any = (world.rank, world.num_hosts, len(world.places), checked, world.device, bool(world.rank_lines))
        world.meeting.gather("end", None)
    except Refused as refusal:
        found = (rank, None if refusal.error is None else str(refusal.error), refusal.status)
        refusal.leave(9)
    results.put(found)


def open_both(config: RunConfig, refused_by: str | None = None) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_open, args=(results, r, port, config, refused_by)) for r in range(2)]
    for process in ranks:
        process.start()
    found = sorted(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(60)
    return found


def test_one_rank_checks_for_all(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    first, second = open_both(config_of(tmp_path))
    assert first == (0, 1, 2, [2], None, True), "told that its host has two ranks"
    assert second == (1, 1, 2, [], None, False)
    assert list((tmp_path / "p" / "e").iterdir()) == []


def test_a_refusal_reaches_all_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    assert open_both(config_of(tmp_path), "no such model") == [(0, "no such model", None), (1, None, 9)]
    sizes = config_of(tmp_path, parallel={"tensor_model_parallel_size": 4})
    first, second = open_both(sizes)
    assert "4 ranks per model copy does not divide 2 ranks" in first[1] and second == (1, None, 9)
    engines = config_of(tmp_path, rollout={"num_engines": 3})
    first, second = open_both(engines)
    assert "rollout.num_engines=3" in first[1] and "there is room for 2" in first[1] and second == (1, None, 9)
    assert list((tmp_path / "p" / "e").iterdir()) == []


def test_a_process_alone(tmp_path: Path) -> None:
    world = world_of_one()
    assert (world.rank, world.num_hosts, len(world.places)) == (0, 1, 1)
    assert [seat.leader for seat in engine_seats(config_of(tmp_path), world.places)] == [0]


def test_one_host_shows_warnings_alone_and_writes_all(tmp_path: Path) -> None:
    said: list[str] = []
    one = world_of_one()
    world = World(one.places, 0, one.meeting, lines=("a line",), rank_lines=("a row",), warnings=("something",))
    show_world(world, None, logs=tmp_path / "logs", say=said.append)
    assert said == ["note: something"]
    assert (tmp_path / "logs" / "hosts.txt").read_text() == "a line\na row\nnote: something\n"
    show_world(World(one.places, 0, one.meeting, lines=("a line",)), None, logs=tmp_path / "logs", say=said.append)
    assert len(said) == 1
