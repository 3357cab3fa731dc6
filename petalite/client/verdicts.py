"""What to do about a hop that failed: pure, so that every answer of a server has its row in one table (spec 07).

Only a fault of the peer, or of the way to it, bans the peer. What a server calls our fault is believed when no other
server of these blocks says otherwise; refusals for want of room cost nobody its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from petalite import limits
from petalite.errors import ErrorCode, RequestError
from petalite.identity import PeerId


class Verdict(Enum):
    AGAIN = "ask the same again after a pause"
    REOPEN = "open the session anew at the same server, and replay"
    AVOID = "choose another server for a while"
    BAN = "choose another server, and distrust this one"
    ACCUSED = "choose another server, and see whether it says the same"


_OPEN_TABLE: dict[ErrorCode, Verdict] = {
    ErrorCode.BAD_REQUEST: Verdict.ACCUSED,
    ErrorCode.UNSUPPORTED: Verdict.ACCUSED,
    ErrorCode.CONFLICT: Verdict.REOPEN,
    ErrorCode.NO_SESSION: Verdict.REOPEN,
    ErrorCode.BUSY: Verdict.AGAIN,
    ErrorCode.RATE: Verdict.AGAIN,
    ErrorCode.REFUSED: Verdict.AGAIN,
    ErrorCode.RESOURCES: Verdict.AVOID,
    ErrorCode.NOT_SERVED: Verdict.AVOID,
    ErrorCode.UNAVAILABLE: Verdict.AVOID,
    ErrorCode.DEADLINE: Verdict.AVOID,
    ErrorCode.FORBIDDEN: Verdict.AVOID,
}

# Of steps; whatever stands in neither table bans.
_STEP_TABLE: dict[ErrorCode, Verdict] = {
    **_OPEN_TABLE,
    ErrorCode.OUT_OF_ORDER: Verdict.REOPEN,
    ErrorCode.POSITION: Verdict.REOPEN,
    ErrorCode.CANCELLED: Verdict.REOPEN,
    ErrorCode.TENSOR: Verdict.ACCUSED,
    ErrorCode.RESOURCES: Verdict.AGAIN,
}

# Of forward and backward, which reserve nothing and leave nothing behind.
_TRAINING_TABLE: dict[ErrorCode, Verdict] = {
    code: verdict
    for code, verdict in {
        **_OPEN_TABLE,
        ErrorCode.TENSOR: Verdict.ACCUSED,
        ErrorCode.CANCELLED: Verdict.AGAIN,
    }.items()
    if verdict is not Verdict.REOPEN
}
_TABLES = {
    **dict.fromkeys(("open", "extend", "close"), _OPEN_TABLE),
    **dict.fromkeys(("forward", "backward"), _TRAINING_TABLE),
}

FORGET_SECONDS = 60.0
MOST_FORGOTTEN = 2  # sessions that a server may drop within FORGET_SECONDS before it is banned
MOST_AGAIN = 3  # refusals in a row after which a server is avoided
AVOID_SECONDS = 1.0
LONG_AVOID_SECONDS = 600.0


class Judge:
    """What one session remembers of its servers' failures. Time is an argument."""

    def __init__(self) -> None:
        self.causes: list[str] = []
        self._accusers: dict[PeerId, list[RequestError]] = {}
        self._barred: set[PeerId] = set()
        self.short_of_room = False
        self._avoided: dict[PeerId, float] = {}
        self._forgotten: dict[PeerId, list[float]] = {}
        self._again: dict[PeerId, int] = {}

    def avoided(self, now: float) -> frozenset[PeerId]:
        """Servers not to choose now."""
        self._avoided = {peer: until for peer, until in self._avoided.items() if now < until}
        return frozenset({*self._avoided, *self._barred})

    def avoid(self, peer: PeerId, seconds: float, now: float) -> None:
        self._avoided[peer] = now + seconds

    def no_room(self, peer: PeerId, now: float) -> None:
        """`peer` had no cache room for us in the time that we can wait."""
        self.short_of_room = True
        self.avoid(peer, AVOID_SECONDS, now)

    def succeeded(self, peer: PeerId) -> None:
        self._again.pop(peer, None)

    def retry_accusers(self) -> bool:
        """Nobody else is left: ask those once more who called a request our fault; whether there were any.

        Raises the RequestError of one that has said so twice: it is believed.
        """
        for errors in self._accusers.values():
            if len(errors) > 1:
                raise errors[0]
        waiting = bool(self._barred)
        self._barred.clear()
        return waiting

    def step_done(self) -> None:
        """A step came out: whoever called it our fault was wrong, and old causes explain nothing any more."""
        self._accusers.clear()
        self._barred.clear()
        self.causes.clear()
        self.short_of_room = False

    def note(self, cause: str) -> None:
        self.causes = [*self.causes[-7:], cause]

    def refused(self, peer: PeerId, method: str, error: RequestError, now: float) -> Verdict:
        """The verdict on an error that `peer` answered to `method`."""
        table = _TABLES.get(method, _STEP_TABLE)
        verdict = table.get(error.code, Verdict.BAN)
        if error.code is ErrorCode.RESOURCES:
            self.short_of_room = True
            if table is _TRAINING_TABLE and error.detail.get("retry") is False:
                verdict = Verdict.ACCUSED  # one request is too much for it
            if verdict is Verdict.AGAIN and error.detail.get("retry") is not True:
                return Verdict.BAN  # room for the step was reserved at open
        if verdict is Verdict.REOPEN:
            return self._reopen(peer, now)
        if verdict is Verdict.AGAIN:
            self._again[peer] = self._again.get(peer, 0) + 1
            if self._again[peer] > MOST_AGAIN:
                del self._again[peer]
                verdict = Verdict.AVOID
        if verdict is Verdict.AVOID:
            lasting = error.code is ErrorCode.FORBIDDEN or (
                error.code is ErrorCode.RESOURCES and error.detail.get("retry") is False
            )
            self.avoid(peer, LONG_AVOID_SECONDS if lasting else retry_after(error.detail, AVOID_SECONDS), now)
        if verdict is Verdict.ACCUSED:
            self._accusers.setdefault(peer, []).append(error)
            self._barred.add(peer)
        return verdict

    def _reopen(self, peer: PeerId, now: float) -> Verdict:
        recent = [at for at in self._forgotten.get(peer, []) if now - at < FORGET_SECONDS]
        self._forgotten[peer] = [*recent, now]
        return Verdict.REOPEN if len(recent) < MOST_FORGOTTEN else Verdict.BAN


def retry_after(detail: Mapping[str, object], default: float) -> float:
    """Seconds that an error asks us to wait, within our own bounds."""
    after = detail.get("after")
    if type(after) is not int or after < 0:
        return default
    return min(max(after / 1000, 0.05), limits.MAX_RETRY_AFTER_SECONDS)
