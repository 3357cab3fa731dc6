"""Which addresses of this machine others on its networks can reach; container and tunnel interfaces do not count."""

from __future__ import annotations

from petalite.lan.addresses import lan_addresses
from petalite.lan.interfaces import all_addresses


def private_addresses() -> list[str]:
    """Private and link-local addresses of real interfaces, IPv4 first; link-local IPv6 with its scope."""
    return [each.scoped for each in lan_addresses(all_addresses())]
