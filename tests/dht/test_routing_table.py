"""The routing table against a full sort and a plain model (spec/09, "Routing table")."""

from __future__ import annotations

import random
from collections import Counter

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from petalite.dht.contacts import Contact
from petalite.dht.ids import ID_BITS, number
from petalite.dht.routing import RoutingTable
from petalite.limits import DHT_BUCKET_PER_SUBNET, DHT_CHECK_AFTER_SECONDS, DHT_TABLE_PER_SUBNET

OWN = bytes(32)


def contact(n: int, host: str = "") -> Contact:
    host = host or f"{20 + n % 70}.{n // 70 % 250}.{n % 251}.1"
    return Contact(n.to_bytes(32, "big"), (f"{host}:1",))


def far(i: int) -> int:
    """Ids that all fall into the farthest bucket."""
    return (1 << 255) | i


@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_nearest_equals_a_full_sort(seed: int, count: int, wanted: int) -> None:
    rng = random.Random(seed)
    table = RoutingTable(rng.randbytes(32))
    for _ in range(count):
        bits = rng.choice((256, 256, 250, 30))
        table.seen(contact(table.own ^ rng.getrandbits(bits)), 0.0)
    known = {c.n for c in table.contacts()}
    assert len(known) == len(table)
    target = table.own ^ rng.getrandbits(rng.choice((256, 250, 30)))
    found = table.nearest(target, wanted)
    assert [c.n for c in found] == sorted(known, key=lambda n: n ^ target)[:wanted]


def test_full_bucket_keeps_its_oldest_and_names_it_to_be_pinged() -> None:
    """PT-DHT-021"""
    table = RoutingTable(OWN, k=3, siblings=0)
    for i in range(3):
        assert table.seen(contact(far(i)), float(i)) is None
    assert table.seen(contact(far(9)), 10.0) is None  # everybody spoke lately: the newcomer just waits
    late = DHT_CHECK_AFTER_SECONDS + 1.0
    assert table.seen(contact(far(9)), late) == contact(far(0))
    table.seen(contact(far(0)), late)  # it answered: it stays, and is the youngest now
    assert far(9).to_bytes(32, "big") not in table
    assert table.seen(contact(far(9)), late) == contact(far(1))
    assert table.failed(far(1))  # it did not: the newcomer takes its place
    assert far(9).to_bytes(32, "big") in table and far(1).to_bytes(32, "big") not in table


def test_contact_goes_at_the_second_failure_in_a_row_and_is_not_passed_on_after_the_first() -> None:
    table = RoutingTable(OWN, k=3, siblings=0)
    table.seen(contact(far(1)), 0.0)
    assert not table.failed(far(1)) and table.nearest(far(1), 5) == []
    table.seen(contact(far(1)), 1.0)
    assert table.nearest(far(1), 5) == [contact(far(1))]
    assert not table.failed(far(1)) and table.failed(far(1)) and len(table) == 0


def test_two_of_a_subnet_in_a_bucket_and_ten_in_the_table() -> None:
    """PT-DHT-023"""
    table = RoutingTable(OWN)
    for index in range(ID_BITS):
        for i in range(5):
            table.seen(contact(1 << index | i if index > 3 else 1 << index, f"8.8.8.{(index * 5 + i) % 250 + 1}"), 0.0)
    per_bucket = Counter(c.n.bit_length() for c in table.contacts())
    assert max(per_bucket.values()) == DHT_BUCKET_PER_SUBNET
    assert len(table) == DHT_TABLE_PER_SUBNET
    lan = RoutingTable(OWN, diverse=False)
    for i in range(20):
        lan.seen(contact(far(i), "127.0.0.1"), 0.0)
    assert len(lan) == 20


def test_peer_that_moves_into_a_crowded_subnet_keeps_its_old_address() -> None:
    table = RoutingTable(OWN, siblings=0)
    for i in range(2):
        table.seen(contact(far(i), f"8.8.8.{i + 1}"), 0.0)
    table.seen(contact(far(7), "9.9.9.9"), 0.0)
    table.seen(contact(far(7), "8.8.8.7"), 1.0)
    assert table.nearest(far(7), 1)[0].addrs == ("9.9.9.9:1",)
    table.seen(contact(far(7), "7.7.7.7"), 1.0)
    assert table.nearest(far(7), 1)[0].addrs == ("7.7.7.7:1",)


def test_siblings_hold_the_nearest_even_where_their_bucket_is_full() -> None:
    """PT-DHT-026"""
    table = RoutingTable(OWN, k=2, siblings=4)
    ids = [far(0x100 + i) for i in range(8)]
    for n in ids:
        table.seen(contact(n), 0.0)
    for n in (far(1), far(2)):
        table.seen(contact(n), 0.0)
    wanted = [far(1), far(2), ids[0], ids[1]]
    assert [c.n for c in table.siblings()] == wanted
    assert [c.n for c in table.nearest(0, 4)] == wanted
    table.remove(far(1))
    assert far(1) not in [c.n for c in table.nearest(0, 10)]


def test_own_id_is_never_a_contact() -> None:
    table = RoutingTable(OWN)
    table.seen(contact(0), 0.0)
    assert len(table) == 0 and OWN not in table


