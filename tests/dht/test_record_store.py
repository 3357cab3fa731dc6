"""The record store against a plain model, and its quotas under a flood (spec/10, "Storing")."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from petalite.dht.ids import number
from petalite.dht.records import Record, StoreCode
from petalite.dht.store import Quotas, RecordStore
from petalite.identity import PeerId

NOW = 1_700_000_000_000
NET_A, NET_B = b"\x08\x08\x08", b"\x09\x09\x09"


def record(key: int = 1, publisher: int = 1, seq: int = NOW, exp: int = NOW + 600_000, text: bytes = b"") -> Record:
    """A record as `read_record` would give it; the store never looks into the bytes."""
    raw = b"%d %d %d %d " % (key, publisher, seq, exp) + text
    return Record(raw, key.to_bytes(32, "big"), PeerId(publisher.to_bytes(32, "big")), seq, exp, {})


def raws(store: RecordStore, key: int = 1, now: int = NOW) -> list[bytes]:
    found: list[bytes] = []
    after: bytes | None = b""
    while after is not None:
        page, after = store.page(key.to_bytes(32, "big"), after, now)
        assert len(page) <= 10
        found += page
    return found


def test_higher_number_wins_and_equal_numbers_need_equal_bytes() -> None:
    """PT-REC-014, D09, D17"""
    store = RecordStore(0)
    first, second = record(seq=NOW), record(seq=NOW + 1)
    assert store.put(first, NET_A, NOW) is StoreCode.STORED
    assert store.put(first, NET_A, NOW) is StoreCode.KNOWN
    assert store.put(record(seq=NOW, text=b"other"), NET_A, NOW) is StoreCode.OUTDATED
    assert store.put(second, NET_A, NOW) is StoreCode.STORED
    assert store.put(first, NET_A, NOW) is StoreCode.OUTDATED
    assert raws(store) == [second.raw]


def test_times_are_refused_not_clamped() -> None:
    """PT-REC-012, PT-REC-013, D11"""
    store = RecordStore(0)
    assert store.put(record(exp=NOW), NET_A, NOW) is StoreCode.EXPIRED
    assert store.put(record(exp=NOW + 3_600_001), NET_A, NOW) is StoreCode.FUTURE
    assert store.put(record(seq=NOW + 600_001), NET_A, NOW) is StoreCode.FUTURE
    assert len(store) == 0


def test_record_is_gone_at_its_expiry() -> None:
    store = RecordStore(0)
    store.put(record(exp=NOW + 10), NET_A, NOW)
    assert len(raws(store, now=NOW + 9)) == 1
    assert raws(store, now=NOW + 10) == [] and len(store) == 0


def test_flood_by_one_publisher_stops_at_64() -> None:
    """PT-REC-022, D13"""
    store = RecordStore(0)
    codes = [store.put(record(key=k), NET_A, NOW) for k in range(1, 100)]
    assert codes.count(StoreCode.STORED) == 64 and codes[64:] == [StoreCode.QUOTA] * 35
    assert store.put(record(key=1, seq=NOW + 1), NET_A, NOW) is StoreCode.STORED  # renewing needs no room


def test_flood_of_made_up_publishers_from_one_subnet_stops_at_256() -> None:
    store = RecordStore(0)
    codes = [store.put(record(key=k, publisher=k), NET_A, NOW) for k in range(1, 400)]
    assert codes.count(StoreCode.STORED) == 256
    assert store.put(record(key=999, publisher=999), NET_B, NOW) is StoreCode.STORED
    lan = RecordStore(0, Quotas(subnet=None))
    assert all(lan.put(record(key=k, publisher=k), NET_A, NOW) is StoreCode.STORED for k in range(1, 400))


def test_furthest_key_makes_room() -> None:
    """PT-REC-023"""
    store = RecordStore(0, Quotas(total=3))
    for key in (10, 30, 20):
        store.put(record(key=key, publisher=key), NET_A, NOW)
    assert store.put(record(key=40, publisher=40), NET_A, NOW) is StoreCode.FULL
    assert store.put(record(key=5, publisher=5), NET_A, NOW) is StoreCode.STORED
    assert raws(store, 30) == [] and len(store) == 3
    assert store.put(record(key=20, publisher=21), NET_A, NOW) is StoreCode.FULL  # as far as the furthest


def test_crowded_key_keeps_diverse_and_live_publishers() -> None:
    """PT-REC-024, D15: 10,000 subkeys for one key."""
    store = RecordStore(0, Quotas(key=8, subnet=1000))
    honest = [record(publisher=1000 + i) for i in range(3)]
    for i, one in enumerate(honest):
        store.put(one, bytes([1, 1, i]), NOW)
    for i in range(500):
        store.put(record(publisher=i), NET_A, NOW + i)
    assert len(store) == 8 and {one.raw for one in honest} <= set(raws(store))
    assert store.put(record(publisher=5000), NET_B, NOW + 600) is StoreCode.STORED
    held = set(raws(store))
    assert {one.raw for one in honest} <= held and len(held) == 8


def test_among_singles_only_the_stale_make_room() -> None:
    store = RecordStore(0, Quotas(key=3))
    for i in range(3):
        store.put(record(publisher=i), bytes([1, 1, i]), NOW + 100_000 * i)
    late = NOW + 299_999
    assert store.put(record(publisher=9), NET_B, late) is StoreCode.FULL
    assert store.put(record(publisher=9), NET_B, late + 1) is StoreCode.STORED
    assert record(publisher=0).raw not in raws(store)


def test_pages_cover_everything_once_in_the_order_of_publishers() -> None:
    """PT-DHT-030"""
    store = RecordStore(0)
    for i in range(25):
        store.put(record(publisher=i * 7 % 25), NET_A, NOW)
    assert raws(store) == [record(publisher=i).raw for i in range(25)]
    assert store.records(record().key, NOW) == [record(publisher=i) for i in range(25)]


# ------------------------------------------------------------------------------------------------- the plain model


@dataclass
class Held:
    record: Record
    subnet: bytes
    at: int


class PlainStore:
    """The same rules by scans over one list."""

    def __init__(self, quotas: Quotas) -> None:
        self.quotas = quotas
        self.held: list[Held] = []

    def expire(self, now: int) -> None:
        self.held = [h for h in self.held if h.record.exp > now]

    def put(self, new: Record, subnet: bytes, now: int) -> StoreCode:
        self.expire(now)
        if new.exp <= now:
            return StoreCode.EXPIRED
        if new.exp > now + 3_600_000 or new.seq > now + 600_000:
            return StoreCode.FUTURE
        for h in self.held:
            if (h.record.key, h.record.publisher) == (new.key, new.publisher):
                if h.record.raw == new.raw:
                    return StoreCode.KNOWN
                if new.seq <= h.record.seq:
                    return StoreCode.OUTDATED
                self.held.remove(h)
                self.held.append(Held(new, subnet, now))
                return StoreCode.STORED
        if sum(h.record.publisher == new.publisher for h in self.held) >= self.quotas.peer:
            return StoreCode.QUOTA
        if self.quotas.subnet is not None and sum(h.subnet == subnet for h in self.held) >= self.quotas.subnet:
            return StoreCode.QUOTA
        if not self.room_in_key(new, subnet, now):
            return StoreCode.FULL
        if len(self.held) >= self.quotas.total:
            furthest = max(self.held, key=lambda h: (number(h.record.key), -h.record.exp))
            if number(new.key) >= number(furthest.record.key):
                return StoreCode.FULL
            ties = [h for h in self.held if (h.record.key, h.record.exp) == (furthest.record.key, furthest.record.exp)]
            self.held.remove(min(ties, key=lambda h: h.record.publisher))
        self.held.append(Held(new, subnet, now))
        return StoreCode.STORED

    def room_in_key(self, new: Record, subnet: bytes, now: int) -> bool:
        group = [h for h in self.held if h.record.key == new.key]
        if len(group) < self.quotas.key:
            return True
        share = {h.subnet: sum(g.subnet == h.subnet for g in group) for h in group}
        top = max(share, key=lambda net: (share[net], net))
        if share[top] > share.get(subnet, 0) + 1:
            group = [h for h in group if h.subnet == top]
            self.held.remove(min(group, key=lambda h: (h.at, h.record.publisher)))
            return True
        stalest = min(group, key=lambda h: (h.at, h.record.publisher))
        if now - stalest.at < 300_000:
            return False
        self.held.remove(stalest)
        return True


class StoreMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        quotas = Quotas(total=8, peer=4, subnet=6, key=4)
        self.store, self.plain, self.now = RecordStore(0, quotas), PlainStore(quotas), NOW

    @rule(
        key=st.integers(1, 4), publisher=st.integers(1, 7), ahead=st.sampled_from([-5, 0, 0, 7, 600_001]),
        life=st.sampled_from([0, 50, 400_000, 600_000, 3_600_001]), subnet=st.sampled_from([NET_A, NET_B, b"\7\7\7"]),
        text=st.sampled_from([b"", b"x"]),
    )  # fmt: skip
    def put(self, key: int, publisher: int, ahead: int, life: int, subnet: bytes, text: bytes) -> None:
        new = record(key, publisher, self.now + ahead, self.now + life, text)
        assert self.store.put(new, subnet, self.now) is self.plain.put(new, subnet, self.now)

    @rule(wait=st.sampled_from([1, 50, 100_000, 300_000]))
    def wait(self, wait: int) -> None:
        self.now += wait

    @invariant()
    def same(self) -> None:
        self.plain.expire(self.now)
        for key in range(1, 5):
            group = [h.record for h in self.plain.held if number(h.record.key) == key]
            assert raws(self.store, key, self.now) == [r.raw for r in sorted(group, key=lambda r: r.publisher)]
        self.store.expire(self.now)
        assert len(self.store) == len(self.plain.held) <= 8


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
