"""The DHT's requests and the records in its store (spec/09, spec/10)."""

from __future__ import annotations

import ipaddress
import time
from typing import Any

from tools.conformance.bench import Bench
from tools.conformance.codec import Pairs, Raw, pack, unpack
from tools.conformance.crypto import SMALL_ORDER, Identity, peer_id_of
from tools.conformance.peer import Peer
from tools.conformance.registry import case
from tools.conformance.verdicts import Skipped, require

PURPOSE = b"petalite record v1\0"
MINUTE = 60_000
STORED, KNOWN, MALFORMED, NETWORK, SIGNATURE, EXPIRED, FUTURE, OUTDATED, NOT_CLOSEST, QUOTA = range(10)


def now() -> int:
    return int(time.time() * 1000)


def sign(identity: Identity, payload: bytes) -> bytes:
    return identity.key.sign(PURPOSE + payload) + payload


def fields(bench: Bench, identity: Identity, key: bytes, **changes: Any) -> dict[str, Any]:
    made = {
        "net": bench.target.network.decode(), "key": key, "pub": identity.public, "seq": now(),
        "exp": now() + 5 * MINUTE, "val": {"x": 1},
    }  # fmt: skip
    return made | changes


def record(bench: Bench, identity: Identity, key: bytes, **changes: Any) -> bytes:
    return sign(identity, pack(fields(bench, identity, key, **changes)))


def node(bench: Bench, identity: Identity | None = None) -> Peer:
    """A connection to a target that is a DHT node. Raises Skipped for another."""
    peer = bench.peer(identity)
    if peer.call("dht.ping").code == "unsupported":
        raise Skipped("the target is no DHT node")
    return peer


def store(peer: Peer, *records: bytes) -> list[int]:
    found = (peer.ask("dht.store", {"records": list(records)}).head or {}).get("stored")
    require(type(found) is list and len(found) == len(records), f"expected: {len(records)} codes; observed: {found}")
    return list(found or [])


def read(peer: Peer, key: bytes, **more: Any) -> dict[str, Any]:
    found = peer.ask("dht.find_value", {"key": key} | more).head or {}
    records = found.get("records")
    require(type(records) is list and len(records) <= 10, f"records: {str(records)[:60]}")
    return dict(found)


def _codes(number: int, requirements: str, title: str, wanted: set[int], *make: Any) -> None:
    """Each record that `make(bench, identity, key)` gives earns one of these codes, and is not given out."""

    def run(bench: Bench) -> None:
        peer, key = node(bench), bench.rng.randbytes(32)
        for one in make:
            bad = one(bench, Identity(), key)
            code = store(peer, bad)[0]
            require(code in wanted, f"expected: code {sorted(wanted)}; observed: {code} for {bad[64:200]!r}")
        require(not read(peer, key)["records"], "a record that was refused is given out")

    case(f"dht/{number:03}", requirements, title=title)(run)


@case("dht/001", "PT-DHT-001 PT-FRM-012")
def ping(bench: Bench) -> None:
    """dht.ping is answered"""
    peer = node(bench)
    heads: list[dict[str, Any]] = [{}, {"client": True}, {"addrs": ["127.0.0.1:1"]}, {"later": 1}, {"addrs": []}]
    for head in heads:
        peer.ask("dht.ping", head)


@case("dht/002", "PT-DHT-020 PT-DHT-014 PT-DHT-011")
def find_node(bench: Bench) -> None:
    """dht.find_node gives at most 20 contacts of the right form, neither the asker nor the node itself"""
    identity = Identity()
    peer = node(bench, identity)
    for target in (bytes(32), b"\xff" * 32, identity.peer, bench.target.peer):
        contacts = (peer.ask("dht.find_node", {"target": target}).head or {}).get("contacts")
        require(type(contacts) is list and len(contacts) <= 20, f"contacts: {str(contacts)[:80]}")
        for contact in contacts or []:
            require(len(contact["id"]) == 32 and contact["addrs"], f"contact {contact}")
            require(contact["id"] not in (identity.peer, bench.target.peer), "the asker or the node itself is named")
            require(not any("%" in address for address in contact["addrs"]), f"an address with a scope: {contact}")


@case("dht/003", "PT-MSG-041 PT-MSG-040")
def bad_requests(bench: Bench) -> None:
    """Targets, keys, cursors and lists of wrong types or lengths: ERR bad_request"""
    peer = node(bench)
    wrong: list[tuple[str, dict[str, Any]]] = [
        *[("dht.find_node", {"target": target}) for target in (None, bytes(31), "t" * 32)],
        ("dht.find_node", {"target": bytes(32), "client": 1}),
        *[("dht.find_value", {"key": key}) for key in (None, bytes(33))],
        ("dht.find_value", {"key": bytes(32), "cursor": bytes(31)}),
        *[("dht.store", {"records": records}) for records in (None, ["r" * 70], bytes(70), [bytes(64)])],
    ]
    for method, head in wrong:
        peer.refused({"bad_request"}, method, head)
    peer.refused({"unsupported"}, "dht.ping", {"!x": 1})


