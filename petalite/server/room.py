"""Who makes room when the KV cache is full: pure (spec 07, lifetime).

A parked session goes before one in use, and the least recently used before the others. A peer that holds more than its
share also loses sessions in use, between two steps, to a peer that stays within its own: so one alone may use
everything, and nobody can keep everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from petalite.bloom.cache import Rows
from petalite.identity import PeerId
from petalite.server.sessions import Session


def plan_eviction(
    sessions: Iterable[Session],
    held: Mapping[PeerId, int],
    *,
    owner: PeerId,
    wanted: int,
    share: int,
    fits: Callable[[Sequence[Rows]], bool],
    now: float,
) -> list[Session] | None:
    """The shortest run of sessions, in the order in which they go, whose rows make `fits` true; None if there is none.

    `held`: cache tokens of each peer; `wanted`: those that `owner` asks for; `share`: what a peer may hold for sure.
    """
    idle = sorted((s for s in sessions if not s.in_progress), key=lambda session: session.used_at)
    order = [session for session in idle if session.parked(now)]
    if held.get(owner, 0) + wanted <= share:
        order += _beyond_share([s for s in idle if s not in order], held, order, share)
    rows = [session.rows for session in order]
    if not fits(rows):
        return None
    low, high = 0, len(order)  # fits at `high`, not known below: more freed never fits worse
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(rows[:middle]) else (middle + 1, high)
    return order[:high]


def _beyond_share(
    active: Sequence[Session], held: Mapping[PeerId, int], gone: Sequence[Session], share: int
) -> list[Session]:
    """Of the sessions in use those of peers beyond their share, until they are within it."""
    left = dict(held)
    for session in gone:
        left[session.owner] -= session.tokens
    taken = []
    for session in active:
        if left[session.owner] > share:
            left[session.owner] -= session.tokens
            taken.append(session)
    return taken
