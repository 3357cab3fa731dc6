"""The DHT's messages as literal bytes, and what is refused (spec/09, "Messages")."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.dht.contacts import Contact
from petalite.dht.messages import (
    METHOD_OF,
    METHODS,
    FindNode,
    FindValue,
    Nodes,
    Ping,
    Pong,
    Reply,
    Request,
    Store,
    Stored,
    Values,
    reply_from_map,
    request_from_map,
    to_map,
)
from petalite.errors import ErrorCode, RemoteProtocolError, RequestError
from petalite.limits import DHT_K, MAX_HEAD_FRAME
from petalite.wire.packing import decode, encode

ID = b"\x22" * 32
RECORD = b"\x33" * 65
CONTACT = Contact(ID, ("8.8.8.8:31337",))
ASK = FindNode(target=ID)

REQUESTS: list[tuple[Request, str]] = [
    (Ping(), "80"),
    (Ping(addrs=("8.8.8.8:1",), client=True), "82a5616464727391a9382e382e382e383a31a6636c69656e74c3"),
    (FindNode(target=ID), "81a6746172676574c420" + "22" * 32),
    (FindValue(key=ID), "81a36b6579c420" + "22" * 32),
    (FindValue(key=ID, cursor=ID), "82a36b6579c420" + "22" * 32 + "a6637572736f72c420" + "22" * 32),
    (Store(records=(RECORD,)), "81a77265636f72647391c441" + "33" * 65),
]
CONTACT_HEX = "82a26964c420" + "22" * 32 + "a5616464727391ad382e382e382e383a3331333337"
REPLIES: list[tuple[Request, Reply, str]] = [
    (Ping(), Pong(), "80"),
    (ASK, Nodes(contacts=()), "81a8636f6e746163747390"),
    (ASK, Nodes(contacts=(CONTACT,)), "81a8636f6e746163747391" + CONTACT_HEX),
    (FindValue(key=ID), Values(records=(RECORD,)), "81a77265636f72647391c441" + "33" * 65),
    (
        FindValue(key=ID),
        Values(records=(), contacts=(CONTACT,), cursor=ID),
        "83a77265636f72647390a8636f6e746163747391" + CONTACT_HEX + "a6637572736f72c420" + "22" * 32,
    ),
    (Store(records=(RECORD, RECORD)), Stored(codes=(0, 7)), "81a673746f726564920007"),
]


@pytest.mark.parametrize(("message", "wire"), REQUESTS)
def test_requests_are_these_bytes(message: Request, wire: str) -> None:
    assert encode(to_map(message)).hex() == wire
    assert request_from_map(METHOD_OF[type(message)], decode(bytes.fromhex(wire))) == message


@pytest.mark.parametrize(("request_", "message", "wire"), REPLIES)
def test_replies_are_these_bytes(request_: Request, message: Reply, wire: str) -> None:
    assert encode(to_map(message)).hex() == wire
    assert reply_from_map(request_, decode(bytes.fromhex(wire))) == message


@pytest.mark.parametrize(
    ("method", "fields", "code"),
    [
        ("dht.find_node", {}, ErrorCode.BAD_REQUEST),
        ("dht.find_node", {"target": ID[:31]}, ErrorCode.BAD_REQUEST),
        ("dht.find_node", {"target": "x" * 32}, ErrorCode.BAD_REQUEST),
        ("dht.find_node", {"target": ID, "addrs": ["1.1.1.1:1"] * 5}, ErrorCode.BAD_REQUEST),
        ("dht.find_node", {"target": ID, "addrs": ["x" * 57]}, ErrorCode.BAD_REQUEST),
        ("dht.find_node", {"target": ID, "client": 1}, ErrorCode.BAD_REQUEST),
        ("dht.find_node", {"target": ID, "!hard": 1}, ErrorCode.UNSUPPORTED),
        ("dht.find_value", {"key": ID, "cursor": b""}, ErrorCode.BAD_REQUEST),
        ("dht.store", {"records": [RECORD] * 11}, ErrorCode.BAD_REQUEST),
        ("dht.store", {"records": [b"\0" * 64]}, ErrorCode.BAD_REQUEST),
        ("dht.store", {"records": [b"\0" * 1065]}, ErrorCode.BAD_REQUEST),
        ("dht.store", {"records": RECORD}, ErrorCode.BAD_REQUEST),
        ("dht.none", {}, ErrorCode.UNSUPPORTED),
    ],
)
def test_bad_request_costs_that_request(method: str, fields: dict[str, Any], code: ErrorCode) -> None:
    with pytest.raises(RequestError) as caught:
        request_from_map(method, fields)
    assert caught.value.code is code


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        (ASK, {"contacts": [1]}),
        (ASK, {"contacts": [{"id": ID}]}),
        (ASK, {"contacts": [{"id": ID[:5], "addrs": ["8.8.8.8:1"]}]}),
        (ASK, {"contacts": {}}),
        (FindValue(key=ID), {}),
        (FindValue(key=ID), {"records": [], "cursor": "x"}),
        (Store(records=(RECORD,)), {"stored": [0, 0]}),
        (Store(records=(RECORD,)), {"stored": [True]}),
        (Store(records=(RECORD,)), {"stored": [256]}),
        (Ping(), {"!hard": 1}),
    ],
)
def test_bad_reply_is_a_breach(request_: Request, fields: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        reply_from_map(request_, fields)


def test_contacts_beyond_k_are_cut_and_noted() -> None:
    """PT-DHT-027, D03"""
    named = [{"id": i.to_bytes(32, "big"), "addrs": ["8.8.8.8:1"]} for i in range(1000)]
    reply = reply_from_map(ASK, {"contacts": named})
    assert isinstance(reply, Nodes) and len(reply.contacts) == DHT_K and reply.excess


def test_contact_that_makes_no_sense_is_left_out_without_the_rest() -> None:
    """PT-DHT-014, D05"""
    bad = ["name:1", "8.8.8.8:70000", "[fe80::1%eth0]:1", "8.8.8.8"]
    named = [{"id": bytes([i]) * 32, "addrs": [text]} for i, text in enumerate(bad)]
    named += [{"id": b"\x55" * 32, "addrs": []}, {"id": ID, "addrs": ["8.8.8.8:31337"], "new": 1}]
    assert reply_from_map(ASK, {"contacts": named}) == Nodes(contacts=(CONTACT,))


def test_the_largest_reply_fits_a_head() -> None:
    """PT-DHT-028"""
    long = tuple(f"[2a00:1450:4001:82f:ffff:ffff:ffff:{i:04x}]:65535" for i in range(0xEEEE, 0xEEF2))
    contacts = tuple(Contact(bytes([i]) * 32, long) for i in range(DHT_K))
    reply = Values(records=(b"\0" * 1064,) * 10, contacts=contacts, cursor=ID)
    assert len(encode(to_map(reply))) <= MAX_HEAD_FRAME - 32  # array, type, stream id, flags


@given(st.sampled_from(sorted(METHODS)), st.dictionaries(st.text(max_size=8), st.integers() | st.binary() | st.none()))
def test_any_map_is_a_request_or_a_request_error(method: str, fields: dict[str, Any]) -> None:
    for known in ("target", "key", "records", "addrs"):
        for value in (1, [], [b"x"], "x"):
            try:
                request_from_map(method, fields | {known: value})
            except RequestError:
                pass