@case("dht/004", "PT-REC-001 PT-REC-020 PT-REC-005 PT-DHT-028")
def stored_and_read(bench: Bench) -> None:
    """A record brought by another peer than its publisher is kept and given out, byte for byte"""
    key, publisher = bench.rng.randbytes(32), Identity()
    made = record(bench, publisher, key)
    require(store(node(bench), made) == [STORED], "a right record is not stored")
    found = read(node(bench), key)["records"]
    require(found == [made], f"expected: the record; observed: {str(found)[:80]}")


_codes(5, "PT-REC-004", "A record with a wrong signature: code 4", {SIGNATURE},
       lambda b, i, k: bytes(64) + record(b, i, k)[64:],
       lambda b, i, k: record(b, i, k)[:-1] + b"\2",
       lambda b, i, k: sign(Identity(), pack(fields(b, i, k))))  # fmt: skip
_codes(
    6, "PT-REC-004", "A record of another network: code 3", {NETWORK}, lambda b, i, k: record(b, i, k, net="elsewhere")
)
_codes(7, "PT-REC-012", "A record that has lapsed: code 5", {EXPIRED}, lambda b, i, k: record(b, i, k, exp=now() - 1),
       lambda b, i, k: record(b, i, k, exp=0))  # fmt: skip
_codes(8, "PT-REC-013", "A record that ends or is numbered too far ahead: code 6, nothing is clamped", {FUTURE},
       lambda b, i, k: record(b, i, k, exp=now() + 61 * MINUTE), lambda b, i, k: record(b, i, k, exp=2**62),
       lambda b, i, k: record(b, i, k, seq=now() + 11 * MINUTE))  # fmt: skip
_codes(9, "PT-REC-002 PT-REC-003 PT-MSG-031", "A payload that is no strict msgpack of six fields: code 2", {MALFORMED},
       lambda b, i, k: sign(i, pack(fields(b, i, k)) + b"\0"),
       lambda b, i, k: sign(i, pack(Pairs(*fields(b, i, k).items(), ("seq", 1)))),
       lambda b, i, k: sign(i, pack(fields(b, i, k, val=[1]))),
       lambda b, i, k: sign(i, pack(fields(b, i, k, seq=True))),
       lambda b, i, k: sign(i, pack(fields(b, i, k, exp=-1))),
       lambda b, i, k: sign(i, pack(fields(b, i, k, val={"x": Raw(b"\xca\0\0\0\0")}))),
       lambda b, i, k: sign(i, pack({n: v for n, v in fields(b, i, k).items() if n != "val"})),
       lambda b, i, k: sign(i, pack(fields(b, i, k) | {"!x": 1})),
       lambda b, i, k: sign(i, b"\xc1"))  # fmt: skip
_codes(10, "PT-REC-004 PT-IDN-006", "A record of a public key of small order: code 2 or 4", {MALFORMED, SIGNATURE},
       lambda b, i, k: bytes([1]) + bytes(63) + pack(fields(b, i, k, pub=SMALL_ORDER[1])))  # fmt: skip


@case("dht/011", "PT-REC-006 PT-REC-014")
def order(bench: Bench) -> None:
    """The same bytes again: code 1; a lower number, or the same with other bytes: code 7; a higher one wins"""
    peer, key, publisher = node(bench), bench.rng.randbytes(32), Identity()
    first = fields(bench, publisher, key)
    made = sign(publisher, pack(first))
    require(store(peer, made, made)[-1] == KNOWN, "the same bytes again are not code 1")
    older = sign(publisher, pack(first | {"seq": first["seq"] - 1}))
    other = sign(publisher, pack(first | {"val": {"x": 2}}))
    codes = store(peer, older, other)
    require(codes == [OUTDATED, OUTDATED], f"expected: codes 7 and 7; observed: {codes}")
    newer = sign(publisher, pack(first | {"seq": first["seq"] + 1, "val": {"x": 3}}))
    require(store(peer, newer) == [STORED] and read(peer, key)["records"] == [newer], "the higher number did not win")


@case("dht/012", "PT-REC-016 PT-REC-005")
def withdrawn(bench: Bench) -> None:
    """A withdrawal is kept and given out like any record; nobody can withdraw for another"""
    peer, key, publisher = node(bench), bench.rng.randbytes(32), Identity()
    made = record(bench, publisher, key)
    store(peer, made)
    forged = sign(Identity(), pack(fields(bench, publisher, key, val=None, seq=now() + 1_000)))
    stranger = record(bench, Identity(), key, val=None)
    require(store(peer, forged) == [SIGNATURE], "a forged withdrawal is not refused")
    store(peer, stranger)
    require(made in read(peer, key)["records"], "the record is gone after another's withdrawal")
    gone = record(bench, publisher, key, val=None, seq=now() + 2_000)
    require(store(peer, gone) == [STORED], "a withdrawal is not kept")
    found = read(peer, key)["records"]
    require(gone in found and made not in found, "the withdrawal is not given out in the place of the record")
    require(store(peer, made) == [OUTDATED], "the older record came back after its withdrawal")


