"""The addresses and network interfaces of this host, as the kernel routes to others. No packet is sent."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915
_ANY_PORT = 9
"""A port to name in a route; nothing is sent to it."""


def resolve(host: str) -> str:
    """Returns an address of a host, by its name or an address. Raises ValueError if the name is not known here."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"the name {host!r} is not known on {socket.gethostname()} ({error})") from error
    by_version = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    return str(by_version[0][4][0])


def is_loopback(address: str) -> bool:
    """Returns True for an address that means this host wherever it is used."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def is_own(address: str) -> bool:
    """Returns True if a process of this host can listen at the address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        try:
            trial.bind((address, 0))
        except OSError:
            return False
    return True


def own_address_towards(address: str) -> str | None:
    """Returns the address that another host sees when this one connects to `address`; None if there is no route."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as route:
        try:
            route.connect((address, _ANY_PORT))
        except OSError:
            return None
        return str(route.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Returns the network interface that has the address; None if none has."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    for _, name in socket.if_nameindex():
        if wanted in _addresses(name, wanted.version):
            return name
    return None


def _addresses(interface: str, version: int) -> set[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    if version == 6:
        lines = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        return {ipaddress.IPv6Address(int(line[0], 16)) for line in lines if line[5] == interface}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", interface.encode()))
        except OSError:  # an interface without an address
            return set()
    return {ipaddress.IPv4Address(answer[20:24])}
