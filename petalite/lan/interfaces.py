"""Which addresses this machine has, asked of the operating system."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from collections.abc import Collection

import ifaddr

from petalite.lan.addresses import LocalAddress, addresses_named, lan_addresses

LOOPBACK = "127.0.0.1"
_GROUP_4, _GROUP_6, _PORT = "224.0.0.251", "ff02::fb", 5353
_NOT_NOW = frozenset(
    {errno.EADDRNOTAVAIL, errno.ENODEV, errno.EINVAL, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN}
)


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

    Only those that work now: an IPv6 address does not in the first two seconds of its life (RFC 4862, 5.4).
    """
    found = all_addresses()
    if wanted is not None:
        return [each for each in addresses_named(found, wanted) if _usable(each)]
    usable = [each for each in lan_addresses(found) if _usable(each)]
    # No network at all: processes on this machine still find each other
    return usable or addresses_named(found, [LOOPBACK])


def _usable(each: LocalAddress) -> bool:
    """Whether a socket of this address could send to the group now: the address is ready, its link is up."""
    where: tuple[str | int, ...] = (str(each.ip), 0)
    group: tuple[str | int, ...] = (_GROUP_4, _PORT)
    family, option = socket.AF_INET, (socket.IPPROTO_IP, socket.IP_MULTICAST_IF, each.ip.packed)
    if each.ip.version == 6:
        where, group = (*where, 0, each.index), (_GROUP_6, _PORT, 0, each.index)
        index = each.index.to_bytes(4, sys.byteorder)
        family, option = socket.AF_INET6, (socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(where)
            probe.setsockopt(*option)
            probe.connect(group)
        except OSError as error:
            if error.errno in _NOT_NOW:
                return False
            raise
    return True