@case("dht/013", "PT-DHT-028 PT-REC-020")
def several(bench: Bench) -> None:
    """Ten records earn ten codes in their order; eleven, and a payload above 1,000 bytes: ERR bad_request"""
    peer, key = node(bench), bench.rng.randbytes(32)
    good = [record(bench, Identity(), key) for _ in range(9)]
    codes = store(peer, *good[:4], bytes(64) + good[4][64:], *good[5:], good[0])
    require(codes == [0, 0, 0, 0, 4, 0, 0, 0, 0, 1], f"expected: codes in order; observed: {codes}")
    peer.refused({"bad_request"}, "dht.store", {"records": [good[0]] * 11})
    long = record(bench, Identity(), key, val={"x": bytes(1_000)})
    peer.refused({"bad_request"}, "dht.store", {"records": [long]})


@case("dht/014", "PT-DHT-029 PT-DHT-030 PT-DHT-028")
def pages(bench: Bench) -> None:
    """25 records of a key come in pages of ten at most, by ascending publisher, each once"""
    peer, key = node(bench), bench.rng.randbytes(32)
    made = [record(bench, Identity(), key) for _ in range(25)]
    for at in range(0, 25, 10):
        store(peer, *made[at : at + 10])
    seen: list[bytes] = []
    page = read(peer, key)
    while page.get("cursor") is not None:
        require(len(seen) < 40, "the pages do not end")
        seen += page["records"]
        page = read(peer, key, cursor=page["cursor"])
        require(not page.get("contacts"), "a later page holds contacts")
    seen += page["records"]
    require(sorted(seen) == sorted(made), f"expected: 25 records once each; observed: {len(seen)}")
    publishers = [_publisher(one) for one in seen]
    require(publishers == sorted(publishers), "the pages are not in the order of publishers")


def _publisher(one: bytes) -> bytes:
    return peer_id_of(unpack(one[64:])["pub"])


@case("dht/015", "PT-REC-022")
def quota_of_a_publisher(bench: Bench) -> None:
    """More than 64 records of one publisher: code 9"""
    publisher, codes = Identity(), []
    for _ in range(7):
        peer = node(bench)
        codes += store(peer, *[record(bench, publisher, bench.rng.randbytes(32)) for _ in range(10)])
    require(codes.count(STORED) <= 64, f"{codes.count(STORED)} records of one publisher were stored")
    require(set(codes) <= {STORED, QUOTA, NOT_CLOSEST}, f"codes {set(codes)}")


@case("dht/016", "PT-DHT-060", level="should")
def rate(bench: Bench) -> None:
    """400 requests at once by one peer: some are ERR rate, with the time to wait"""
    peer = node(bench)
    answers = []
    for _ in range(4):
        answers += [peer.send_request("dht.find_node", {"target": bench.rng.randbytes(32)}) for _ in range(100)]
        for answer in answers[-100:]:
            peer.wait(answer)
    limited = [answer for answer in answers if answer.code == "rate"]
    require(limited, "400 requests at once were all answered")
    require(type(limited[0].detail.get("after")) is int, f"detail.after: {limited[0].detail}")


@case("dht/017", "PT-DHT-010 PT-DHT-013 PT-DHT-012")
def addresses_of_askers(bench: Bench) -> None:
    """An asker that is a client, gives no address, or another's address is not passed on"""
    heads: list[dict[str, Any]] = [{"client": True, "addrs": ["127.0.0.1:4000"]}, {}, {"addrs": ["127.0.0.1:0"]}]
    if ipaddress.ip_address(bench.target.host).is_global:  # on a LAN a node may believe what it could dial
        heads.append({"addrs": ["8.8.8.8:4000"]})
    hidden = []
    for head in heads:
        identity = Identity()
        asker = node(bench, identity)
        asker.call("dht.find_node", {"target": bytes(32)} | head)
        hidden.append(identity.peer)
    for peer in hidden:
        contacts = (node(bench).ask("dht.find_node", {"target": peer}).head or {}).get("contacts") or []
        named = [contact for contact in contacts if contact["id"] == peer]
        require(not named, f"an asker that must not be named is: {named}")


@case("dht/018", "PT-REC-012 PT-REC-011", slow=True)
def lapses(bench: Bench) -> None:
    """A record is not given out any more once it has lapsed"""
    peer, key = node(bench), bench.rng.randbytes(32)
    store(peer, record(bench, Identity(), key, exp=now() + 3_000))
    require(read(peer, key)["records"], "a record with 3 s to live is not given out")
    time.sleep(4)
    require(not read(bench.peer(), key)["records"], "a record that has lapsed is given out")
