"""A contact: a peer id and where to dial it, and which addresses make sense (spec/09, "Contacts").

Addresses are IP literals with a port, `1.2.3.4:31337` or `[2a00::1]:31337`: a name would make every receiver of a
contact ask a resolver of the sender's choosing.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

from petalite.dht.ids import ID_BYTES, number
from petalite.limits import MAX_CONTACT_ADDRESSES

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_PLACE = re.compile(r"(?:\[([0-9a-fA-F:.]{2,45})(%[A-Za-z0-9_.-]{1,32})?\]|([0-9.]{7,15})):([0-9]{1,5})", re.ASCII)


class Reach(IntEnum):
    """From how far an address can be dialled; the order matters."""

    NOWHERE = 0  # unspecified, multicast, reserved, port 0
    HOST = 1  # loopback
    LINK = 2  # private, link-local, shared address space
    GLOBAL = 3


@dataclass(frozen=True, slots=True)
class Place:
    """One address, taken apart: `host` without brackets, `subnet` is a /24 (IPv4, 3 bytes) or a /48 (IPv6, 6 bytes).

    /48 and not /64: one customer commonly gets a /48 or /56, so a /64 would be a limit that anybody passes 256 times.
    """

    host: str
    port: int
    subnet: bytes
    reach: Reach
    scoped: bool


@functools.lru_cache(maxsize=16_384)
def parse_place(text: str) -> Place:
    """Read `a.b.c.d:port` or `[v6]:port`, v6 perhaps with a scope, in canonical spelling (RFC 5952).

    One spelling only: an address that could be written in a thousand ways would pass a thousand times for a new one.

    Raises:
        ValueError: not an IP literal with a port of 0..65535, or spelled otherwise.
    """
    match = _PLACE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:64]!r} is not an IP address with a port")
    v6, scope, v4, port = match.groups()
    address: IPAddress = ipaddress.IPv6Address(v6) if v6 else ipaddress.IPv4Address(v4)
    host = f"{address}{scope or ''}"
    if int(port) > 65_535:
        raise ValueError(f"port {port} is not in 0..65535")
    if text != (f"[{host}]:{int(port)}" if v6 else f"{host}:{int(port)}"):
        raise ValueError(f"{text[:64]!r} is not in canonical spelling")
    if getattr(address, "ipv4_mapped", None) is not None:
        raise ValueError(f"{text[:64]!r} is an IPv4 address in disguise")
    reach = _reach(address) if int(port) else Reach.NOWHERE
    if v6 and address.is_link_local and scope is None:
        reach = Reach.NOWHERE  # nobody can dial fe80:: without its interface
    return Place(host, int(port), _subnet(address), reach, scope is not None)


def _subnet(address: IPAddress) -> bytes:
    return address.packed[: 3 if address.version == 4 else 6]


def _host_address(host: str) -> IPAddress | None:
    """The address of a connection's other end; ::ffff:a.b.c.d is a.b.c.d. None where `host` is a name, as in tests."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _reach(address: IPAddress) -> Reach:
    if address.is_loopback:  # before the rest: ::1 lies in a reserved range
        return Reach.HOST
    if address.is_unspecified or address.is_multicast or address in _THIS_NETWORK:
        return Reach.NOWHERE
    if address.is_reserved and not address.is_global:
        return Reach.NOWHERE
    return Reach.GLOBAL if address.is_global else Reach.LINK


_THIS_NETWORK = ipaddress.IPv4Network("0.0.0.0/8")


def reach_of_host(host: str) -> Reach:
    """Reach of the address that a connection is seen from; GLOBAL where `host` is no IP literal."""
    address = _host_address(host)
    return Reach.GLOBAL if address is None else _reach(address)


def subnet_of_host(host: str) -> bytes:
    """The /24 or /48 that a connection is seen from, as accounted by quotas; the name itself where it is no IP."""
    address = _host_address(host)
    return host.encode()[:64] if address is None else _subnet(address)


@dataclass(frozen=True, slots=True)
class Contact:
    """A peer that can be dialled: 32-byte id and 1..4 addresses, the best first; the rest is derived from them.

    `reach` is the least reach of its addresses: one loopback address among public ones spoils the whole contact.

    Raises:
        ValueError: wrong length of the id, no or too many addresses, or one that is none.
    """

    id: bytes
    addrs: tuple[str, ...]
    n: int = field(init=False, compare=False, repr=False)
    subnet: bytes = field(init=False, compare=False, repr=False)
    reach: Reach = field(init=False, compare=False, repr=False)
    scoped: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.id) != ID_BYTES:
            raise ValueError(f"a contact's id has {ID_BYTES} bytes, not {len(self.id)}")
        if not 1 <= len(self.addrs) <= MAX_CONTACT_ADDRESSES:
            raise ValueError(f"a contact has 1..{MAX_CONTACT_ADDRESSES} addresses, not {len(self.addrs)}")
        places = [parse_place(text) for text in self.addrs]
        object.__setattr__(self, "n", number(self.id))
        object.__setattr__(self, "subnet", places[0].subnet)
        object.__setattr__(self, "reach", min(place.reach for place in places))
        object.__setattr__(self, "scoped", any(place.scoped for place in places))


make_contact = functools.lru_cache(maxsize=16_384)(Contact)
"""`Contact`, shared: the same peer is named in very many replies. Bounded, so a peer cannot fill it with names."""


def claimed_contact(peer_id: bytes, addrs: Iterable[str], host: str, lan: bool) -> Contact | None:
    """The contact of a peer that asked us something from `host` and says it listens at `addrs`; None if it has none.

    Only addresses at the very IP that we see count (PT-DHT-013): else a peer could name a victim's address as its
    own and have the swarm dial it. On a LAN, where machines have several addresses, every sane one counts.
    """
    wanted = []
    host = host.removeprefix("::ffff:") if "." in host else host
    plain, percent, scope = host.partition("%")
    for text in list(addrs)[:MAX_CONTACT_ADDRESSES]:
        if percent and "%" not in text:  # a link-local claim gets the interface through which we see it
            text = text.replace(f"[{plain}]", f"[{plain}%{scope}]")
        try:
            place = parse_place(text)
        except ValueError:
            continue
        if is_sane(place.reach, lan) and (lan or place.host == host):
            wanted.append(text)
    return make_contact(peer_id, tuple(wanted)) if wanted else None


def is_sane(reach: Reach, lan: bool) -> bool:
    """Whether an address of this reach may be dialled: outside of LAN and test mode only public ones (PT-DHT-012)."""
    return reach > Reach.NOWHERE if lan else reach is Reach.GLOBAL
