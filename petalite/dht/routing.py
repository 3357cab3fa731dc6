"""The routing table: which peers we know, in buckets by distance (spec/09, "Routing table").

It holds verified peers only: those that proved their id to us in a handshake. It says whom to ping and whom to ask,
and does neither. Times are monotonic seconds. `target` is an id as an integer (`ids.number`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from petalite.dht.contacts import Contact
from petalite.dht.ids import ID_BITS, SPACE, number
from petalite.limits import (
    DHT_BUCKET_PER_SUBNET,
    DHT_CHECK_AFTER_SECONDS,
    DHT_K,
    DHT_REFRESH_SECONDS,
    DHT_REPLACEMENTS,
    DHT_SIBLINGS,
    DHT_TABLE_PER_SUBNET,
)


class Entry:
    """A contact in the table. `failures` in a row; `shirks` are failed stores and reads, which lookups do
    not mend.
    """

    __slots__ = ("contact", "failures", "rtt", "seen", "shirks")

    def __init__(self, contact: Contact, seen: float) -> None:
        self.contact = contact
        self.seen = seen
        self.rtt = 0.0  # EWMA in seconds; 0 = not measured
        self.failures = 0


class RoutingTable:
    """k-buckets with replacement caches, and the siblings: the nearest peers whether or not their bucket had room.

    `diverse` limits how many peers of one subnet are kept; it is off for loopback and LAN swarms, where all share
    one.
    """

    def __init__(
        self, own: bytes, *, k: int = DHT_K, replacements: int = DHT_REPLACEMENTS, siblings: int = DHT_SIBLINGS,
        diverse: bool = True,
    ) -> None:  # fmt: skip
        self.own = number(own)
        self._k = k
        self._replacements = replacements
        self._sibling_count = siblings
        self._diverse = diverse
        self._buckets: dict[int, dict[int, Entry]] = {}  # least recently seen first
        self._waiting: dict[int, dict[int, Entry]] = {}  # newcomers to full buckets, oldest first
        self._siblings: dict[int, Entry] = {}
        self._orphans: dict[int, Entry] = {}  # siblings that no bucket holds
        self._filled = 0  # bit i: bucket i holds somebody
        self._subnets: Counter[bytes] = Counter()
        self._touched: dict[int, float] = {}

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values())) + len(self._orphans)

    def __contains__(self, node_id: object) -> bool:
        return isinstance(node_id, bytes) and self.entry(number(node_id)) is not None

    def entry(self, n: int) -> Entry | None:
        """The entry of the peer whose id is the number `n`, or None. Waiting newcomers have none."""
        bucket = self._buckets.get((n ^ self.own).bit_length() - 1)
        return (bucket.get(n) if bucket else None) or self._orphans.get(n)

    def contacts(self) -> Iterator[Contact]:
        """Every contact, farthest bucket first."""
        for index in sorted(self._buckets, reverse=True):
            for entry in self._buckets[index].values():
                yield entry.contact
        for entry in self._orphans.values():
            yield entry.contact

    # ------------------------------------------------------------------------------------------------ learning

    def seen(self, contact: Contact, now: float) -> Contact | None:
        """Note that a verified peer spoke. Returns the contact to ping, if the newcomer waits for an answer of that
        one.

        Answer or not, tell the table: `seen` keeps the old contact, `failed` lets the newcomer in (PT-DHT-021).
        """
        index = (contact.n ^ self.own).bit_length() - 1
        if index < 0:
            return None
        bucket = self._buckets.get(index)
        entry = bucket.pop(contact.n, None) if bucket is not None else None
        if bucket is not None and entry is not None:
            bucket[contact.n] = entry  # to the end: most recently seen
            self._renew(entry, contact, now, bucket)
            return None
        entry = self._orphans.get(contact.n)
        if entry is not None:
            self._renew(entry, contact, now, self._siblings)
        else:
            entry = Entry(contact, now)
        ping = self._insert(index, entry, now)
        self._add_sibling(entry)
        return ping

    def _renew(self, entry: Entry, contact: Contact, now: float, group: dict[int, Entry]) -> None:
        entry.seen = now
        entry.failures = 0
        if entry.contact.addrs == contact.addrs:
            return
        # A peer that moves keeps its old address here if its new subnet has its share already.
        if entry.contact.subnet == contact.subnet or self._fits(group, contact, False):
            self._subnets[entry.contact.subnet] -= 1
            self._subnets[contact.subnet] += 1
            entry.contact = contact

    def _insert(self, index: int, entry: Entry, now: float) -> Contact | None:
        bucket = self._buckets.setdefault(index, {})
        n = entry.contact.n
        if len(bucket) < self._k and self._fits(bucket, entry.contact, n in self._orphans):
            self._waiting.get(index, {}).pop(n, None)
            self._place(index, bucket, entry)
            return None
        if not bucket:
            del self._buckets[index]
        waiting = self._waiting.setdefault(index, {})
        waiting.pop(n, None)
        if len(waiting) >= self._replacements:
            del waiting[next(iter(waiting))]
        waiting[n] = entry
        if len(bucket) < self._k:
            return None  # turned away for its subnet, not for lack of room
        oldest = next(iter(bucket.values()))
        return oldest.contact if now - oldest.seen >= DHT_CHECK_AFTER_SECONDS else None

    def _place(self, index: int, bucket: dict[int, Entry], entry: Entry) -> None:
        if self._orphans.pop(entry.contact.n, None) is None:
            self._subnets[entry.contact.subnet] += 1
        bucket[entry.contact.n] = entry
        self._filled |= 1 << index

    def _fits(self, bucket: dict[int, Entry], contact: Contact, counted: bool) -> bool:
        """Whether bucket (or siblings) and table have room for one more of the contact's subnet (PT-DHT-023)."""
        if not self._diverse:
            return True
        subnet = contact.subnet
        if not counted and self._subnets[subnet] >= DHT_TABLE_PER_SUBNET:
            return False
        return sum(entry.contact.subnet == subnet for entry in bucket.values()) < DHT_BUCKET_PER_SUBNET

    def _add_sibling(self, entry: Entry) -> None:
        n = entry.contact.n
        if n in self._siblings or not self._sibling_count:
            return
        full = len(self._siblings) >= self._sibling_count
        furthest = max(self._siblings, key=self.own.__xor__) if full else n
        if full and n ^ self.own > furthest ^ self.own:
            return
        bucketed = n in self._buckets.get((n ^ self.own).bit_length() - 1, {})
        if not self._fits(self._siblings, entry.contact, bucketed):
            return
        if full:
            self._drop_sibling(furthest)
        self._siblings[n] = entry
        if not bucketed:
            self._orphans[n] = entry
            self._subnets[entry.contact.subnet] += 1

    def _drop_sibling(self, n: int) -> None:
        del self._siblings[n]
        orphan = self._orphans.pop(n, None)
        if orphan is not None:
            self._subnets[orphan.contact.subnet] -= 1

    # ----------------------------------------------------------------------------------------------- forgetting

    def failed(self, n: int) -> bool:
        """Note a request that peer `n` left unanswered. True if that cost it its place.

        The second failure in a row does; the first if a newcomer waits (PT-DHT-022).
        """
        entry = self.entry(n)
        if entry is None:
            self._waiting.get((n ^ self.own).bit_length() - 1, {}).pop(n, None)
            return False
        entry.failures += 1
        if entry.failures < 2 and not self._waiting.get((n ^ self.own).bit_length() - 1):
            return False
        self.remove(n)
        return True

    def remove(self, n: int) -> None:
        """Forget a peer at once; the newest newcomer that fits takes its place in the bucket."""
        index = (n ^ self.own).bit_length() - 1
        self._waiting.get(index, {}).pop(n, None)
        if n in self._siblings:
            self._drop_sibling(n)
        bucket = self._buckets.get(index)
        entry = bucket.pop(n, None) if bucket is not None else None
        if bucket is None or entry is None:
            return
        self._subnets[entry.contact.subnet] -= 1
        self._promote(index, bucket)
        if not bucket:
            del self._buckets[index]
            self._filled &= ~(1 << index)

    def _promote(self, index: int, bucket: dict[int, Entry]) -> None:
        waiting = self._waiting.get(index, {})
        for n in reversed(waiting):
            entry = waiting[n]
            if self._fits(bucket, entry.contact, n in self._orphans):
                del waiting[n]
                self._place(index, bucket, entry)
                self._add_sibling(entry)
                return

    # --------------------------------------------------------------------------------------------------- asking

    def nearest(self, target: int, count: int) -> list[Contact]:
        """The `count` contacts nearest to `target`, nearest first, without those that left their last request
        unanswered.

        Buckets are visited in the order of their distance to the target, so only one or two are sorted: first those
        in whose bit own id and target differ, from the highest down, then the others from the lowest up.
        """
        found: list[Contact] = []
        to_target = target.__xor__
        gap = target ^ self.own
        near, far = self._filled & gap, self._filled & ~gap
        while (near or far) and len(found) < count:
            if near:
                index = near.bit_length() - 1
                near ^= 1 << index
            else:
                index = (far & -far).bit_length() - 1
                far &= far - 1
            bucket = self._buckets[index]
            found += [entry.contact for n in sorted(bucket, key=to_target) if not (entry := bucket[n]).failures]
        if self._orphans:
            found += [entry.contact for entry in self._orphans.values() if not entry.failures]
            found.sort(key=lambda contact: contact.n ^ target)
        return found[:count]

    def siblings(self) -> list[Contact]:
        """The nearest peers to ourselves, nearest first."""
        return [self._siblings[n].contact for n in sorted(self._siblings, key=self.own.__xor__)]

    def stalest(self, now: float) -> Contact | None:
        """The contact that has been silent for longest, if for longer than DHT_CHECK_AFTER_SECONDS: worth a ping."""
        oldest = [next(iter(bucket.values())) for bucket in self._buckets.values()]
        oldest += self._orphans.values()
        entry = min(oldest, key=lambda entry: entry.seen, default=None)
        return entry.contact if entry is not None and now - entry.seen >= DHT_CHECK_AFTER_SECONDS else None

    # ---------------------------------------------------------------------------------------------------- upkeep

    def touch(self, target: int, now: float) -> None:
        """Note a lookup of `target`: its bucket needs no refresh for DHT_REFRESH_SECONDS."""
        self._touched[(target ^ self.own).bit_length() - 1] = now

    def size_of(self, index: int) -> int:
        """How many contacts bucket `index` holds."""
        return len(self._buckets.get(index, ()))

    def deepest(self) -> int:
        """Index of the nearest bucket that holds somebody; ID_BITS for an empty table."""
        return (self._filled & -self._filled).bit_length() - 1 if self._filled else ID_BITS

    def due(self, now: float) -> list[int]:
        """Indexes of the buckets, from the nearest filled one up, that no lookup touched for DHT_REFRESH_SECONDS."""
        horizon = now - DHT_REFRESH_SECONDS
        return [i for i in range(self.deepest(), ID_BITS) if self._touched.get(i, -SPACE) <= horizon]
