"""The host of this rank: what it has, what it sees, and the network interface towards the others."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_vppo.config.data_files import settings_of_files
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.setup.hosts import MISSING, HostReport, free_disk, look_of, own_driver, own_versions
from megatron_vppo.setup.places import Place, device_number, ranks_by_host
from megatron_vppo.setup.shared_folder import answer_check
from megatron_vppo.system.network import interface_of, own_address_towards, resolve


def own_place() -> Place:
    """Describes the place of this process."""
    cores = sorted(os.sched_getaffinity(0))
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = [name.strip() for name in visible.split(",")] if visible else [str(number) for number in range(count)]
    allotted = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    return Place(
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        gpu_ids=tuple(ids[:count]),
        uuids=tuple(f"GPU-{torch.cuda.get_device_properties(number).uuid}" for number in range(count)),
        cores=tuple(cores),
        host_cores=os.cpu_count() or len(cores),
        allotted_gpus=int(allotted) if allotted.isdecimal() else 0,
    )


def _choose_network(places: Sequence[Place], rank: int) -> tuple[str | None, str | None]:
    """Returns the address and the interface towards the other hosts, and makes gloo and NCCL use this one.

    It is the interface that the kernel takes to another host. Names are not asked: Debian's installer lets a host's own
    name mean 127.0.1.1, and gloo would tell the other ranks that.
    """
    others = [host for host in ranks_by_host(places) if host != places[rank].host]
    if not others:
        return None, None
    addresses = (_own_address_towards(host, is_first=host == places[0].host) for host in others)
    address = next((found for found in addresses if found is not None), None)
    interface = None if address is None else interface_of(address)
    gloo, nccl = os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")
    if interface is not None and interface != "lo":
        named = {name for _, name in socket.if_nameindex()}
        theirs = (nccl or "").removeprefix("=")
        os.environ["GLOO_SOCKET_IFNAME"] = gloo or (theirs if theirs in named else interface)
        # "=": this name, and not all that begin with it.
        os.environ["NCCL_SOCKET_IFNAME"] = nccl or f"={os.environ['GLOO_SOCKET_IFNAME']}"
        interface = os.environ["GLOO_SOCKET_IFNAME"]
    return address, interface


def _own_address_towards(host: str, *, is_first: bool) -> str | None:
    """Returns this host's address as `host` sees it; None if the name leads nowhere from here."""
    try:
        return own_address_towards(resolve(os.environ.get("MASTER_ADDR", host) if is_first else host))
    except ValueError:
        return None


def own_report(config: RunConfig, places: Sequence[Place], rank: int, folder: Path, word: str) -> HostReport:
    """Looks at this rank's host, takes its GPU, and chooses the network interface.

    Args:
        word: what rank 0 has written into the run folder, see `shared_folder`.
    """
    place = places[rank]
    device, is_first = device_number(place), ranks_by_host(places)[place.host][0] == rank
    address, interface = _choose_network(places, rank)
    free = total = 0
    if device is not None:
        torch.cuda.set_device(device)
        free, total = torch.cuda.mem_get_info()
    shared = answer_check(folder, word, rank=rank) if is_first and rank != 0 else None
    return HostReport(
        gpu=None if device is None else torch.cuda.get_device_name(device),
        free_bytes=free,
        total_bytes=total,
        versions=own_versions() if is_first else {},
        driver=own_driver() if is_first else None,
        shared=shared,
        free_disk=free_disk(folder) if is_first and shared is None else 0,
        files=_looks(config) if is_first else {},
        address=address,
        interface=interface,
    )


def _looks(config: RunConfig) -> dict[str, str]:
    """Describes the local files that every host has to have; what is on the hub is left out."""
    from megatron_vppo.data.sources import parse_source  # it imports `datasets`, for which no refusal has to wait

    looks: dict[str, str] = {}
    for setting, file in settings_of_files(config.data).items():
        looks[f"{setting}={file.path}"] = look_of(Path(parse_source(file.path).location))
        if file.image_dir is not None:
            place = "data.image_dir" if file.image_dir == config.data.image_dir else f"{setting}.image_dir"
            looks[f"{place}={file.image_dir}"] = "there" if Path(file.image_dir).is_dir() else MISSING
    looks[f"model.path={config.model.path}"] = look_of(Path(config.model.path))
    return looks
