"""Rates and back-off: how much one peer may ask of us, and how often one address is dialled (spec/09, "Limits").

Times are monotonic seconds. Every table here is bounded and forgets the entry that was least recently used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from petalite.limits import (
    DHT_BACKOFF_SECONDS,
    DHT_BURST,
    DHT_DIAL_BURST,
    DHT_DIAL_RATE,
    DHT_MARK_SECONDS,
    DHT_MARKS,
    DHT_MAX_BACKOFF_SECONDS,
    DHT_MAX_BACKOFFS,
    DHT_MAX_RATED_PEERS,
    DHT_RATE,
)


class Rates:
    """One token bucket a name: `burst` at once, then `rate` a second.

    A forgotten name starts again with a full bucket, so `most` must exceed the number of names active at one time.
    """

    def __init__(self, rate: float = DHT_RATE, burst: float = DHT_BURST, most: int = DHT_MAX_RATED_PEERS) -> None:
        self._rate = rate
        self._burst = burst
        self._most = most
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()  # name -> (tokens, at)

    def take(self, name: Hashable, now: float, cost: float = 1.0) -> float:
        """Pay `cost` tokens. 0.0 if `name` may go on; else the seconds after which it may, and nothing is paid."""
        tokens, at = self._buckets.pop(name, (self._burst, now))
        tokens = min(self._burst, tokens + (now - at) * self._rate)
        if len(self._buckets) >= self._most:
            self._buckets.popitem(last=False)
        wait = max(0.0, (cost - tokens) / self._rate)
        self._buckets[name] = (tokens if wait else tokens - cost, now)
        return wait


class DialGuard:
    """Which addresses not to dial now: those that failed lately, and hosts that were dialled too often (PT-DHT-062).

    Whatever contacts a liar names, one victim gets DHT_DIAL_BURST dials from us and then one a second, and fewer if
    none of them succeeds. `hosts` off: a loopback or LAN swarm has many peers at one host.
    """

    def __init__(self, *, hosts: bool = True) -> None:
        self._hosts = Rates(DHT_DIAL_RATE, DHT_DIAL_BURST) if hosts else None
        self._failed: OrderedDict[str, tuple[int, float]] = OrderedDict()  # address -> (failures, not before)

    def __bool__(self) -> bool:
        """Whether any address is known to fail: spares the checks where none is."""
        return bool(self._failed)

    def backed_off(self, address: str, now: float) -> bool:
        """Whether the address failed so lately that it should not be tried."""
        entry = self._failed.get(address) if self._failed else None
        return entry is not None and now < entry[1]

    def allow(self, host: str, now: float) -> bool:
        """Whether one more dial to this host is within its rate; it is counted if so."""
        return self._hosts is None or not self._hosts.take(host, now)

    def failed(self, address: str, now: float) -> None:
        """A dial failed: back off, twice as long each time, at most DHT_MAX_BACKOFF_SECONDS."""
        failures = self._failed.pop(address, (0, 0.0))[0]
        if len(self._failed) >= DHT_MAX_BACKOFFS:
            self._failed.popitem(last=False)
        wait = min(DHT_MAX_BACKOFF_SECONDS, DHT_BACKOFF_SECONDS * 2.0 ** min(failures, 10))
        self._failed[address] = (failures + 1, now + wait)

    def succeeded(self, address: str) -> None:
        """Forget what failed before."""
        if self._failed:
            self._failed.pop(address, None)


class Marks:
    """Offences of peers: DHT_MARKS of them, each within DHT_MARK_SECONDS of the one before, make a peer unwanted for
    as long. One set counts lies (too many contacts, records of other keys), another stores and reads not served."""

    def __init__(self) -> None:
        self._marks: OrderedDict[int, tuple[int, float]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._marks)

    def mark(self, n: int, now: float) -> bool:
        """Note an offence of peer `n`; True if that makes it unwanted."""
        count, at = self._marks.pop(n, (0, now))
        if len(self._marks) >= DHT_MAX_RATED_PEERS:
            self._marks.popitem(last=False)
        count = 1 if now - at > DHT_MARK_SECONDS else count + 1
        self._marks[n] = (count, now)
        return count >= DHT_MARKS

    def unwanted(self, n: int, now: float) -> bool:
        if not self._marks:
            return False
        count, at = self._marks.get(n, (0, 0.0))
        return count >= DHT_MARKS and now - at <= DHT_MARK_SECONDS

    def clear(self, n: int) -> None:
        if self._marks:
            self._marks.pop(n, None)
