"""What a session remembers about steps that servers pass on among themselves (spec 07, push)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import trio

from petalite.client.calls import Asked
from petalite.client.pipeline import Send

# A pushed step that has not come so long after the hop before it was done is sent by ourselves.
PUSH_SECONDS = 1.0
# The same between two servers of which one has just replaced another, until a first push has come.
FRESH_PUSH_SECONDS = 0.15
# How long steps go by way of the client after a push that failed; doubles while they fail.
FIRST_PAUSE = 5.0
LONGEST_PAUSE = 300.0


@dataclass(slots=True, eq=False)
class Part:
    """One hop's share of a pushed step; `behind` is that of the hop it pushes to.

    `asked`: the step, or what awaits it. `done`: its outcome was taken, as were those before. `gone`: the server
    answered, but its connection ended before the push was seen to arrive; `unwatch` ends looking. `unpushed`: it says
    itself that it could not push.
    """

    send: Send
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    asked: Asked | None = None
    done: bool = False
    gone: bool = False
    unpushed: bool = False
    behind: Part | None = None
    unwatch: Callable[[], None] = lambda: None

    def note_gone(self) -> None:
        """It pushes nothing any more, or has: we need not wait to see, for a step sent twice is done once."""
        if self.behind is not None and not self.behind.done:
            self.gone = True
            self.behind.scope.cancel()

    def note_unpushed(self) -> None:
        """As `note_gone`, but where its answer is still to come that counts first."""
        self.unpushed = True
        if self.done and self.behind is not None:
            self.behind.scope.cancel()

    def end(self) -> None:
        """Nobody looks at it any more."""
        self.unwatch()
        if self.asked is not None and not self.done:
            self.asked.drop()


def parts_of(sends: Sequence[Send]) -> list[Part]:
    parts = [Part(send) for send in sends]
    for part, behind in pairwise(parts):
        part.behind = behind
    return parts


class PushTrust:
    """Whether to try pushing now; pure, time is an argument."""

    def __init__(self, wanted: bool) -> None:
        self._from = 0.0 if wanted else float("inf")
        self._pause = FIRST_PAUSE

    def holds(self, now: float) -> bool:
        return now >= self._from

    def pushed(self, well: bool, now: float) -> None:
        """A step was pushed, and came to every hop or not."""
        if well:
            self._pause = FIRST_PAUSE
        else:
            self._from = now + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
