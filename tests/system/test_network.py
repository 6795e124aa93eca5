"""Addresses and interfaces of this machine; what several hosts see of each other: tests/slurm."""

from __future__ import annotations

import socket

import psutil
import pytest

from megatron_vppo.system.network import interface_of, is_loopback, is_own, own_address_towards, resolve

NOBODY = "192.0.2.1"
"""An address of documentation (RFC 5737), which no host has."""


def test_names_and_addresses_are_resolved() -> None:
    assert resolve("127.0.0.1") == "127.0.0.1"
    assert is_loopback(resolve("localhost"))
    for name in ("no-such-host.invalid", "", "a" * 300):
        if name:
            with pytest.raises(ValueError, match=f"is not known on {socket.gethostname()}"):
                resolve(name)


@pytest.mark.parametrize(
    ("address", "loopback"), [("127.0.1.1", True), ("::1", True), ("10.0.0.1", False), ("fe80::1%eth0", False)]
)
def test_loopback(address: str, loopback: bool) -> None:
    assert is_loopback(address) == loopback


def test_own_addresses() -> None:
    assert is_own("127.0.1.1") and not is_own(NOBODY)


def test_the_interface_that_leads_to_another_host() -> None:
    assert own_address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of(NOBODY) is None
    for name, addresses in psutil.net_if_addrs().items():
        first = next((entry.address for entry in addresses if entry.family == socket.AF_INET), None)
        if first is not None:
            assert interface_of(first) == name
        for entry in addresses:
            if entry.family == socket.AF_INET6:
                assert interface_of(entry.address) == name
