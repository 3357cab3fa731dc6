"""Is the peer alive? Pure: every moment is an argument (spec 03)."""

from __future__ import annotations

from enum import Enum, auto

from petalite import limits


class Verdict(Enum):
    ALIVE = auto()
    PING = auto()  # silent for long enough to ask
    DEAD = auto()


class Liveness:
    """Clocks of one connection, read only while a request of ours is pending.

    Three things count as life: bytes heard, bytes of ours that the peer's side has taken, and our having asked only
    now. A clock that has not been looked at for long shows that it was us who slept: what arrived meanwhile is still
    unread, so the peer gets its time again.
    """

    def __init__(self, now: float) -> None:
        self._life_at = now
        self._looked_at = now
        self._ping_is_out = False

    def heard(self, now: float) -> None:
        self._life_at = now
        self._ping_is_out = False

    def moved(self, now: float) -> None:
        self._life_at = now

    def asked(self, now: float) -> None:
        """The first request of ours is pending from now on. Silence goes on counting where the one before was given up
        just now: asking again gives no new life.
        """
        pause = now - max(self._looked_at, self._life_at)
        if pause > limits.PING_AFTER_SECONDS:
            self._life_at = now
            self._ping_is_out = False
        else:
            self._life_at += pause
        self._looked_at = now

    def pinged(self) -> None:
        self._ping_is_out = True

    def silence(self, now: float) -> float:
        return now - self._life_at

    def look(self, now: float) -> Verdict:
        """To be called every TICK_SECONDS or so while a request of ours is pending."""
        if now - self._looked_at > limits.PING_AFTER_SECONDS + limits.TICK_SECONDS:
            self._life_at = now
        self._looked_at = now
        silence = now - self._life_at
        if silence >= limits.DEAD_AFTER_SECONDS:
            return Verdict.DEAD
        if silence >= limits.PING_AFTER_SECONDS and not self._ping_is_out:
            return Verdict.PING
        return Verdict.ALIVE
