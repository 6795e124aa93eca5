"""The report of a rank on its host, and the interface for gloo and NCCL; hosts by name are those of tests/slurm."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path

import pytest

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.setup.hosts import MISSING
from megatron_vppo.setup.own_host import own_place, own_report
from megatron_vppo.setup.shared_folder import begin_check
from megatron_vppo.system.network import interface_of, own_address_towards

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*INTERFACES, "MASTER_ADDR", "SLURMD_NODENAME", "SLURM_GPUS_ON_NODE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def config_of(folder: Path) -> RunConfig:
    data = {"train_files": f"{folder}/rows.jsonl@train", "val_files": "owner/name", "image_dir": str(folder / "no")}
    return RunConfig.model_validate({"data": data, "model": {"path": str(folder)}})


def test_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    place = own_place()
    assert (place.host, place.local_rank, place.allotted_gpus) == (socket.gethostname(), 0, 0)
    assert set(place.cores) == os.sched_getaffinity(0)
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    place = own_place()
    assert (place.host, place.local_rank, place.allotted_gpus) == ("n7", 3, 8)


def test_the_first_rank_of_a_host_looks_at_files(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    word = begin_check(tmp_path / "run")
    places = [dataclasses.replace(own_place(), host=host) for host in ("127.0.0.1", "127.0.0.2", "127.0.0.2")]
    first, second, third = (own_report(config_of(tmp_path), places, r, tmp_path / "run", word) for r in range(3))
    assert first.shared is second.shared is third.shared is None
    assert first.files == second.files and first.versions == second.versions
    assert third.files == third.versions == {}
    answers = sorted(path.name for path in (tmp_path / "run").rglob("rank_*"))
    assert answers == ["rank_0", "rank_1"], "rank 0's word, and the answer of the first rank of the other host"
    looks = dict(first.files)
    assert looks.pop(f"data.train_files={tmp_path}/rows.jsonl@train").startswith("1 files, 2 bytes, ")
    assert looks.pop(f"model.path={tmp_path}").startswith("1 files, 2 bytes, ")
    assert looks == {"data.val_files=owner/name": MISSING, f"data.image_dir={tmp_path}/no": MISSING}


def interfaces() -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in INTERFACES)


def look(tmp_path: Path, *hosts: str) -> tuple[str | None, str | None]:
    word = begin_check(tmp_path / "run")
    places = [dataclasses.replace(own_place(), host=host) for host in hosts]
    report = own_report(config_of(tmp_path), places, 0, tmp_path / "run", word)
    return report.address, report.interface


def test_on_one_host_no_interface_is_chosen(tmp_path: Path) -> None:
    assert look(tmp_path, "a", "a") == (None, None)
    assert interfaces() == (None, None)


def test_a_name_that_means_this_host_is_reported_and_not_used(tmp_path: Path) -> None:
    assert look(tmp_path, "a", "localhost") == ("127.0.0.1", "lo")
    assert interfaces() == (None, None)


def test_the_interface_towards_another_host_is_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = "192.0.2.1"
    address = own_address_towards(there)
    if address is None:
        pytest.skip("this machine has no route to others")
    name = interface_of(address)
    assert look(tmp_path, "a", "not-known.invalid", there) == (address, name)
    assert interfaces() == (name, f"={name}")
    for set_by_user, both in (
        ({"GLOO_SOCKET_IFNAME": "lo"}, ("lo", "=lo")),
        ({"NCCL_SOCKET_IFNAME": "=lo"}, ("lo", "=lo")),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, (name, "^docker")),
    ):
        for variable in INTERFACES:
            monkeypatch.delenv(variable, raising=False)
        for variable, value in set_by_user.items():
            monkeypatch.setenv(variable, value)
        assert look(tmp_path, "a", there)[1] == both[0]
        assert interfaces() == both


def test_a_run_folder_that_is_not_shared_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vppo.setup.shared_folder._PATIENCE_SECONDS", 0.2)
    places = [dataclasses.replace(own_place(), host=host) for host in ("127.0.0.1", "127.0.0.2")]
    begin_check(tmp_path / "one")
    (tmp_path / "other").mkdir()
    report = own_report(config_of(tmp_path), places, 1, tmp_path / "other", "a word")
    assert report.shared is not None and report.shared.startswith("does not see what rank 0's host writes into")
