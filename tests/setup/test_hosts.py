"""Reports of hosts against each other, and the table; reports by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_vppo.setup.hosts import (
    GIB,
    MISSING,
    HostReport,
    as_record,
    host_problems,
    host_table,
    host_warnings,
    look_of,
    own_versions,
)
from tests.setup.test_places import block, cyclic

VERSIONS = {"torch": "2.13.0", "sources": "abc"}
FIRST = HostReport(
    gpu="NVIDIA H100", free_bytes=79 * GIB, total_bytes=80 * GIB, versions=VERSIONS, driver="570.86.15", shared=None,
    free_disk=10**12, files={"model.path=/m": "3 files, 9 bytes, aa"}, address="10.0.0.1", interface="ib0",
)  # fmt: skip
LATER = dataclasses.replace(FIRST, versions={}, driver=None, files={}, free_disk=0)
REPORTS = [FIRST, LATER, FIRST, LATER]
PLACES = block(2, 2)


def with_third(**changes: object) -> list[HostReport]:
    """The reports of two hosts, with changes to that of n2's first rank."""
    return [FIRST, LATER, dataclasses.replace(FIRST, **changes), LATER]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reports", "problems"),
    [
        (REPORTS, []),
        (
            with_third(versions={**VERSIONS, "torch": "2.12.1"}),
            ["n2: another version of torch than on n1: 2.12.1, there 2.13.0"],
        ),
        (with_third(versions={"torch": "2.13.0"}), ["n2: another version of sources than on n1: none, there abc"]),
        (with_third(shared="cannot write into /r"), ["n2: cannot write into /r"]),
        (
            with_third(files={"model.path=/m": "3 files, 9 bytes, bb"}),
            ["n2: something else at model.path=/m than on n1: 3 files, 9 bytes, bb, there 3 files, 9 bytes, aa"],
        ),
        (with_third(files={"model.path=/m": MISSING}), ["n2: model.path=/m is not there, other hosts have it"]),
        ([dataclasses.replace(r, files={"model.path=o/n": MISSING} if r.files else {}) for r in REPORTS], []),
        (
            with_third(interface="lo", address="127.0.1.1"),
            ["n2: would be reached by the others at 127.0.1.1, which is every host itself"],
        ),
    ],
)
def test_problems(reports: list[HostReport], problems: list[str]) -> None:
    assert [*host_problems(PLACES, reports)] == problems


def test_a_problem_of_many_hosts_is_one_line() -> None:
    places, reports = block(12, 1), [FIRST, *[dataclasses.replace(FIRST, shared="sees nothing")] * 11]
    assert [*host_problems(places, reports)] == ["n2, n3, n4, n5, n6, n7, n8, n9 and 3 more: sees nothing"]


def test_one_host_has_no_others() -> None:
    alone = [dataclasses.replace(FIRST, interface="lo", address="127.0.0.1"), LATER]
    assert [*host_problems(block(1, 2), alone)] == []


def test_warnings() -> None:
    assert [*host_warnings(PLACES, REPORTS)] == []
    busy = [FIRST, dataclasses.replace(LATER, free_bytes=40 * GIB), FIRST, LATER]
    assert [*host_warnings(PLACES, busy)] == [
        "n1: GPU memory in use before the run begins: 40.0 of 80.0 GiB on GPU 1; see `nvidia-smi`"
    ]
    assert [*host_warnings(PLACES, with_third(driver="550.1"))] == [
        "n2: another driver than on n1: 550.1, there 570.86.15"
    ]
    other = [FIRST, LATER, FIRST, dataclasses.replace(LATER, gpu="NVIDIA A100")]
    assert [*host_warnings(PLACES, other)] == ["n2: another GPU than on n1: NVIDIA A100, there NVIDIA H100"]


def test_the_table_of_hosts_and_of_ranks() -> None:
    reports = [FIRST, dataclasses.replace(LATER, free_bytes=60 * GIB), FIRST, LATER]
    assert host_table(PLACES, reports, every_rank=False) == [
        "ranks  host  address         GPUs             free      cores",
        "0-1    n1    10.0.0.1 (ib0)  2 x NVIDIA H100  60.0 GiB  64 of 64",
        "2-3    n2    10.0.0.1 (ib0)  2 x NVIDIA H100  79.0 GiB  64 of 64",
    ]
    rows = host_table(PLACES, reports, every_rank=True)
    assert " ".join(rows[2].split()) == "1 n1 10.0.0.1 (ib0) 1 NVIDIA H100 GPU-n1-1 60.0 GiB 64 of 64"
    cpu = [dataclasses.replace(p, gpu_ids=(), uuids=()) for p in cyclic(2, 2)]
    no_gpu = [dataclasses.replace(r, gpu=None, free_bytes=0, total_bytes=0, address=None) for r in REPORTS]
    assert host_table(cpu, no_gpu, every_rank=False)[1:] == [
        "0,2    n1    -        none  -     64 of 64",
        "1,3    n2    -        none  -     64 of 64",
    ]


def test_a_look_at_files(tmp_path: Path) -> None:
    assert look_of(tmp_path / "no") == MISSING
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_bytes(b"1" * 100_000)
    (folder / "b").write_text("x")
    look = look_of(folder)
    assert look.startswith("2 files, 100001 bytes, ") and look_of(folder) == look
    seen = {look, look_of(folder / "a"), look_of(folder / "b")}
    (folder / "b").write_text("y")
    seen.add(look_of(folder))
    (folder / "b").rename(folder / "c")
    seen.add(look_of(folder))
    (folder / "a").write_bytes(b"1" * 100_001)
    seen.add(look_of(folder))
    assert len(seen) == 6


def test_own_versions() -> None:
    versions = own_versions()
    assert versions["torch"] == torch.__version__ and len(versions["sources"]) == 12
    assert "transformers" in versions and "megatron-core" in versions


def test_a_report_comes_back_from_json() -> None:
    assert as_record(dataclasses.asdict(FIRST)) == FIRST
