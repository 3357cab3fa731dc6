"""Whom a batch of short steps should wait for: pure.

A batch costs about the same however many share it, since the weights are read once. But clients that decode at the same
pace do not meet by themselves: while the step of one runs the other's waits, and so they take turns for ever.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

# A session is waited for up to this part of what a batch takes, if it lately came back sooner than that.
GATHER_SHARE = 0.5
# One that has been away for longer is forgotten.
AWAY_SECONDS = 1.0


class Gathering:
    """Sessions, and how soon they come back with their next step: seconds, on the caller's clock."""

    def __init__(self) -> None:
        self._away: dict[Hashable, tuple[float, Hashable]] = {}  # since when, and with which group they compute
        self._usual: dict[Hashable, float] = {}

    def came(self, session: Hashable, now: float) -> None:
        """The session has brought a step."""
        away = self._away.pop(session, None)
        if away is not None:
            self._usual[session] = now - away[0]

    def left(self, sessions: Iterable[Hashable], group: Hashable, now: float) -> None:
        """The sessions, which can share batches with those of their group, have got the outcome of a step."""
        for session in [session for session, (since, _) in self._away.items() if now - since > AWAY_SECONDS]:
            del self._away[session]
            self._usual.pop(session, None)
        self._away.update(dict.fromkeys(sessions, (now, group)))

    def expects_by(self, time: float) -> bool:
        """Whether a session is likely to bring a step before `time`, or is late with one."""
        for session, (since, _) in self._away.items():  # noqa: SIM110  a generator is one thing more to be fetched
            if since + self._usual.get(session, 0.0) <= time:
                return True
        return False

    def until(self, group: Hashable, batch_seconds: float, now: float) -> float:
        """Until when a batch of the group should wait; `now` if for nobody. Who was waited for in vain is waited for
        again only once it has come back in time.
        """
        most = GATHER_SHARE * batch_seconds
        until = now
        for session, (since, its_group) in self._away.items():
            if its_group == group and self._usual.get(session, most) < most:
                if since + most > now:
                    until = max(until, since + most)
                else:
                    del self._usual[session]
        return until
