"""The lookup against a plain twin and against liars (spec/09, "Lookup")."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.dht.contacts import Contact
from petalite.dht.lookup import Lookup
from petalite.limits import DHT_K, DHT_MAX_ASKED

OWN = (1 << 256) - 1
Answer = Callable[[int], list[Contact] | None]


def contact(n: int, host: str = "") -> Contact:
    host = host or f"{20 + n % 70}.{n // 70 % 250}.{n // 17500 % 250}.1"
    return Contact(n.to_bytes(32, "big"), (f"{host}:1",))


class World:
    """Peers that each know some others; `ask` gives what an honest one answers, None for a dead one."""

    def __init__(self, seed: int, count: int, dead: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.ids = [self.rng.getrandbits(256) for _ in range(count)]
        self.dead = set(self.rng.sample(self.ids, int(dead * count)))
        self.contacts = {n: contact(n, f"{20 + i // 200}.{i % 200}.1.1") for i, n in enumerate(self.ids)}
        self.tables = {n: self._table(n) for n in self.ids}

    def _table(self, own: int) -> list[int]:
        buckets: dict[int, list[int]] = {}
        for n in self.rng.sample(self.ids, len(self.ids)):
            bucket = buckets.setdefault((n ^ own).bit_length(), [])
            if n != own and len(bucket) < 8:
                bucket.append(n)
        return [n for bucket in buckets.values() for n in bucket]

    def ask(self, n: int, target: int) -> list[Contact] | None:
        if n in self.dead:
            return None
        return [self.contacts[m] for m in sorted(self.tables[n], key=target.__xor__)[:DHT_K]]


def drive(lookup: Lookup, answer: Answer, rng: random.Random, most: int = 10_000) -> list[int]:
    """Answer in random order until the lookup is done; the ids asked, in order."""
    waiting: list[int] = []
    asked: list[int] = []
    while True:
        new = [c.n for c in lookup.next()]
        waiting += new
        asked += new
        assert len(asked) <= most
        if not waiting:
            assert lookup.done and not lookup.next()
            return asked
        assert not lookup.done
        n = waiting.pop(rng.randrange(len(waiting)))
        reply = answer(n)
        if reply is None:
            lookup.slow(n)
            lookup.failed(n)
        else:
            lookup.replied(n, reply)


def plain_lookup(world: World, target: int, start: list[int]) -> list[int]:
    """The oracle: ask everybody who is ever named, sort all that live."""
    known, todo = set(start), list(start)
    while todo:
        for c in world.ask(todo.pop(), target) or []:
            if c.n not in known:
                known.add(c.n)
                todo.append(c.n)
    return sorted(known - world.dead, key=target.__xor__)


@given(st.integers(0, 10**6), st.sampled_from([1, 4]), st.sampled_from([0.0, 0.2]))
@settings(max_examples=25, deadline=None)
def test_lookup_finds_what_asking_everybody_finds(seed: int, paths: int, dead: float) -> None:
    world = World(seed, 120, dead)
    target = world.rng.getrandbits(256)
    start = sorted(world.tables[world.ids[0]], key=target.__xor__)[:DHT_K]
    lookup = Lookup(target, OWN, [world.contacts[n] for n in start], paths=paths)
    asked = drive(lookup, lambda n: world.ask(n, target), world.rng)
    assert len(asked) == len(set(asked)) == lookup.asked
    found = [c.n for c in lookup.nearest(DHT_K)]
    right = plain_lookup(world, target, start)[:DHT_K]
    assert found[0] == right[0]
    # with a fifth of the contacts dead, some peers are named by dead ones only
    assert len(set(found) & set(right)) >= (DHT_K * 0.7 if dead else DHT_K - 1)


def test_an_answer_never_ends_a_lookup() -> None:
    """PT-DHT-032: the very first answer is from the nearest peer there is, and all the other k are asked still."""
    peers = [contact(n) for n in range(1, 31)]
    lookup = Lookup(0, OWN, peers[:3])
    asked = drive(lookup, lambda n: peers[:DHT_K], random.Random(1))
    assert set(asked) >= set(range(1, DHT_K + 1))


def test_slow_peer_frees_its_place_and_may_still_answer() -> None:
    """PT-DHT-033"""
    lookup = Lookup(0, OWN, [contact(n) for n in (1, 2, 3, 4)], alpha=3)
    assert [c.n for c in lookup.next()] == [1, 2, 3]
    assert lookup.next() == []
    lookup.slow(1)
    assert [c.n for c in lookup.next()] == [4]
    for n in (2, 3, 4):
        lookup.failed(n)
    lookup.replied(1, [])
    assert lookup.next() == [] and lookup.done and [c.n for c in lookup.nearest(5)] == [1]


def test_answers_of_peers_that_were_not_asked_do_nothing() -> None:
    lookup = Lookup(0, OWN, [contact(1)])
    lookup.replied(1, [contact(2)])
    lookup.replied(9, [contact(3)])
    lookup.failed(1)
    assert [c.n for c in lookup.next()] == [1]
    lookup.replied(1, [])
    lookup.replied(1, [contact(2)])  # twice: the second is not heard
    assert lookup.next() == []


def test_reply_is_read_up_to_k_contacts_and_own_id_is_never_asked() -> None:
    """D03"""
    lookup = Lookup(0, OWN, [contact(1 << 200)])
    lookup.next()
    lookup.replied(1 << 200, [contact(OWN), *(contact(n) for n in range(1, 100))])
    asked = drive(lookup, lambda n: [], random.Random(1))
    assert sorted(asked) == list(range(1, DHT_K))


def test_open_connections_come_first_among_equals_only() -> None:
    """PT-DHT-039"""
    near, far_open, far_shut = contact(1), contact(0b1011), contact(0b1000)
    lookup = Lookup(0, OWN, [near, far_open, far_shut], alpha=1, connected=lambda i: i == far_open.id)
    assert lookup.next() == [near]
    lookup.failed(1)
    assert lookup.next() == [far_open]


def test_one_address_is_asked_once_and_a_subnet_twice_before_the_rest() -> None:
    """PT-DHT-035, D07: contacts of many ids at one victim."""
    victims = [contact(n, "9.9.9.9") for n in range(1, 16)]
    same_net = [contact(n, f"8.8.8.{n}") for n in range(16, 24)]
    others = [contact(1000 + n) for n in range(DHT_K)]
    lookup = Lookup(0, OWN, [*victims, *same_net, *others], k=DHT_K)
    asked = drive(lookup, lambda n: [], random.Random(1))
    assert sum(n < 16 for n in asked) == 1
    assert sum(16 <= n < 24 for n in asked) == 2
    lan = Lookup(0, OWN, [*victims, *same_net], diverse=False)
    assert len(drive(lan, lambda n: [], random.Random(1))) >= DHT_K


@pytest.mark.parametrize("paths", [1, 4])
def test_liar_who_names_made_up_peers_costs_two_questions(paths: int) -> None:
    """PT-DHT-036"""
    honest = [contact((1 << 250) + n) for n in range(30)]
    liar = contact((1 << 250) + 99)
    lies = {n: contact(n) for n in range(1, 21)}

    def answer(n: int) -> list[Contact] | None:
        if n in lies:
            return None
        return list(lies.values()) if n == liar.n else honest[:DHT_K]

    lookup = Lookup(0, OWN, [liar, *honest[:5]], paths=paths)
    asked = drive(lookup, answer, random.Random(3))
    assert sum(n in lies for n in asked) == 2
    assert [c.n for c in lookup.nearest(DHT_K)] == sorted([c.n for c in honest[:DHT_K]])


def test_own_contacts_are_heard_even_when_the_first_three_lie() -> None:
    """PT-DHT-037: three liars name twenty live friends nearer to the target than anybody honest we know."""
    gang = [contact(n) for n in range(1, 60)]
    known = [contact((1 << 250) + n) for n in range(10)]
    true_nearest = contact(0)

    def answer(n: int) -> list[Contact]:
        liars = {c.n for c in gang} | {c.n for c in known[:3]}
        return gang[:DHT_K] if n in liars else [true_nearest]

    lookup = Lookup(0, OWN, known)
    drive(lookup, answer, random.Random(1))
    assert lookup.nearest(1) == [true_nearest]


def test_disjoint_paths_do_not_share_what_one_of_them_heard() -> None:
    """PT-DHT-038: each of four first contacts leads to a chain of its own; all four ends are reached."""
    chains = [[contact((1 << 200 >> (8 * step)) + path) for step in range(5)] for path in range(4)]
    after = {chain[i].n: chain[i + 1] for chain in chains for i in range(4)}
    lookup = Lookup(0, OWN, [chain[0] for chain in chains], paths=4)
    drive(lookup, lambda n: [after[n]] if n in after else [], random.Random(1))
    assert {c.n for c in lookup.nearest(DHT_K)} == {c.n for chain in chains for c in chain}


def test_region_is_asked_to_its_edge() -> None:
    """PT-DHT-050"""
    peers = [contact(n) for n in range(1, 100)]
    asked = drive(Lookup(0, OWN, peers, within=60), lambda n: [], random.Random(1))
    assert sorted(asked) == list(range(1, 61))


def test_lookup_is_bounded_whatever_is_named() -> None:
    """PT-DHT-040"""
    rng = random.Random(5)

    def answer(n: int) -> list[Contact]:
        return [contact(rng.getrandbits(max(1, n.bit_length() - 1)) | 1) for _ in range(DHT_K)]

    start = [contact(rng.getrandbits(256)) for _ in range(DHT_K)]
    lookup = Lookup(0, OWN, start, paths=4, within=1 << 255)
    drive(lookup, answer, rng)
    assert lookup.asked <= DHT_MAX_ASKED


def test_hops_count_who_named_whom() -> None:
    lookup = Lookup(0, OWN, [contact(8)])
    drive(lookup, lambda n: [contact(n >> 1)] if n > 1 else [], random.Random(1))
    assert lookup.hops() == 4
