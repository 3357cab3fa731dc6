"""Which addresses of this machine others on its networks can reach; container and tunnel interfaces do not count."""

from __future__ import annotations

import ipaddress
import re

import ifaddr

# Interfaces made by container engines, hypervisors and VPNs: their addresses lead nowhere for other machines.
_VIRTUAL = re.compile(
    r"(docker|br-|veth|virbr|vmnet|vboxnet|cni|flannel|cali|lxc|lxd|podman|tun|tap|wg|ppp|utun|zt|tailscale)"
)


def private_addresses() -> list[str]:
    """Private and link-local addresses of real interfaces, IPv4 first; link-local IPv6 with its scope."""
    found: list[tuple[int, str]] = []
    for adapter in ifaddr.get_adapters():
        name = adapter.nice_name if isinstance(adapter.nice_name, str) else ""
        if _VIRTUAL.match(name):
            continue
        for ip in adapter.ips:
            text = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
            address = ipaddress.ip_address(text)
            if address.is_loopback or not address.is_private:
                continue
            scope = f"%{name}" if address.version == 6 and address.is_link_local else ""
            found.append((address.version, f"{address}{scope}"))
    return [text for _, text in sorted(found, key=lambda pair: pair[0])]
