"""Finding everybody who should hold a key, even where an attacker crowds it (spec/09, "Regions").

Kademlia stores at the k nearest peers, and so whoever grinds k ids nearer than any honest one owns a key. The remedy
(Content eclipse on IPFS, arXiv 2307.12212, and its answer by regions, arXiv 2505.01139) is to store at and ask *all*
peers within the distance at which k honest ones are expected. Honest peers still answer with the k nearest they
know, which may all be sybils; so where far more peers are named than should be there, the rest of the region is
looked up by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from petalite.dht.contacts import Contact
from petalite.dht.ids import SPACE
from petalite.dht.lookup import Lookup
from petalite.limits import DHT_K

Ask = tuple[Contact, int]
"""A contact, and the target to name in the request."""


class RegionSearch:
    """A lookup of `target` that ends only when all known peers within `radius` have been asked.

    `start(target)` gives the contacts of our own table nearest to a target, `make(target, start, paths, within)` a
    lookup.
    """

    def __init__(
        self, target: int, radius: int, start: Callable[[int], list[Contact]],
        make: Callable[[int, Iterable[Contact], int, int], Lookup], paths: int,
    ) -> None:  # fmt: skip
        self.target = target
        self.radius = radius
        self._start = start
        self._make = make
        self.main = make(target, start(target), paths, radius if radius < SPACE else 0)
        self._sides: dict[int, Lookup] = {}
        self._looked_aside = False

    @property
    def crowded(self) -> bool:
        """Whether as many peers were named in half the radius as are expected in all of it.

        By chance: 20 or more where 10 are expected, 0.35 % of honest keys. A false alarm costs two more lookups.
        """
        return self.radius < SPACE and self.main.known_within(self.radius // 2) >= DHT_K

    def next(self) -> list[Ask]:
        """Whom to ask now, and for which target; see `Lookup.next`."""
        asks = [(contact, self.target) for contact in self.main.next()]
        if asks or not self.main.done:
            return asks
        if not self._looked_aside and self.crowded:
            self._looked_aside = True
            self._look_aside()
        for target, side in list(self._sides.items()):
            asks += [(contact, target) for contact in side.next()]
        if self._sides and all(side.done for side in self._sides.values()):
            for side in self._sides.values():
                self.main.add(side.nearest(DHT_K))
            self._sides.clear()
            return self.next()
        return asks

    def _look_aside(self) -> None:
        """Look up the two largest parts of the region that do not hold the key: key XOR the radius' highest
        two bits.
        """
        top = self.radius.bit_length() - 1
        for bit in (top, top - 1):
            target = self.target ^ (1 << bit)
            known = self._start(target) + self.main.nearest(DHT_K, self.radius)
            self._sides[target] = self._make(target, known, 1, 0)

    @property
    def done(self) -> bool:
        """Call it after `next` gave nothing."""
        return self.main.done and not self._sides

    def _lookup(self, target: int) -> Lookup | None:
        return self.main if target == self.target else self._sides.get(target)

    def replied(self, n: int, target: int, contacts: Iterable[Contact]) -> None:
        """Peer `n` answered the request that named `target`."""
        if (lookup := self._lookup(target)) is not None:
            lookup.replied(n, contacts)

    def slow(self, n: int, target: int) -> None:
        if (lookup := self._lookup(target)) is not None:
            lookup.slow(n)

    def failed(self, n: int, target: int) -> None:
        if (lookup := self._lookup(target)) is not None:
            lookup.failed(n)

    def members(self) -> list[Contact]:
        """Those that answered: the k nearest, and all within the radius; nearest first."""
        return self.main.nearest(DHT_K, self.radius if self.radius < SPACE else 0)