def test_buckets_that_no_lookup_touched_are_due() -> None:
    table = RoutingTable(OWN)
    table.seen(contact(1 << 250), 0.0)
    assert table.due(0.0) == [250, 251, 252, 253, 254, 255]
    table.touch(1 << 252, 0.0)
    assert 252 not in table.due(3599.0) and 252 in table.due(3600.0)


def test_stalest_contact_is_worth_a_ping_after_five_minutes() -> None:
    table = RoutingTable(OWN)
    table.seen(contact(far(1)), 0.0)
    table.seen(contact(far(2)), 50.0)
    assert table.stalest(299.0) is None
    assert table.stalest(300.0) == contact(far(1))


# ------------------------------------------------------------------------------------------- against a plain model


class PlainTable:
    """The same rules, written without any thought for speed: lists, scans, no siblings."""

    def __init__(self, k: int, replacements: int) -> None:
        self.k, self.replacements = k, replacements
        self.buckets: dict[int, list[Contact]] = {}
        self.waiting: dict[int, list[Contact]] = {}
        self.seen_at: dict[int, float] = {}
        self.failures: Counter[int] = Counter()

    def fits(self, bucket: list[Contact], new: Contact) -> bool:
        everybody = [c for some in self.buckets.values() for c in some]
        in_table = sum(c.subnet == new.subnet for c in everybody)
        in_bucket = sum(c.subnet == new.subnet for c in bucket)
        return in_table < DHT_TABLE_PER_SUBNET and in_bucket < DHT_BUCKET_PER_SUBNET

    def seen(self, new: Contact, now: float) -> Contact | None:
        index = new.n.bit_length() - 1
        bucket, waiting = self.buckets.setdefault(index, []), self.waiting.setdefault(index, [])
        self.seen_at[new.n] = now
        if any(c.n == new.n for c in bucket):
            bucket[:] = [c for c in bucket if c.n != new.n] + [new]
            self.failures[new.n] = 0
            return None
        waiting[:] = [c for c in waiting if c.n != new.n]
        if len(bucket) < self.k and self.fits(bucket, new):
            bucket.append(new)
            return None
        waiting.append(new)
        del waiting[: -self.replacements]
        if len(bucket) == self.k and now - self.seen_at[bucket[0].n] >= DHT_CHECK_AFTER_SECONDS:
            return bucket[0]
        return None

    def failed(self, n: int) -> None:
        index = n.bit_length() - 1
        bucket, waiting = self.buckets.get(index, []), self.waiting.get(index, [])
        if all(c.n != n for c in bucket):
            waiting[:] = [c for c in waiting if c.n != n]
            return
        self.failures[n] += 1
        if self.failures[n] < 2 and not waiting:
            return
        bucket[:] = [c for c in bucket if c.n != n]
        self.failures[n] = 0
        for c in reversed(waiting):
            if self.fits(bucket, c):
                waiting.remove(c)
                bucket.append(c)
                return


class TableMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.table = RoutingTable(OWN, k=3, replacements=2, siblings=0)
        self.plain = PlainTable(3, 2)
        self.now = 0.0

    @rule(bucket=st.sampled_from([255, 254, 6]), i=st.integers(0, 12), wait=st.sampled_from([0.0, 1.0, 301.0]))
    def hear(self, bucket: int, i: int, wait: float) -> None:
        self.now += wait
        peer = contact(1 << bucket | i, f"8.8.{i % 5}.{i + 1}")
        assert self.table.seen(peer, self.now) == self.plain.seen(peer, self.now)

    @rule(bucket=st.sampled_from([255, 254, 6]), i=st.integers(0, 12))
    def fail(self, bucket: int, i: int) -> None:
        self.table.failed(1 << bucket | i)
        self.plain.failed(1 << bucket | i)

    @invariant()
    def same(self) -> None:
        plain = [c for index in sorted(self.plain.buckets, reverse=True) for c in self.plain.buckets[index]]
        assert list(self.table.contacts()) == plain
        healthy = [c for c in plain if not self.plain.failures[c.n]]
        assert self.table.nearest(1 << 254, 5) == sorted(healthy, key=lambda c: c.n ^ 1 << 254)[:5]


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class SiblingMachine(RuleBasedStateMachine):
    """With siblings the history counts, so this one holds invariants instead of a twin."""

    @initialize()
    def start(self) -> None:
        self.table = RoutingTable(OWN, k=2, replacements=2, siblings=3)

    @rule(n=st.integers(1, 63), net=st.integers(0, 9), moved=st.booleans())
    def hear(self, n: int, net: int, moved: bool) -> None:
        self.table.seen(contact(n, f"8.8.{net if moved else n % 10}.{n}"), 0.0)

    @rule(n=st.integers(1, 63))
    def remove(self, n: int) -> None:
        self.table.remove(n)
        assert n not in [c.n for c in self.table.siblings()] or self.table.entry(n) is not None

    @rule(n=st.integers(1, 63))
    def fail(self, n: int) -> None:
        self.table.failed(n)

    @invariant()
    def holds(self) -> None:
        known = list(self.table.contacts())
        assert len(known) == len({c.n for c in known}) == len(self.table)
        assert max(Counter(c.subnet for c in known).values(), default=0) <= DHT_TABLE_PER_SUBNET
        assert len(self.table.siblings()) <= 3
        assert all(number(c.id) in {k.n for k in known} for c in self.table.siblings())
        assert +self.table._subnets == Counter(c.subnet for c in known)


TestSiblingMachine = SiblingMachine.TestCase
TestSiblingMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
