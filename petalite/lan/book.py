"""What is known of the instances on the local network, and when to ask which one again. Pure: `now` is an argument.

Time to live is the instance's word, so it is clamped; and as a browser keeps names far longer than their addresses,
an instance is asked again before its lifetime is over and forgotten when it does not answer (PT-LAN-040..044).
"""

from __future__ import annotations

from dataclasses import dataclass

from petalite.identity import PeerId
from petalite.lan.announcement import Kind
from petalite.limits import (
    LAN_LIFETIME_SECONDS,
    LAN_MIN_LIFETIME_SECONDS,
    LAN_REFRESH_SHARE,
    LAN_RESOLVE_SECONDS,
    LAN_RETRY_SECONDS,
    MAX_LAN_INSTANCES,
)


@dataclass(frozen=True, slots=True)
class Hint:
    """A peer may listen at `addresses` ((host, port), the likeliest first); none: it has left or fell silent.

    `peer` is None for a member of a private swarm, whose id shows in the handshake only. `instance` tells hints
    apart: a later one replaces an earlier one of the same instance. `seen` is when, on the clock of `now`.
    """

    instance: str
    peer: PeerId | None
    addresses: tuple[tuple[str, int], ...]
    seen: float


@dataclass(frozen=True, slots=True)
class Sighting:
    """One answer of one instance: whom it belongs to, and where to dial if it is ours."""

    kind: Kind
    peer: PeerId | None = None
    addresses: tuple[tuple[str, int], ...] = ()
    ttl: float = 0.0


@dataclass(slots=True)
class _Entry:
    ask_at: float
    gone_at: float
    asking: bool = False
    sighting: Sighting | None = None


class Book:
    """At most MAX_LAN_INSTANCES instances. `lifetime` bounds how long one is believed, in seconds."""

    def __init__(self, lifetime: float = LAN_LIFETIME_SECONDS) -> None:
        self._lifetime = lifetime
        self._least = min(lifetime, LAN_MIN_LIFETIME_SECONDS)
        self._retry = min(LAN_RETRY_SECONDS, lifetime / 10)
        self._entries: dict[str, _Entry] = {}

    def notice(self, instance: str, now: float) -> None:
        """It appeared or changed: ask it now. Where the book is full, a newcomer is ignored (PT-LAN-044)."""
        entry = self._entries.get(instance)
        if entry is not None:
            entry.ask_at = min(entry.ask_at, now)
        elif len(self._entries) < MAX_LAN_INSTANCES:
            give_up = now + max(self._least, 3 * (LAN_RESOLVE_SECONDS + self._retry))
            self._entries[instance] = _Entry(ask_at=now, gone_at=give_up)

    def next_to_ask(self, now: float) -> str | None:
        """One instance that is due; it counts as being asked until `answered` or `remove`."""
        for instance, entry in self._entries.items():
            if not entry.asking and entry.ask_at <= now:
                entry.asking = True
                return instance
        return None

    def answered(self, instance: str, sighting: Sighting | None, now: float) -> Hint | None:
        """What it said, None for silence. Returns a hint where there is one to pass on."""
        entry = self._entries.get(instance)
        if entry is None:
            return None  # it left while it was asked
        entry.asking = False
        if sighting is None:
            entry.ask_at = now + self._retry
            return None
        lifetime = min(max(sighting.ttl, self._least), self._lifetime)
        entry.ask_at = now + lifetime * LAN_REFRESH_SHARE
        entry.gone_at = now + lifetime
        before, entry.sighting = entry.sighting, sighting
        if sighting.kind is Kind.OURS and sighting.addresses:
            return Hint(instance, sighting.peer, sighting.addresses, now)
        return _farewell(instance, before, now)

    def remove(self, instance: str, now: float) -> Hint | None:
        """It said goodbye. Returns the hint that says so, if there was one before."""
        entry = self._entries.pop(instance, None)
        return None if entry is None else _farewell(instance, entry.sighting, now)

    def sweep(self, now: float) -> list[Hint]:
        """Forget those whose time is over; the hints that say so."""
        over = [instance for instance, entry in self._entries.items() if entry.gone_at <= now and not entry.asking]
        farewells = [self.remove(instance, now) for instance in over]
        return [hint for hint in farewells if hint is not None]

    def next_at(self) -> float:
        """When `sweep` or `next_to_ask` has something to do; infinity if never."""
        times = [min(e.ask_at, e.gone_at) for e in self._entries.values() if not e.asking]
        return min(times, default=float("inf"))

    def restart(self, now: float) -> None:
        """The networks changed: what is known stays for its lifetime, and is asked anew."""
        for entry in self._entries.values():
            entry.ask_at, entry.asking = now, False

    def sightings(self) -> dict[str, Sighting]:
        """Every instance that has answered, the foreign ones too: what a diagnosis looks at."""
        return {name: e.sighting for name, e in self._entries.items() if e.sighting is not None}


def _farewell(instance: str, before: Sighting | None, now: float) -> Hint | None:
    if before is None or before.kind is not Kind.OURS or not before.addresses:
        return None
    return Hint(instance, before.peer, (), now)
