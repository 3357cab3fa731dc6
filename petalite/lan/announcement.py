"""What an instance says of itself: TXT records made and read, and whom they mean (spec/11, "Instances")."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from enum import StrEnum

from petalite.identity import PeerId, Random, SwarmKey
from petalite.limits import MAX_LAN_TXT
from petalite.wire.handshake import MAJOR

SERVICE_TYPE = "_petalite._tcp.local."
INSTANCE_CHARACTERS = 20
"""Of a label: the beginning of the peer id's text, or random characters of the same alphabet."""
_LABEL_BYTES = 13  # 20 characters of base32, and a rest that is cut
_TXT_VERSION = "1"
_HINT_DIGITS = 8
_TAG_CHARACTERS = 16


def network_hint(network: str) -> str:
    """First 8 hex digits of SHA-256(network id): enough to tell networks apart, proof of nothing (PT-LAN-012)."""
    return hashlib.sha256(network.encode()).hexdigest()[:_HINT_DIGITS]


def random_label(random: Random) -> str:
    """An instance or host label that says nothing about anybody (PT-LAN-013, PT-LAN-016)."""
    return base64.b32encode(random(_LABEL_BYTES)).decode().lower()[:INSTANCE_CHARACTERS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """The TXT record of one instance: `peer` and `network` of a public one, `tag` of a private one, else empty."""

    version: int = MAJOR
    peer: PeerId | None = None
    network: str = ""
    """The network's hint, 8 hexadecimal digits."""
    tag: str = ""
    """The LAN tag of a private swarm's key, 16 characters."""

    def to_txt(self) -> bytes:
        """The RDATA of the record (PT-LAN-010..013)."""
        pairs = [("txtvers", _TXT_VERSION)]
        if self.peer is not None:
            pairs.append(("id", self.peer.text))
        pairs.append(("v", str(self.version)))
        if self.network:
            pairs.append(("net", self.network))
        if self.tag:
            pairs.append(("tag", self.tag))
        strings = [f"{key}={value}".encode("ascii") for key, value in pairs]
        return b"".join(bytes([len(string)]) + string for string in strings)

    @classmethod
    def from_txt(cls, data: bytes) -> Announcement:
        """Read RDATA. Unknown keys are skipped whatever they hold (PT-LAN-015).

        Raises:
            ValueError: too long, cut off, or a known key with an impossible value (PT-LAN-014).
        """
        pairs = _pairs(data)
        version = _ascii(pairs, "v")
        if not (1 <= len(version) <= 5 and version.isdecimal()):
            raise ValueError("TXT: 'v' is not a number")
        peer, network, tag = _ascii(pairs, "id"), _ascii(pairs, "net"), _ascii(pairs, "tag")
        if network and (len(network) != _HINT_DIGITS or set(network) - set("0123456789abcdef")):
            raise ValueError("TXT: 'net' is not a network's hint")
        if tag and (len(tag) != _TAG_CHARACTERS or set(tag) - set("abcdefghijklmnopqrstuvwxyz234567")):
            raise ValueError("TXT: 'tag' is not a LAN tag")
        return cls(version=int(version), peer=PeerId.parse(peer) if peer else None, network=network, tag=tag)


def _pairs(data: bytes) -> dict[str, bytes]:
    """Key -> value of the TXT strings; the first of equal keys counts (RFC 6763, section 6.4)."""
    if len(data) > MAX_LAN_TXT:
        raise ValueError(f"TXT: {len(data)} bytes, at most {MAX_LAN_TXT} are read")
    found: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        end = at + 1 + data[at]
        if end > len(data):
            raise ValueError("TXT: cut off")
        key, equals, value = data[at + 1 : end].partition(b"=")
        if equals and key:
            found.setdefault(key.decode("ascii", "replace").lower(), value)
        at = end
    return found


def _ascii(pairs: dict[str, bytes], key: str) -> str:
    value = pairs.get(key, b"")
    if not value.isascii():
        raise ValueError(f"TXT: {key!r} is not ASCII")
    return value.decode("ascii")


class Kind(StrEnum):
    """Whom an instance belongs to, as far as its TXT record can tell."""

    OURS = "ours"
    ITSELF = "itself"  # this very peer
    OTHER_NETWORK = "other network"
    OTHER_VERSION = "other version"
    MALFORMED = "malformed"


@dataclass(frozen=True, slots=True)
class Membership:
    """Which swarm we look for: by `network` hint, or by `tag` when it is private. `peer` is this peer itself."""

    peer: PeerId
    network: str
    tag: str = ""

    @classmethod
    def of(cls, peer: PeerId, network: str, swarm_key: SwarmKey | None) -> Membership:
        """That of a peer in `network` (a network id), or in the private swarm of `swarm_key`."""
        return cls(peer, network_hint(network), swarm_key.lan_tag if swarm_key else "")

    def announcement(self) -> Announcement:
        """What this peer publishes: of a private swarm its tag alone (PT-LAN-013)."""
        if self.tag:
            return Announcement(tag=self.tag)
        return Announcement(peer=self.peer, network=self.network)

    def judge(self, seen: Announcement) -> Kind:
        """Whether `seen` is worth dialling (PT-LAN-020..023)."""
        if seen.peer == self.peer:
            return Kind.ITSELF
        if seen.version != MAJOR:
            return Kind.OTHER_VERSION
        if self.tag:
            return Kind.OURS if seen.tag == self.tag else Kind.OTHER_NETWORK
        return Kind.OURS if seen.peer is not None and seen.network == self.network else Kind.OTHER_NETWORK
