"""One node that never waits: what it answers, learns, asks and repeats (spec/09, "Node")."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest

from petalite.dht.contacts import Contact
from petalite.dht.core import Ask, Config, Core, Done, Peer, Self
from petalite.dht.ids import puzzle_bits
from petalite.dht.messages import FindNode, FindValue, Nodes, Ping, Pong, Request, Store, Stored, Values
from petalite.dht.operations import JoinResult, ReadResult, WriteResult
from petalite.dht.records import RecordError, StoreCode, make_record, read_record
from petalite.errors import ErrorCode, RequestError
from petalite.identity import Identity
from petalite.limits import DHT_BURST, DHT_K, DHT_MAX_TIMEOUT, DHT_RATE

NET = "net"
KEY = b"\x77" * 32
EPOCH = 1_700_000_000_000


def identity(i: int) -> Identity:
    return Identity.from_seed(i.to_bytes(32, "big"))


def host_of(i: int) -> str:
    return f"{20 + i % 60}.{i // 60}.7.1"


def make(i: int, **options: Any) -> Core:
    one = identity(i)
    config = options.pop("config", Config(NET))
    own = Self(one.peer_id, one.public_key, one.sign)
    core = Core(config, own, random.Random(i), addrs=(f"{host_of(i)}:1",), **options)
    core.wall_offset_ms = EPOCH
    return core


def contact_of(core: Core) -> Contact:
    return Contact(bytes(core.own.id), core.addrs)


def peer(i: int) -> Peer:
    return Peer(identity(i).peer_id, host_of(i), identity(i).public_key)


def named(count: int) -> tuple[Contact, ...]:
    return tuple(Contact(bytes([7, i]) * 16, (f"30.{i}.1.1:1",)) for i in range(count))


class Swarm:
    """Cores that answer each other at once; `deaf` ones never do."""

    def __init__(self, cores: list[Core]) -> None:
        self.cores = {contact_of(core).id: core for core in cores}
        self.deaf: set[bytes] = set()
        self.done: dict[int, Any] = {}
        self.asked: list[tuple[bytes, Request]] = []

    def settle(self, now: float, *cores: Core) -> None:
        todo = list(cores or self.cores.values())
        while todo:
            core = todo.pop()
            for effect in core.take():
                if isinstance(effect, Done):
                    self.done[effect.number] = effect.result
                    continue
                self.asked.append((effect.contact.id, effect.request))
                other = self.cores.get(effect.contact.id)
                if other is None or effect.contact.id in self.deaf:
                    core.failed(now, effect.number)
                else:
                    seen = Peer(core.own.id, core.addrs[0].rpartition(":")[0], core.own.public_key)
                    core.replied(now, effect.number, other.handle(now, seen, effect.request))
                todo.append(core)

    def join(self) -> None:
        cores = list(self.cores.values())
        for i, core in enumerate(cores[1:], 1):
            core.join(0.0, [contact_of(cores[0]), contact_of(cores[i - 1])])
            self.settle(0.0)


def grown(count: int) -> tuple[Swarm, list[Core]]:
    cores = [make(i) for i in range(1, count + 1)]
    swarm = Swarm(cores)
    swarm.join()
    return swarm, cores


# -------------------------------------------------------------------------------------------------------- answering


def test_stranger_enters_the_table_only_as_somebody_who_can_be_dialled() -> None:
    """PT-DHT-010, -011, -013"""
    core = make(1)
    core.handle(0.0, peer(2), Ping())
    core.handle(0.0, peer(3), Ping(addrs=(f"{host_of(3)}:1",), client=True))
    core.handle(0.0, peer(4), Ping(addrs=("9.9.9.9:1",)))
    assert len(core.table) == 0
    core.handle(0.0, peer(5), Ping(addrs=(f"{host_of(5)}:1",)))
    assert [c.id for c in core.table.contacts()] == [peer(5).id]


def test_asker_is_not_told_of_itself() -> None:
    """PT-DHT-020"""
    core = make(1)
    for i in range(2, 30):
        core.handle(0.0, peer(i), Ping(addrs=(f"{host_of(i)}:1",)))
    reply = core.handle(0.0, peer(2), FindNode(target=peer(2).id))
    assert isinstance(reply, Nodes) and len(reply.contacts) == DHT_K
    assert peer(2).id not in [c.id for c in reply.contacts]


def test_named_contacts_are_not_passed_on_before_they_were_met() -> None:
    """PT-DHT-011"""
    core = make(1)
    core.join(0.0, [contact_of(make(2))])
    (ask,) = core.take()
    assert isinstance(ask, Ask)
    core.replied(0.1, ask.number, Nodes(contacts=named(5)))
    reply = core.handle(0.2, peer(9), FindNode(target=KEY))
    assert isinstance(reply, Nodes) and [c.id for c in reply.contacts] == [peer(2).id]


def test_loopback_contacts_are_for_loopback_askers_and_lan_mode() -> None:
    """PT-DHT-012, PT-DHT-015, D05"""
    lan = make(1, config=Config(NET, lan=True))
    lan.handle(0.0, Peer(peer(2).id, "127.0.0.1"), Ping(addrs=("127.0.0.1:5",)))
    inside = lan.handle(0.0, Peer(peer(3).id, "127.0.0.1"), FindNode(target=KEY))
    outside = lan.handle(0.0, Peer(peer(4).id, "192.168.0.9"), FindNode(target=KEY))
    assert isinstance(inside, Nodes) and len(inside.contacts) == 1
    assert isinstance(outside, Nodes) and outside.contacts == ()
    public = make(1)
    public.join(0.0, [contact_of(make(2))])
    (ask,) = public.take()
    assert isinstance(ask, Ask)
    evil = [Contact(bytes([i]) * 32, (f"{host}:80",)) for i, host in enumerate(("127.0.0.1", "10.0.0.1", "224.0.0.1"))]
    public.replied(0.1, ask.number, Nodes(contacts=tuple(evil)))
    assert not {effect.contact for effect in public.take() if isinstance(effect, Ask)} & set(evil)


def test_peer_that_asks_too_much_hears_when_to_come_back_and_others_are_served() -> None:
    """PT-DHT-060, D25: 100,000 random targets a minute."""
    core = make(1)
    served = 0
    for i in range(100_000 // 60):
        try:
            core.handle(i * 0.0006, peer(2), FindNode(target=i.to_bytes(32, "big")))
            served += 1
        except RequestError as error:
            assert error.code is ErrorCode.RATE and error.detail["retry"] and 0 < error.detail["after"] <= 1000
    assert served <= DHT_BURST + DHT_RATE + 1
    assert isinstance(core.handle(1.0, peer(3), Ping()), Pong)


def test_flood_of_bad_and_superfluous_records_leaves_honest_askers_served() -> None:
    """D09, D11, D13, D17: 50 peers of 5 subnets send what is stale, forged, alien or too much, as fast as they may."""
    swarm, cores = grown(5)
    core = cores[0]
    cores[1].publish(0.0, KEY, {"honest": 1})
    swarm.settle(0.0)
    for i in range(600):
        owner = identity(1000 + i % 50)
        raw = make_record(
            NET, i.to_bytes(32, "big"), {}, seq=EPOCH, exp=EPOCH + (9000 if i % 2 else -1), public_key=owner.public_key,
            sign=owner.sign,
        )  # fmt: skip
        evil = Peer(owner.peer_id, f"66.6.{i % 5}.{i % 50}")
        core.handle(1.0, evil, Store(records=(raw, raw[:70], bytes(64) + raw[64:])))
    assert len(core.known.store) <= 5 * 256 + 1
    read = cores[2].read(2.0, KEY)
    swarm.settle(2.0)
    assert [record.val for record in swarm.done[read].records] == [{"honest": 1}]
    assert isinstance(core.handle(2.0, peer(9), FindNode(target=KEY)), Nodes)


def test_seeds_of_several_joins_are_all_tried_again() -> None:
    """PT-DHT-055"""
    core = make(1)
    for i in (2, 3):
        core.join(0.0, [contact_of(make(i))])
        core.take()
    tried: set[bytes] = set()
    for _ in range(12):
        now = core.timer()
        core.wake(now)
        tried |= {effect.contact.id for effect in core.take() if isinstance(effect, Ask)}
    assert tried == {peer(2).id, peer(3).id}


def test_keys_that_do_not_solve_the_puzzle_stay_out() -> None:
    """PT-DHT-070"""
    core = make(1, config=Config(NET, puzzle=3))
    worthy = next(i for i in range(2, 200) if puzzle_bits(identity(i).public_key) >= 3)
    lazy = next(i for i in range(2, 200) if puzzle_bits(identity(i).public_key) < 3)
    for i in (worthy, lazy):
        core.handle(0.0, peer(i), Ping(addrs=(f"{host_of(i)}:1",)))
    assert [c.id for c in core.table.contacts()] == [peer(worthy).id]


def test_store_answers_each_record_with_its_code() -> None:
    """PT-REC-020"""
    core = make(1)
    owner = identity(2)
    good = make_record(
        NET, KEY, {}, seq=EPOCH, exp=EPOCH + 9000, public_key=owner.public_key, sign=owner.sign
    )  # fmt: skip
    alien = make_record(
        "else", KEY, {}, seq=EPOCH, exp=EPOCH + 9000, public_key=owner.public_key, sign=owner.sign
    )  # fmt: skip
    records = (good, good, alien, good[:-1], b"\0" * 70)
    reply = core.handle(0.0, peer(2), Store(records=records))
    assert isinstance(reply, Stored)
    assert [StoreCode(code).name for code in reply.codes] == ["STORED", "KNOWN", "NETWORK", "MALFORMED", "MALFORMED"]


def test_forged_tombstone_removes_nothing() -> None:
    """PT-REC-005, D27"""
    core = make(1)
    owner, thief = identity(2), identity(3)
    times = {"seq": EPOCH, "exp": EPOCH + 9000}
    core.handle(0.0, peer(2), Store(records=(
        make_record(NET, KEY, {"a": 1}, **times, public_key=owner.public_key, sign=owner.sign),
    )))  # fmt: skip
    forged = make_record(
        NET, KEY, None, seq=EPOCH + 1, exp=EPOCH + 9000, public_key=owner.public_key, sign=thief.sign
    )  # fmt: skip
    assert core.handle(0.0, peer(3), Store(records=(forged,))) == Stored(codes=(StoreCode.SIGNATURE,))
    reply = core.handle(0.0, peer(4), FindValue(key=KEY))
    assert isinstance(reply, Values) and read_record(reply.records[0], NET).val == {"a": 1}


def test_node_far_from_a_key_does_not_take_it() -> None:
    """PT-REC-021"""
    _, cores = grown(80)
    order = sorted(cores, key=lambda core: core.n ^ int.from_bytes(KEY, "big"))
    for core in cores:
        assert core.known.is_ours(100.0, int.from_bytes(KEY, "big")) or core not in order[:DHT_K]
    far = order[-1]
    assert far.known.size(100.0) > 50 and not far.known.is_ours(100.0, int.from_bytes(KEY, "big"))


# ----------------------------------------------------------------------------------------------- reading and writing


def test_value_written_by_one_is_read_by_all_and_gone_after_withdrawal() -> None:
    """PT-DHT-058, PT-REC-016, PT-REC-031"""
    swarm, cores = grown(12)
    written = cores[3].publish(1.0, KEY, {"span": [0, 4]})
    swarm.settle(1.0)
    result = swarm.done[written]
    assert isinstance(result, WriteResult) and len(result.holders) == 11
    for core in cores:
        read = core.read(2.0, KEY)
        swarm.settle(2.0)
        found = swarm.done[read]
        assert isinstance(found, ReadResult) and found.quorum
        assert [record.val for record in found.records] == [{"span": [0, 4]}]
    cores[3].leave(3.0)
    swarm.settle(3.0)
    read = cores[5].read(4.0, KEY)
    swarm.settle(4.0)
    assert [record.val for record in swarm.done[read].records] == [None]


def test_signature_of_a_record_is_checked_once_and_its_times_each_time() -> None:
    checked: list[bytes] = []

    def verify(public_key: bytes, signature: bytes, message: bytes) -> bool:
        checked.append(message)
        return True

    core, owner = make(1, verify=verify), identity(3)
    raw = make_record(
        NET, KEY, {}, seq=EPOCH, exp=EPOCH + 9000, public_key=owner.public_key, sign=owner.sign
    )  # fmt: skip
    for _ in range(5):
        assert core.known.check(KEY, raw, EPOCH).val == {}
    assert len(checked) == 1
    with pytest.raises(RecordError):
        core.known.check(KEY, raw, EPOCH + 9000)


def test_publishers_of_one_key_do_not_hide_each_other() -> None:
    """PT-DHT-029, PT-REC-015: more of them than fit on two pages: every page is asked for."""
    swarm, cores = grown(25)
    for core in cores:
        core.publish(1.0, KEY, {})
    swarm.settle(1.0)
    read = cores[0].read(2.0, KEY)
    swarm.settle(2.0)
    assert {bytes(r.publisher) for r in swarm.done[read].records} == set(swarm.cores)


def test_publication_is_repeated_before_a_third_of_its_expiry_and_not_after_leaving() -> None:
    """PT-REC-030"""
    swarm, (first, second) = grown(2)
    first.publish(0.0, KEY, {"v": 1}, expiry=600.0)
    swarm.settle(0.0)
    at = min(publication.at for publication in first._publications.values())
    assert 180.0 <= at <= 200.0
    old = second.handle(at, peer(9), FindValue(key=KEY))
    first.wake(at)
    swarm.settle(at)
    new = second.handle(at, peer(9), FindValue(key=KEY))
    assert isinstance(old, Values) and isinstance(new, Values)
    before, after = read_record(old.records[0], NET), read_record(new.records[0], NET)
    assert after.seq > before.seq and after.exp >= before.exp + 180_000
    first.leave(at)
    assert first._publications == {} and first.timer() >= at


def test_publication_that_nobody_took_is_offered_again_soon() -> None:
    """PT-REC-032"""
    alone = make(1)
    alone.publish(0.0, KEY, {})
    assert [type(effect) for effect in alone.take()] == [Done]
    assert alone.timer() <= 10.0


def test_absence_without_three_answers_is_no_quorum() -> None:
    """PT-DHT-054"""
    swarm, cores = grown(30)
    swarm.deaf = {contact_of(core).id for core in cores[1:]}
    read = cores[0].read(1.0, KEY)
    swarm.settle(1.0)
    assert swarm.done[read].records == () and not swarm.done[read].quorum


@pytest.mark.parametrize("lie", ["other key", "forged"])
def test_peer_that_gives_false_records_is_marked_and_then_dropped(lie: str) -> None:
    """PT-DHT-024, D19"""
    core = make(1)
    owner = identity(3)
    core.handle(0.0, peer(2), Ping(addrs=(f"{host_of(2)}:1",)))
    other = make_record(
        NET, b"\x01" * 32, {}, seq=EPOCH, exp=EPOCH + 9000, public_key=owner.public_key, sign=owner.sign
    )  # fmt: skip
    lies = (other,) if lie == "other key" else (bytes(64) + other[64:],)
    for _ in range(3):
        assert len(core.table) == 1
        core.read(1.0, KEY)
        for effect in core.take():
            if isinstance(effect, Ask):
                core.replied(1.0, effect.number, Values(records=lies))
        results = [effect.result for effect in core.take() if isinstance(effect, Done)]
        assert [result.records for result in results if isinstance(result, ReadResult)] == [()]
    assert len(core.table) == 0
    core.handle(2.0, peer(2), Ping(addrs=(f"{host_of(2)}:1",)))
    assert len(core.table) == 0
    core.handle(700.0, peer(2), Ping(addrs=(f"{host_of(2)}:1",)))
    assert len(core.table) == 1


def test_peer_that_answers_lookups_but_never_reads_is_dropped() -> None:
    """PT-DHT-025, D23"""
    core = make(1)
    core.handle(0.0, peer(2), Ping(addrs=(f"{host_of(2)}:1",)))
    for i in range(3):
        assert len(core.table) == 1
        core.lookup(float(i), KEY)
        (ask,) = [effect for effect in core.take() if isinstance(effect, Ask)]
        core.replied(float(i), ask.number, Nodes(contacts=()))
        core.take()
        core.read(float(i), KEY)
        (ask,) = [effect for effect in core.take() if isinstance(effect, Ask)]
        core.refused(float(i), ask.number, ErrorCode.INTERNAL)
        core.take()
    assert len(core.table) == 0


def test_endless_pages_end() -> None:
    """PT-DHT-031"""
    core = make(1)
    core.handle(0.0, peer(2), Ping(addrs=(f"{host_of(2)}:1",)))
    core.connected = lambda peer_id: True
    read, pages = core.read(1.0, KEY), 0
    while True:
        effects = core.take()
        if any(isinstance(effect, Done) and effect.number == read for effect in effects):
            break
        for effect in effects:
            assert isinstance(effect, Ask)
            pages += 1
            core.replied(1.0, effect.number, Values(records=(), cursor=pages.to_bytes(32, "big")))
    assert pages == 32


# ------------------------------------------------------------------------------------------------------------- time


def test_silence_is_first_slow_then_failure() -> None:
    """PT-DHT-033, -034"""
    core = make(1)
    core.join(0.0, [contact_of(make(2))])
    (ask,) = core.take()
    assert isinstance(ask, Ask) and ask.seconds == DHT_MAX_TIMEOUT
    assert core.timer() == 1.0  # nothing measured yet
    core.wake(1.0)
    (done,) = core.take()
    assert isinstance(done, Done) and done.result == JoinResult(answered=0, asked=1)
    assert 1.0 < core.timer() <= DHT_MAX_TIMEOUT
    core.replied(1.5, ask.number, Nodes(contacts=()))  # late, and still proof of life
    assert peer(2).id in core.table


def test_join_that_nobody_answers_is_tried_again_with_rising_waits() -> None:
    """PT-DHT-056"""
    core = make(1)
    core.join(0.0, [contact_of(make(2))])
    tries, now = [], 0.0
    while len(tries) < 9:
        for effect in core.take():
            if isinstance(effect, Ask):
                tries.append(now)
        now = core.timer()
        core.wake(now)
    gaps = [b - a for a, b in pairwise(tries)]
    assert gaps[0] < 4 and 48 < max(gaps) < 80


def test_failing_address_is_left_alone_for_a_while() -> None:
    """PT-DHT-062, D07"""
    core = make(1)
    victim = Contact(b"\x05" * 32, ("9.9.9.9:80",))
    dials = []
    for second in range(600):
        now = float(second)
        core.join(now, [victim])
        for effect in core.take():
            if isinstance(effect, Ask):
                dials.append(now)
                core.failed(now, effect.number)
        core.take()
    assert len(dials) <= 7


def test_dials_to_one_host_are_bounded_however_many_ids_are_named() -> None:
    core = make(1)
    dials = 0
    for i in range(300):
        core.join(0.0, [Contact(i.to_bytes(32, "big"), (f"9.9.9.9:{i + 1}",))])
        dials += sum(isinstance(effect, Ask) for effect in core.take())
    assert dials == 20


def test_oldest_contact_is_pinged_before_a_newcomer_takes_its_place() -> None:
    core = make(1)
    others = [i for i in range(2, 400) if (int.from_bytes(peer(i).id, "big") ^ core.n) >> 255]
    for i in others[: DHT_K + 1]:
        core.handle(0.0, peer(i), Ping(addrs=(f"{host_of(i)}:1",)))
    assert core.take() == []
    core.handle(400.0, peer(others[DHT_K]), Ping(addrs=(f"{host_of(others[DHT_K])}:1",)))
    (ask,) = core.take()
    assert isinstance(ask, Ask) and isinstance(ask.request, Ping) and ask.contact.id == peer(others[0]).id
    core.failed(403.0, ask.number)
    assert peer(others[0]).id not in core.table and peer(others[DHT_K]).id in core.table


def test_same_inputs_give_the_same_effects() -> None:
    def effects() -> list[str]:
        swarm, cores = grown(15)
        cores[2].publish(1.0, KEY, {})
        swarm.settle(1.0)
        for core in cores:
            core.wake(min(50.0, core.timer()))
        return [repr(effect) for core in cores for effect in core.take()] + [repr(swarm.asked)]

    assert effects() == effects()
