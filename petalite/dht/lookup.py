"""The iterative lookup as an object that never waits: whom to ask next, and what came back (spec/09, "Lookup").

A lookup ends when the k nearest peers it knows of have all been asked, on every path; an answer never ends it. A
peer slower than its time-out frees its place at once and still counts if it answers later. Paths are disjoint
(Baumgart and Mies, S/Kademlia, 2007): a peer belongs to the path that first heard of it. Whoever names peers that
turn out dead loses its say: what it alone names is asked last.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable
from enum import IntEnum

from petalite.dht.contacts import Contact
from petalite.limits import DHT_ALPHA, DHT_BUCKET_PER_SUBNET, DHT_K, DHT_MAX_ASKED, DHT_TAIL_ALPHA

_DISTRUST = 2  # dead contacts by which a referrer loses its say, if they are also more than twice its live ones
_PROBATION = 2  # peers that only one referrer names: so many are asked before one of its contacts has answered
_OWN_ASKED = 6  # of the peers that we knew ourselves: were the first three liars, nobody else would be heard
_REFERRERS = 4


class State(IntEnum):
    """Of one candidate in one lookup."""

    NEW = 0
    ASKED = 1
    SLOW = 2
    REPLIED = 3
    FAILED = 4


class _Candidate:
    __slots__ = ("contact", "distance", "hop", "path", "referrers", "state")

    def __init__(self, contact: Contact, distance: int, path: int, hop: int, referrers: list[int]) -> None:
        self.contact = contact
        self.distance = distance
        self.path = path  # its number, not the object: no cycle, so a lookup is freed at once when it ends
        self.hop = hop  # 1 for those we knew; one more than whoever named it first
        self.referrers = referrers  # empty: we knew it ourselves
        self.state = State.NEW


class _Path:
    __slots__ = ("in_flight", "order")

    def __init__(self) -> None:
        self.order: list[tuple[int, _Candidate]] = []  # by distance, which never ties
        self.in_flight = 0


class Lookup:
    """One lookup of `target`. Call `next` until it gives nothing; feed `replied`, `slow` and `failed`; read the
    result.

    `within`: also ask every peer up to that distance, however many are nearer (a region, see `region`).
    `connected(id)` prefers open connections among contacts of equal rank, that is with the same highest differing
    bit. `diverse`: at most 2 peers of a subnet are asked before all others have been.
    """

    def __init__(
        self, target: int, own: int, start: Iterable[Contact], *, k: int = DHT_K, alpha: int = DHT_ALPHA, paths: int
        = 1, within: int = 0, diverse: bool = True, connected: Callable[[bytes], bool] | None = None,
    ) -> None:  # fmt: skip
        self.target = target
        self._own = own
        self._k = k
        self._alpha = alpha
        self._within = within
        self._diverse = diverse
        self._connected = connected
        self._all = _Path()
        self._paths = [self._all] if paths == 1 else [_Path() for _ in range(paths)]
        self._width = k if paths == 1 else max(1, 2 * k // paths)
        self._candidates: dict[int, _Candidate] = {}
        self._wins: Counter[int] = Counter()
        self._losses: Counter[int] = Counter()
        self._distrusted: set[int] = set()
        self._on_probation: Counter[int] = Counter()
        self._replied = 0
        self._lost = 0
        self._deferred_left = k
        self._own_left = min(_OWN_ASKED, k // 2)
        self._subnets: Counter[bytes] = Counter()
        self._places: set[str] = set()
        self.asked = 0
        self.add(start)

    # ------------------------------------------------------------------------------------------------- feeding

    def add(self, contacts: Iterable[Contact]) -> None:
        """Candidates that we know ourselves; they are dealt to the paths in turn."""
        for i, contact in enumerate(contacts):
            self._learn(contact, i % len(self._paths), 1, None)

    def replied(self, n: int, contacts: Iterable[Contact]) -> None:
        """Peer `n` answered with these contacts (at most k are read); an answer after `slow` still counts."""
        candidate = self._candidates.get(n)
        if candidate is None or candidate.state not in (State.ASKED, State.SLOW):
            return
        self._settle(candidate, State.REPLIED)
        self._replied += 1
        for referrer in candidate.referrers:
            self._wins[referrer] += 1
        for i, contact in enumerate(contacts):
            if i == self._k:
                break
            self._learn(contact, candidate.path, candidate.hop + 1, n)

    def slow(self, n: int) -> None:
        """Peer `n` did not answer within its time-out: the next one is asked, the answer may still come."""
        candidate = self._candidates.get(n)
        if candidate is not None and candidate.state is State.ASKED:
            self._settle(candidate, State.SLOW)
            self._blame(candidate)

    def failed(self, n: int) -> None:
        """Peer `n` will not answer."""
        candidate = self._candidates.get(n)
        if candidate is None or candidate.state not in (State.ASKED, State.SLOW):
            return
        if candidate.state is State.ASKED:
            self._blame(candidate)
        self._settle(candidate, State.FAILED)

    def _learn(self, contact: Contact, path: int, hop: int, referrer: int | None) -> None:
        n = contact.n
        known = self._candidates.get(n)
        if known is not None:
            if referrer is None:
                known.referrers.clear()
            elif known.referrers and len(known.referrers) < _REFERRERS:
                known.referrers.append(referrer)
            return
        if n == self._own:
            return
        distance = n ^ self.target
        candidate = _Candidate(contact, distance, path, hop, [] if referrer is None else [referrer])
        self._candidates[n] = candidate
        insort(self._all.order, (distance, candidate))
        if self._paths[path] is not self._all:
            insort(self._paths[path].order, (distance, candidate))

    def _settle(self, candidate: _Candidate, state: State) -> None:
        if candidate.state is State.ASKED:
            self._count(candidate, -1)
            if candidate.referrers:
                self._on_probation[candidate.referrers[0]] -= 1
            if state is not State.REPLIED:
                self._subnets[candidate.contact.subnet] -= 1
        candidate.state = state

    def _count(self, candidate: _Candidate, by: int) -> None:
        self._all.in_flight += by
        path = self._paths[candidate.path]
        if path is not self._all:
            path.in_flight += by

    def _blame(self, candidate: _Candidate) -> None:
        self._lost += 1
        for referrer in candidate.referrers:
            self._losses[referrer] += 1
            if self._losses[referrer] >= _DISTRUST and self._losses[referrer] > 2 * self._wins[referrer]:
                self._distrusted.add(referrer)

    # -------------------------------------------------------------------------------------------------- asking

    def next(self) -> list[Contact]:
        """Whom to ask now; each is then in flight. Empty while there is nothing to do but wait, or when `done`."""
        chosen: list[Contact] = []
        if self._paths[0] is not self._all:
            per_path = max(1, DHT_TAIL_ALPHA // len(self._paths))
            for path in self._paths:
                while path.in_flight < per_path and (candidate := self._pick(path, self._width, 0)):
                    chosen.append(self._ask(candidate))
            if self._all.in_flight:  # the paths stay apart until all of them have ended
                return chosen
        while self._all.in_flight < self._parallel():
            candidate = self._pick(self._all, self._k, self._within) or self._pick_own() or self._pick_deferred()
            if candidate is None:
                break
            chosen.append(self._ask(candidate))
        return chosen

    @property
    def done(self) -> bool:
        """True once nothing is in flight and nobody is left to ask. Call it after `next` gave nothing."""
        return not self._all.in_flight

    def _ask(self, candidate: _Candidate) -> Contact:
        candidate.state = State.ASKED
        self._count(candidate, 1)
        if candidate.referrers:
            self._on_probation[candidate.referrers[0]] += 1
        else:
            self._own_left -= 1
        self._subnets[candidate.contact.subnet] += 1
        self._places.add(candidate.contact.addrs[0])
        self.asked += 1
        return candidate.contact

    def _pick(self, path: _Path, width: int, within: int) -> _Candidate | None:
        """The best one to ask among the `width` nearest of a path, and among all up to the distance `within`."""
        if self.asked >= DHT_MAX_ASKED:
            return None
        live = 0
        best: _Candidate | None = None
        for distance, candidate in path.order:
            if best is not None and distance.bit_length() > best.distance.bit_length():
                break
            if live >= width and distance > within:
                break
            state = candidate.state
            if state is State.FAILED or state is State.SLOW:
                continue
            if state is State.NEW:
                if self._is_deferred(candidate):
                    continue
                if self._connected is None or self._connected(candidate.contact.id):
                    return candidate
                best = best or candidate
            live += 1
        return best

    def _is_deferred(self, candidate: _Candidate) -> bool:
        """Asked later: named only by the distrusted, at an address already asked, or one of too many of a subnet.

        Also, for the moment, one more that is named by a single referrer of which no contact has answered yet.
        """
        referrers = candidate.referrers
        if referrers:
            if self._distrusted and self._distrusted.issuperset(referrers):
                return True
            if len(referrers) == 1:
                first = referrers[0]
                if not self._wins[first] and self._on_probation[first] + self._losses[first] >= _PROBATION:
                    return True
        contact = candidate.contact
        return self._diverse and (
            contact.addrs[0] in self._places or self._subnets[contact.subnet] >= DHT_BUCKET_PER_SUBNET
        )

    def _pick_own(self) -> _Candidate | None:
        """The nearest that we knew ourselves, until _OWN_ASKED of them have been asked."""
        if self._own_left <= 0 or self.asked >= DHT_MAX_ASKED:
            return None
        for _, candidate in self._all.order:
            if candidate.state is State.NEW and not candidate.referrers and not self._is_deferred(candidate):
                return candidate
        return None

    def _pick_deferred(self) -> _Candidate | None:
        """With fewer than k answers and nothing else to do, up to k of the deferred get their turn, nearest first."""
        if self._replied >= self._k or not self._deferred_left or self.asked >= DHT_MAX_ASKED:
            return None
        if self._all.in_flight and self._deferred_left == self._k:
            return None  # what is under way may still name better ones
        for _, candidate in self._all.order:
            if candidate.state is State.NEW and candidate.contact.addrs[0] not in self._places:
                self._deferred_left -= 1
                return candidate
        return None

    def _parallel(self) -> int:
        """alpha; more where peers turn out dead, and when it is clear that all the rest must be asked."""
        return DHT_TAIL_ALPHA if self._in_tail() else min(DHT_TAIL_ALPHA, self._alpha + self._lost // 2)

    def _in_tail(self) -> bool:
        """Whether the nearest live candidate has answered: what is left of the k must be asked in any case."""
        for _, candidate in self._all.order:
            if candidate.state is State.REPLIED:
                return True
            if candidate.state in (State.NEW, State.ASKED) and not self._is_deferred(candidate):
                return False
        return False

    # -------------------------------------------------------------------------------------------------- result

    def nearest(self, count: int, within: int = 0) -> list[Contact]:
        """The `count` nearest peers that answered, and all that did up to the distance `within`; nearest first."""
        found: list[Contact] = []
        for distance, candidate in self._all.order:
            if len(found) >= count and distance > within:
                break
            if candidate.state is State.REPLIED:
                found.append(candidate.contact)
        return found

    def known_within(self, within: int) -> int:
        """How many peers up to the distance `within` were named by anybody who kept its say, whether or not
        they live.
        """
        count = 0
        for distance, candidate in self._all.order:
            if distance > within:
                break
            count += not candidate.referrers or not self._distrusted.issuperset(candidate.referrers)
        return count

    def hops(self) -> int:
        """How many hops away the nearest answer was; 0 without one."""
        return next((candidate.hop for _, candidate in self._all.order if candidate.state is State.REPLIED), 0)
