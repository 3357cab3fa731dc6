"""Requests under way and their two time-outs: one after which another peer is asked, one after which it is a
failure.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from petalite.dht.contacts import Contact
from petalite.dht.messages import Request
from petalite.limits import DHT_FIRST_TIMEOUT, DHT_MAX_TIMEOUT, DHT_MIN_TIMEOUT


@dataclass(slots=True)
class Pending:
    """One request: sent when, for which operation and target, to whom."""

    operation: int
    contact: Contact
    target: int
    request: Request
    sent: float


class PendingRequests:
    """By number. The smoothed round trip of all peers serves those that were never measured (PT-DHT-034)."""

    def __init__(self) -> None:
        self._pending: dict[int, Pending] = {}
        self._deadlines: list[tuple[float, int, bool]] = []  # heap of (when, number, final)
        self._rtt = 0.0

    def add(self, number: int, pending: Pending, rtt: float) -> None:
        """`rtt`: the contact's smoothed round trip in seconds, 0 if not measured."""
        self._pending[number] = pending
        rtt = rtt or self._rtt
        soft = min(DHT_MAX_TIMEOUT, max(DHT_MIN_TIMEOUT, 3 * rtt)) if rtt else DHT_FIRST_TIMEOUT
        heapq.heappush(self._deadlines, (pending.sent + soft, number, soft >= DHT_MAX_TIMEOUT))

    def pop(self, number: int) -> Pending | None:
        return self._pending.pop(number, None)

    def measure(self, seconds: float) -> None:
        """Note a round trip; EWMA with a gain of 1/8, as TCP's (RFC 6298)."""
        self._rtt = seconds if not self._rtt else 0.875 * self._rtt + 0.125 * seconds

    def next_deadline(self) -> float:
        while self._deadlines and self._deadlines[0][1] not in self._pending:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else float("inf")

    def due(self, now: float) -> tuple[int, Pending, bool] | None:
        """One request whose time-out has passed, and whether that was the final one; None if there is none.

        After the first it gets the second, DHT_MAX_TIMEOUT after it was sent; after the final one it is the caller's
        to pop.
        """
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number, final = heapq.heappop(self._deadlines)
            pending = self._pending.get(number)
            if pending is None:
                continue
            if not final:
                heapq.heappush(self._deadlines, (pending.sent + DHT_MAX_TIMEOUT, number, True))
            return number, pending, final
        return None
