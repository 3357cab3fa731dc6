"""Which addresses of this machine are its local networks', and which of an instance's are worth dialling (spec/11)."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from petalite.limits import MAX_LAN_ADDRESSES, MAX_LAN_DIALS

IP = ipaddress.IPv4Address | ipaddress.IPv6Address

# Interfaces made by container engines, hypervisors and VPNs: their addresses lead nowhere for other machines.
_VIRTUAL = re.compile(
    r"(docker|br-|veth|virbr|vmnet|vboxnet|cni|flannel|cali|lxc|lxd|podman|tun|tap|wg|ppp|utun|zt|tailscale)"
)
# Where local networks have their addresses: RFC 1918, RFC 3927, RFC 4193, RFC 4291 (link-local)
_PRIVATE = tuple(
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "fc00::/7", "fe80::/10")
)


def is_virtual(name: str) -> bool:
    """Whether an interface of this name leads to containers or through a tunnel, not to a local network."""
    return _VIRTUAL.match(name) is not None


def is_private(address: IP) -> bool:
    """Whether `address` lies in a range that local networks use (loopback is none)."""
    return any(address in network for network in _PRIVATE if network.version == address.version)


@dataclass(frozen=True, slots=True)
class LocalAddress:
    """One address of one interface: `index` is its number, `prefix` the bits that its neighbours share."""

    name: str
    index: int
    ip: IP
    prefix: int

    @property
    def network(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        return ipaddress.ip_network((self.ip, self.prefix), strict=False)

    @property
    def scoped(self) -> str:
        """As text, a link-local IPv6 address with the interface it belongs to: `fe80::1%eth0`."""
        return f"{self.ip}%{self.name}" if self.ip.version == 6 and self.ip.is_link_local else str(self.ip)


def lan_addresses(found: Iterable[LocalAddress]) -> list[LocalAddress]:
    """Those through which neighbours are reached: private ones of real interfaces, IPv4 first (PT-LAN-002)."""
    kept = [each for each in found if not is_virtual(each.name) and is_private(each.ip)]
    return sorted(kept, key=lambda each: (each.ip.version, each.ip.version == 4 and each.ip.is_link_local, each.index))


def addresses_named(found: Iterable[LocalAddress], wanted: Collection[str]) -> list[LocalAddress]:
    """Those that somebody asked for by address, whatever their interface (PT-LAN-003)."""
    plain = {ipaddress.ip_address(text.partition("%")[0]) for text in wanted}
    return [each for each in found if each.ip in plain]


def sockets_for(own: Iterable[LocalAddress]) -> list[LocalAddress]:
    """One address an interface and IP version: a group is joined once a link, however many addresses it has."""
    chosen: dict[tuple[int, int], LocalAddress] = {}
    for each in own:
        key = (each.index, each.ip.version)
        if key not in chosen or (each.ip.version == 6 and each.ip.is_link_local):
            chosen[key] = each
    return list(chosen.values())


def published(own: Iterable[LocalAddress], bound: Collection[str] = ()) -> list[str]:
    """The addresses that an instance publishes, without scopes: they mean something on one machine only (PT-LAN-017).

    `bound` are the hosts that the port is open on; empty, or a wildcard among them, means all.
    """
    hosts = {host.partition("%")[0] for host in bound}
    texts: dict[str, None] = {}
    for each in own:
        wildcard = "0.0.0.0" if each.ip.version == 4 else "::"
        if not hosts or str(each.ip) in hosts or wildcard in hosts or "::" in hosts:
            texts[str(each.ip)] = None
    return list(texts)[:MAX_LAN_ADDRESSES]


def to_dial(texts: Sequence[str], own: Sequence[LocalAddress]) -> tuple[str, ...]:
    """What of an instance's addresses to dial, the likeliest first, at most MAX_LAN_DIALS (PT-LAN-030..033).

    Our own subnets' come first, then other private ones; nothing else is dialled, loopback only where we look on
    loopback. `texts` may hold anything; link-local IPv6 addresses keep the scope of the interface they came in by.
    """
    ranked: list[tuple[int, int, str]] = []
    seen: set[str] = set()
    for order, text in enumerate(texts):
        address = _parse(text, own)
        if address is None or str(address) in seen:
            continue
        seen.add(str(address))
        near = any(address in each.network for each in own if each.ip.version == address.version)
        if address.version == 6 and address.is_link_local:
            near = True  # it has a scope, so it came from that link
        if address.is_loopback and not near:
            continue
        if near or is_private(address):
            ranked.append((0 if near else 1, order, str(address)))
    return tuple(text for _, _, text in sorted(ranked)[:MAX_LAN_DIALS])


def _parse(text: str, own: Sequence[LocalAddress]) -> IP | None:
    """An address that could be a neighbour's, None for anything else."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_multicast or address.is_unspecified or address.is_reserved:
        return None
    for each in own:
        if address == each.network.broadcast_address and each.ip.version == 4 and each.prefix < 31:
            return None
    if isinstance(address, ipaddress.IPv6Address) and address.is_link_local:
        return _with_scope(address, own)
    return address


def _with_scope(address: ipaddress.IPv6Address, own: Sequence[LocalAddress]) -> IP | None:
    """A link-local address with the name of its link. One that came over IPv4 names none: where we have but one link,
    it is that one."""
    plain, _, scope = str(address).partition("%")
    links = {each.name: str(each.index) for each in own if each.ip.version == 6 and each.ip.is_link_local}
    if not scope and len(links) == 1:
        return ipaddress.ip_address(f"{plain}%{next(iter(links))}")
    for name, index in links.items():
        if scope in (name, index):
            return ipaddress.ip_address(f"{plain}%{name}")
    return None
