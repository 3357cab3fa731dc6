"""What a node keeps for others: records by key and publisher, within quotas (spec/10, "Storing").

The store judges times, numbers and quotas; the caller has judged form, network and signature (`records.read_record`)
and whether the key is its business. Wall-clock times are unix milliseconds.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from dataclasses import dataclass

from petalite.dht.ids import number
from petalite.dht.records import Record, RecordError, StoreCode, check_times
from petalite.limits import (
    MAX_RECORDS_PER_MESSAGE,
    RECORDS_PER_PEER,
    RECORDS_PER_SUBNET,
    RECORDS_TOTAL,
    SUBKEY_STALE_SECONDS,
    SUBKEYS_PER_KEY,
)


@dataclass(frozen=True, slots=True)
class Quotas:
    """Most records in all, a publisher, a sender's subnet (None: not counted, for LANs), and publishers a key."""

    total: int = RECORDS_TOTAL
    peer: int = RECORDS_PER_PEER
    subnet: int | None = RECORDS_PER_SUBNET
    key: int = SUBKEYS_PER_KEY


@dataclass(slots=True)
class _Held:
    record: Record
    subnet: bytes  # of whoever brought it: an attacker makes publishers for nothing, addresses cost
    at: int  # when the present bytes arrived


class RecordStore:
    """Records of others. `own` is our id as a number: what lies furthest from it goes first when room is short."""

    def __init__(self, own: int, quotas: Quotas | None = None) -> None:
        self._own = own
        self._quotas = quotas or Quotas()
        self._keys: dict[bytes, dict[bytes, _Held]] = {}
        self._far: list[tuple[int, bytes]] = []  # (distance, key), ascending
        self._expiry: list[tuple[int, bytes, bytes]] = []  # heap of (exp, key, publisher); may name what is gone
        self._peers: Counter[bytes] = Counter()
        self._subnets: Counter[bytes] = Counter()
        self._total = 0

    def __len__(self) -> int:
        return self._total

    # -------------------------------------------------------------------------------------------------- writing

    def put(self, record: Record, subnet: bytes, wall_ms: int) -> StoreCode:
        """Keep a record brought by a peer of `subnet`; the code says what became of it. Nothing is raised."""
        self.expire(wall_ms)
        try:
            check_times(record, wall_ms)
        except RecordError as error:
            return error.code
        held = self._keys.get(record.key, {}).get(record.publisher)
        if held is not None:
            return self._replace(held, record, subnet, wall_ms)
        if self._peers[record.publisher] >= self._quotas.peer:
            return StoreCode.QUOTA
        if self._quotas.subnet is not None and self._subnets[subnet] >= self._quotas.subnet:
            return StoreCode.QUOTA
        if not self._make_room(record, subnet, wall_ms):
            return StoreCode.FULL
        self._insert(_Held(record, subnet, wall_ms))
        return StoreCode.STORED

    def _replace(self, held: _Held, record: Record, subnet: bytes, wall_ms: int) -> StoreCode:
        """The higher number wins; an equal one must be the same bytes (PT-REC-014)."""
        if record.raw == held.record.raw:
            return StoreCode.KNOWN
        if record.seq <= held.record.seq:
            return StoreCode.OUTDATED
        self._remove(held)
        self._insert(_Held(record, subnet, wall_ms))
        return StoreCode.STORED

    def _make_room(self, record: Record, subnet: bytes, wall_ms: int) -> bool:
        group = self._keys.get(record.key, {})
        if len(group) >= self._quotas.key:
            victim = self._superfluous(group, subnet, wall_ms)
            if victim is None:
                return False
            self._remove(victim)
        if self._total < self._quotas.total:
            return True
        distance, furthest = self._far[-1]
        if number(record.key) ^ self._own >= distance:
            return False
        self._remove(min(self._keys[furthest].values(), key=lambda held: (held.record.exp, held.record.publisher)))
        return True

    def _superfluous(self, group: dict[bytes, _Held], subnet: bytes, wall_ms: int) -> _Held | None:
        """Who leaves a full key for a newcomer of `subnet`: diversity first, then freshness; None: the newcomer.

        The stalest of the subnet that holds most places goes, if it holds more than the newcomer's would. Else
        nobody's subnet is to blame: whoever missed its announcements goes. Being newest is no merit, or a flood
        would win.
        """
        crowd = Counter(held.subnet for held in group.values())
        crowded, most = max(crowd.items(), key=lambda item: (item[1], item[0]))
        if self._quotas.subnet is not None and most > crowd[subnet] + 1:
            return min(
                (held for held in group.values() if held.subnet == crowded),
                key=lambda held: (held.at, held.record.publisher),
            )
        stalest = min(group.values(), key=lambda held: (held.at, held.record.publisher))
        return stalest if wall_ms - stalest.at >= SUBKEY_STALE_SECONDS * 1000 else None

    def _insert(self, held: _Held) -> None:
        record = held.record
        group = self._keys.get(record.key)
        if group is None:
            group = self._keys[record.key] = {}
            insort(self._far, (number(record.key) ^ self._own, record.key))
        group[record.publisher] = held
        self._peers[record.publisher] += 1
        self._subnets[held.subnet] += 1
        self._total += 1
        heapq.heappush(self._expiry, (record.exp, record.key, record.publisher))
        if len(self._expiry) > 2 * self._total + 64:  # replaced records leave entries behind
            self._expiry = [
                (held.record.exp, held.record.key, held.record.publisher)
                for group in self._keys.values()
                for held in group.values()
            ]
            heapq.heapify(self._expiry)

    def _remove(self, held: _Held) -> None:
        record = held.record
        group = self._keys[record.key]
        del group[record.publisher]
        if not group:
            del self._keys[record.key]
            del self._far[bisect_left(self._far, (number(record.key) ^ self._own, record.key))]
        for counter, name in ((self._peers, bytes(record.publisher)), (self._subnets, held.subnet)):
            counter[name] -= 1
            if not counter[name]:
                del counter[name]
        self._total -= 1

    def expire(self, wall_ms: int) -> None:
        """Drop what has lapsed."""
        while self._expiry and self._expiry[0][0] <= wall_ms:
            _, key, publisher = heapq.heappop(self._expiry)
            held = self._keys.get(key, {}).get(publisher)
            if held is not None and held.record.exp <= wall_ms:
                self._remove(held)

    # -------------------------------------------------------------------------------------------------- reading

    def records(self, key: bytes, wall_ms: int) -> list[Record]:
        """All live records of `key`, in the order of their publishers."""
        self.expire(wall_ms)
        group = self._keys.get(key, {})
        return [group[name].record for name in sorted(group)]

    def page(
        self, key: bytes, after: bytes, wall_ms: int, count: int = MAX_RECORDS_PER_MESSAGE
    ) -> tuple[list[bytes], bytes | None]:
        """Up to `count` live records of `key` whose publishers come after `after` (b"": from the start), in their
        order.

        Second: the cursor of the next page, the last publisher of this one; None if this is the last.
        """
        self.expire(wall_ms)
        group = self._keys.get(key)
        if not group:
            return [], None
        publishers = sorted(group)
        first = bisect_right(publishers, after)
        names = publishers[first : first + count]
        more = first + count < len(publishers)
        return [group[name].record.raw for name in names], bytes(names[-1]) if more else None
