"""Which addresses this machine has, asked of the operating system."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Collection

import ifaddr

from petalite.lan.addresses import LocalAddress, addresses_named, lan_addresses

LOOPBACK = "127.0.0.1"


def all_addresses() -> list[LocalAddress]:
    """Every address of every interface, in the system's order."""
    found: list[LocalAddress] = []
    for adapter in ifaddr.get_adapters():
        for each in adapter.ips:
            text = each.ip if isinstance(each.ip, str) else each.ip[0]
            name = str(adapter.nice_name if isinstance(adapter.nice_name, str) else adapter.name)
            found.append(LocalAddress(name, adapter.index or 0, ipaddress.ip_address(text), each.network_prefix))
    return found


def usable_addresses(wanted: Collection[str] | None = None) -> list[LocalAddress]:
    """The addresses to look for peers through: `wanted`, or those of real local networks, or at the least loopback.

    Only those that can be bound now: an IPv6 address cannot for the first two seconds of its life (RFC 4862, 5.4).
    """
    found = all_addresses()
    if wanted is not None:
        return [each for each in addresses_named(found, wanted) if _bindable(each)]
    usable = [each for each in lan_addresses(found) if _bindable(each)]
    # No network at all: processes on this machine still find each other
    return usable or addresses_named(found, [LOOPBACK])


def _bindable(each: LocalAddress) -> bool:
    family = socket.AF_INET if each.ip.version == 4 else socket.AF_INET6
    where = (str(each.ip), 0) if each.ip.version == 4 else (str(each.ip), 0, 0, each.index)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(where)
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV, errno.EINVAL):
                return False
            raise
    return True
