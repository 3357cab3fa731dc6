"""The handshake, role against role, role against a hand-built peer, and every input that must be refused.

`RawPeer` is the oracle: it knows PT-TRN-010 to PT-TRN-032 in its own words and shares only `HandshakeState`, which
test_noise.py holds against published vectors. Names `hNN` are rows of the table of hostile inputs in spec/01.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite import limits
from petalite.errors import HandshakeError, LocalProtocolError, RemoteProtocolError
from petalite.identity import Identity, PeerId, SwarmKey
from petalite.wire import certificate
from petalite.wire.handshake import Established, Handshake, Role
from petalite.wire.noise import HandshakeState, KeyPair

ALICE = Identity.from_seed(bytes([1]) * 32)  # dials
BOB = Identity.from_seed(bytes([2]) * 32)  # is dialled
CAROL = Identity.from_seed(bytes([3]) * 32)
KEY = SwarmKey(bytes([7]) * 32)
OTHER_KEY = SwarmKey(bytes([8]) * 32)
NOW = 1_700_000_000
DAY = 24 * 3600
INITIATOR, RESPONDER = Role.INITIATOR, Role.RESPONDER

LOW_ORDER = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


def fixed(*seeds: int) -> Callable[[int], bytes]:
    values: Iterator[int] = iter(seeds)
    return lambda size: bytes([next(values)]) * size


def side(role: Role, key: SwarmKey | None = None, **changes: Any) -> Handshake:
    """One side with fixed keys; the initiator is Alice and expects Bob, the responder is Bob and takes anybody."""
    dials = role is INITIATOR
    arguments: dict[str, Any] = {
        "identity": ALICE if dials else BOB,
        "network": key.network_id if key else "petalite",
        "swarm_key": key,
        "expected": BOB.peer_id if dials else None,
        "now": NOW,
        "random": fixed(0x11, 0x12) if dials else fixed(0x21, 0x22),
    }
    return Handshake(role, **(arguments | changes))


def pump(initiator: Handshake, responder: Handshake, chunk: int = 4096) -> None:
    """Carry bytes both ways in pieces until both are silent."""
    sides = (initiator, responder)
    while any((data := a.data_to_send()) and not feed(b, data, chunk) for a, b in (sides, sides[::-1])):
        pass


def feed(handshake: Handshake, data: bytes, chunk: int) -> None:
    for start in range(0, len(data), chunk):
        handshake.receive_data(data[start : start + chunk])


def done(handshake: Handshake) -> Established:
    assert handshake.result is not None
    return handshake.result


def refused(handshake: Handshake, data: bytes, match: str = ".", chunk: int = 4096) -> str:
    """`data` is refused, silently and for good, with a one-line local text; returns the text."""
    with pytest.raises(HandshakeError, match=match) as caught:
        feed(handshake, data, chunk)
        handshake.receive_data(b"")
    assert handshake.data_to_send() == b""
    assert handshake.result is None
    assert "\n" not in str(caught.value)
    with pytest.raises(HandshakeError):
        handshake.receive_data(b"x")
    assert handshake.data_to_send() == b""
    return str(caught.value)


class RawPeer:
    """A peer whose every part can be wrong: preamble, prologue, psk, payloads."""

    def __init__(
        self,
        role: Role,
        key: SwarmKey | None = None,
        network: bytes | None = None,
        pattern: int | None = None,
        psks: tuple[bytes, ...] | None = None,
    ) -> None:
        self.network = network if network is not None else (key.network_id if key else "petalite").encode()
        self.preamble = b"PTLT\x01" + bytes([pattern or (2 if key else 1)])
        self.identity = ALICE if role is INITIATOR else BOB
        self.static = KeyPair.from_private(bytes([0x31]) * 32)
        self.noise = HandshakeState(
            f"Noise_XX{'psk0+psk3' if key else ''}_25519_ChaChaPoly_SHA256",
            initiator=role is INITIATOR,
            prologue=self.preamble + bytes([len(self.network)]) + self.network,
            random=fixed(0x32),
            s=self.static,
            psks=psks if psks is not None else (key.psk, key.psk) if key else (),
        )

    def message(self, payload: bytes = b"") -> bytes:
        message = self.noise.write_message(payload)
        return len(message).to_bytes(2, "big") + message

    def read(self, framed: bytes) -> bytes:
        assert int.from_bytes(framed[:2], "big") == len(framed) - 2
        return self.noise.read_message(framed[2:])

    def certificate(self, **changes: Any) -> bytes:
        """A right certificate, or one signed over the changed x, static key, network or purpose."""
        a: dict[str, Any] = {
            "x": NOW + DAY,
            "static": self.static.public,
            "network": self.network,
            "purpose": b"petalite noise static key v1\x00",
            "identity": self.identity,
        } | changes
        length = len(a["network"]).to_bytes(2, "big")
        signature = a["identity"].sign(a["purpose"] + length + a["network"] + a["static"] + a["x"].to_bytes(8, "big"))
        return bytes(msgpack.packb({"k": a["identity"].public_key, "x": a["x"], "s": signature}))


def answer_of(payload: bytes, **changes: Any) -> tuple[Handshake, bytes]:
    """An initiator and a message 2 to it that carries `payload`."""
    initiator = side(INITIATOR, **changes)
    raw = RawPeer(RESPONDER)
    raw.read(initiator.data_to_send()[6:])
    return initiator, raw.message(payload)


def last_of(payload: bytes, **changes: Any) -> tuple[Handshake, bytes]:
    """A responder and a message 3 to it that carries `payload`."""
    responder = side(RESPONDER, **changes)
    raw = RawPeer(INITIATOR)
    responder.receive_data(raw.preamble + raw.message())
    raw.read(responder.data_to_send())
    return responder, raw.message(payload)


# --- what must work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, KEY], ids=["public", "private"])
@pytest.mark.parametrize("chunk", [1, 2, 7, 4096])
def test_both_sides_prove_each_other(key: SwarmKey | None, chunk: int) -> None:
    initiator, responder = side(INITIATOR, key), side(RESPONDER, key)
    pump(initiator, responder, chunk)
    a, b = done(initiator), done(responder)
    assert (a.peer, a.public_key) == (BOB.peer_id, BOB.public_key)
    assert (b.peer, b.public_key) == (ALICE.peer_id, ALICE.public_key)
    assert a.trailing == b.trailing == b""
    for sender, receiver in ((a.encrypt, b.decrypt), (b.encrypt, a.decrypt)):
        assert receiver.decrypt_with_ad(b"", sender.encrypt_with_ad(b"", b"hidden states")) == b"hidden states"


@pytest.mark.parametrize("key", [None, KEY], ids=["public", "private"])
def test_a_hand_built_peer_is_understood(key: SwarmKey | None) -> None:
    """PT-TRN-010, PT-TRN-013, PT-TRN-020, PT-TRN-023, PT-TRN-025, PT-TRN-030, PT-TRN-031."""
    responder, raw = side(RESPONDER, key, expected=ALICE.peer_id), RawPeer(INITIATOR, key)
    responder.receive_data(raw.preamble + raw.message())
    fields = msgpack.unpackb(raw.read(responder.data_to_send()))
    assert fields["k"] == BOB.public_key
    assert NOW < fields["x"] <= NOW + DAY
    responder.receive_data(raw.message(raw.certificate()))
    assert done(responder).peer == ALICE.peer_id

    initiator, raw = side(INITIATOR, key), RawPeer(RESPONDER, key)
    opening = initiator.data_to_send()
    assert opening[:6] == raw.preamble
    assert raw.read(opening[6:]) == b""
    initiator.receive_data(raw.message(raw.certificate()))
    assert msgpack.unpackb(raw.read(initiator.data_to_send()))["k"] == ALICE.public_key
    assert raw.noise.h  # both sides are through
    assert done(initiator).peer == BOB.peer_id


def test_bytes_after_the_last_message_are_passed_on() -> None:
    """PT-TRN-027."""
    initiator, responder = side(INITIATOR), side(RESPONDER)
    responder.receive_data(initiator.data_to_send())
    initiator.receive_data(responder.data_to_send())
    responder.receive_data(initiator.data_to_send() + b"first record")
    assert done(responder).trailing == b"first record"
    with pytest.raises(LocalProtocolError, match="record layer"):
        responder.receive_data(b"second")


def test_size_on_the_wire() -> None:
    """1.5 round trips; the sizes of spec/01."""
    for key, first in ((None, 40), (KEY, 56)):
        initiator, responder = side(INITIATOR, key), side(RESPONDER, key)
        opening = initiator.data_to_send()
        responder.receive_data(opening)
        answer = responder.data_to_send()
        initiator.receive_data(answer)
        assert (len(opening), len(answer), len(initiator.data_to_send())) == (first, 210, 178)


def test_the_examples_of_the_spec_are_what_we_send() -> None:
    text = (Path(__file__).resolve().parents[2] / "spec/01-transport.md").read_text()
    example = {name: bytes.fromhex(value) for name, value in re.findall(r"^([a-z0-9 ]+) = ([0-9a-f]+)$", text, re.M)}
    for key, kind in ((None, "public"), (KEY, "private")):
        initiator, responder = side(INITIATOR, key), side(RESPONDER, key)
        opening = initiator.data_to_send()
        responder.receive_data(opening)
        answer = responder.data_to_send()
        initiator.receive_data(answer)
        last = initiator.data_to_send()
        responder.receive_data(last)
        assert opening == example[f"{kind} preamble"] + example[f"{kind} message 1"]
        assert answer == example[f"{kind} message 2"]
        assert last == example[f"{kind} message 3"]
        for end, name in ((initiator, "initiator record 0"), (responder, "responder record 0")):
            assert b"\x00\x13" + done(end).encrypt.encrypt_with_ad(b"", b"\x92\x05\x01") == example[f"{kind} {name}"]
    assert ALICE.public_key == example["initiator public key"]
    assert ALICE.peer_id == example["initiator peer id"]
    assert KEY.psk == example["psk"]
    static = KeyPair.from_private(bytes([0x11]) * 32).public
    assert certificate.issue(ALICE, static, b"petalite", NOW + DAY // 2) == example["initiator certificate"]


@pytest.mark.parametrize("network", ["", "x" * 65, "ü" * 33, "\ud800"])
def test_a_network_id_has_1_to_64_bytes(network: str) -> None:
    """PT-TRN-014."""
    with pytest.raises(LocalProtocolError, match="network id"):
        side(INITIATOR, network=network)


def test_static_and_ephemeral_keys_are_drawn_anew() -> None:
    """PT-TRN-026."""
    drawn: list[int] = []

    def random(size: int) -> bytes:
        drawn.append(size)
        return bytes([len(drawn)]) * size

    first, second = side(INITIATOR, random=random), side(INITIATOR, random=random)
    assert drawn == [32] * 4
    assert first.data_to_send() != second.data_to_send()


# --- version and pattern ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4096])
@pytest.mark.parametrize("major", [0, 2, 7, 255])
def test_f03_an_unknown_major_version_is_refused_in_plain(major: int, chunk: int) -> None:
    """PT-TRN-012."""
    responder = side(RESPONDER)
    opening = b"PTLT" + bytes([major, 9]) + b"whatever follows"
    with pytest.raises(HandshakeError, match=f"version {major}, we speak 1"):
        feed(responder, opening, chunk)
    refusal = responder.data_to_send()
    assert refusal == b"PTLT\x01\xff"
    assert responder.data_to_send() == b""
    with pytest.raises(HandshakeError, match="version"):
        responder.receive_data(b"more")


@pytest.mark.parametrize("chunk", [1, 4096])
def test_an_initiator_names_both_versions_of_a_refusal(chunk: int) -> None:
    """PT-TRN-017."""
    for key in (None, KEY):
        initiator = side(INITIATOR, key)
        initiator.data_to_send()
        refused(initiator, b"PTLT\x03\xff", "we speak protocol version 1, the peer up to 3", chunk)


def test_a_private_responder_refuses_no_version_aloud() -> None:
    """PT-TRN-015."""
    refused(side(RESPONDER, KEY), b"PTLT\x02\x02", "version 2, we speak 1")


@pytest.mark.parametrize("answer", [b"PTLT\x01\x01", b"PTXX\x01\xff", b"HTTP/1.1 400 Bad Request\r\n", b"\0\0", b"PT"])
def test_an_initiator_refuses_what_is_no_answer(answer: bytes) -> None:
    initiator = side(INITIATOR)
    initiator.data_to_send()
    refused(initiator, answer)


@pytest.mark.parametrize("opening", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0", b"ptlt\x01\x01", bytes(6)])
def test_a_responder_drops_other_protocols(opening: bytes) -> None:
    """PT-TRN-011."""
    refused(side(RESPONDER), opening, "not a petalite peer")


# --- the hostile inputs of the handshake -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4096])
@pytest.mark.parametrize("size", [0, 1, 31, 1_201, 65_535])
def test_h01_message_1_of_a_wrong_length(size: int, chunk: int) -> None:
    """PT-TRN-021, PT-TRN-024."""
    refused(side(RESPONDER), b"PTLT\x01\x01" + size.to_bytes(2, "big") + bytes(min(size, 1300)), f"{size} bytes", chunk)


@pytest.mark.parametrize("point", LOW_ORDER)
def test_h02_h03_low_order_points(point: str) -> None:
    """PT-TRN-041."""
    for sign in (0, 0x80):  # X25519 ignores the top bit
        key = bytearray.fromhex(point)
        key[31] |= sign
        refused(side(RESPONDER), b"PTLT\x01\x01\x00\x20" + key, "low-order")
        initiator = side(INITIATOR)
        initiator.data_to_send()
        refused(initiator, b"\x00\xd0" + key + bytes(176), "low-order")


def test_h03_low_order_static_key() -> None:
    """A static key of low order, properly encrypted: refused when `es` or `se` is due."""
    raw = RawPeer(INITIATOR)
    raw.noise.s = KeyPair(raw.static.private, bytes(32))
    responder = side(RESPONDER)
    responder.receive_data(raw.preamble + raw.message())
    raw.read(responder.data_to_send())
    refused(responder, raw.message(raw.certificate()), "low-order")


def test_h04_tampering_with_any_byte_of_any_message_is_refused_in_silence() -> None:
    """PT-TRN-040."""
    for key in (None, KEY):
        initiator, responder = side(INITIATOR, key), side(RESPONDER, key)
        opening = initiator.data_to_send()
        responder.receive_data(opening)
        answer = responder.data_to_send()
        initiator.receive_data(answer)
        last = initiator.data_to_send()
        for bit in (0x01, 0x80):
            for place in range(len(opening)):
                _tampered_opening(key, _flip(opening, place, bit), place)
            for place in range(len(answer)):
                initiator = side(INITIATOR, key)
                initiator.data_to_send()
                refused(initiator, _flip(answer, place, bit))
            for place in range(len(last)):
                responder = side(RESPONDER, key)
                responder.receive_data(opening)
                assert responder.data_to_send() == answer
                refused(responder, _flip(last, place, bit))


def _flip(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]


def _tampered_opening(key: SwarmKey | None, opening: bytes, place: int) -> None:
    responder = side(RESPONDER, key)
    if key is None and place == 4:  # the major version: the one thing that is answered, see f03
        with pytest.raises(HandshakeError, match="version"):
            responder.receive_data(opening)
        return
    if key is not None or place < 8:
        refused(responder, opening)
        return
    # Message 1 of the public pattern is a bare key: the responder cannot know. Its answer then fails at the initiator.
    responder.receive_data(opening)
    assert responder.result is None
    initiator = side(INITIATOR, key)
    initiator.data_to_send()
    refused(initiator, responder.data_to_send(), "other network or other key")


def test_h05_another_network_fails_at_message_2() -> None:
    """PT-TRN-042."""
    initiator, responder = side(INITIATOR, network="a"), side(RESPONDER, network="b")
    responder.receive_data(initiator.data_to_send())
    refused(initiator, responder.data_to_send(), "other network or other key")
    refused(responder, b"", "closed the connection")


def test_h05_another_network_with_the_same_key_is_refused_at_message_1() -> None:
    initiator, responder = side(INITIATOR, KEY, network="a"), side(RESPONDER, KEY, network="b")
    refused(responder, initiator.data_to_send(), "other network or other key")
    refused(initiator, b"", "other network or other key")


def test_h06_another_swarm_key_is_refused_at_message_1() -> None:
    initiator, responder = side(INITIATOR, KEY, network="n"), side(RESPONDER, OTHER_KEY, network="n")
    refused(responder, initiator.data_to_send(), "other network or other key")


def test_h06_psk3_binds_the_last_message() -> None:
    responder, raw = side(RESPONDER, KEY), RawPeer(INITIATOR, KEY, psks=(KEY.psk, OTHER_KEY.psk))
    responder.receive_data(raw.preamble + raw.message())
    raw.read(responder.data_to_send())
    refused(responder, raw.message(raw.certificate()), "other network or other key")


@pytest.mark.parametrize("mine", [None, KEY], ids=["public", "private"])
def test_h07_public_and_private_never_meet_and_never_fall_back(mine: SwarmKey | None) -> None:
    """PT-TRN-016."""
    theirs = KEY if mine is None else None
    initiator, responder = side(INITIATOR, mine, network="n"), side(RESPONDER, theirs, network="n")
    refused(responder, initiator.data_to_send(), "other network or other key.*pattern")
    refused(initiator, b"", "other network or other key")
    # Nor does a message 1 of the other pattern behind a preamble of the right one help.
    pattern = 1 if theirs is None else 2
    raw = RawPeer(INITIATOR, mine, network=b"n", pattern=pattern)
    refused(side(RESPONDER, theirs, network="n"), raw.preamble + raw.message())


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        ("empty", b""),
        ("no msgpack", b"\xc1"),
        ("no map", msgpack.packb([1, 2, 3])),
        ("trailing bytes", RawPeer(RESPONDER).certificate() + b"\x00"),
        ("duplicate key", b"\x84\xa1x\x00" + RawPeer(RESPONDER).certificate()[1:]),
        ("k missing", msgpack.packb({"x": NOW, "s": bytes(64)})),
        ("x missing", msgpack.packb({"k": BOB.public_key, "s": bytes(64)})),
        ("s missing", msgpack.packb({"k": BOB.public_key, "x": NOW})),
        ("k of 31 bytes", msgpack.packb({"k": bytes(31), "x": NOW, "s": bytes(64)})),
        ("k is text", msgpack.packb({"k": "k" * 32, "x": NOW, "s": bytes(64)})),
        ("x is a bool", msgpack.packb({"k": BOB.public_key, "x": True, "s": bytes(64)})),
        ("x is negative", msgpack.packb({"k": BOB.public_key, "x": -1, "s": bytes(64)})),
        ("x is a float", msgpack.packb({"k": BOB.public_key, "x": float(NOW), "s": bytes(64)})),
        ("s of 63 bytes", msgpack.packb({"k": BOB.public_key, "x": NOW, "s": bytes(63)})),
        ("s is zero", msgpack.packb({"k": BOB.public_key, "x": NOW, "s": bytes(64)})),
        ("bin keys", msgpack.packb({b"k": BOB.public_key, b"x": NOW, b"s": bytes(64)})),
    ],
)
def test_h08_malformed_certificates(name: str, payload: bytes) -> None:
    """PT-TRN-032, steps 2 and 3."""
    initiator, message = answer_of(payload)
    refused(initiator, message, "identity certificate")
    responder, message = last_of(payload)
    refused(responder, message, "identity certificate")


def test_h08_unknown_fields() -> None:
    """PT-TRN-033."""
    good = msgpack.unpackb(RawPeer(RESPONDER).certificate())
    initiator, message = answer_of(msgpack.packb({**good, "later": [1, {"a": None}]}))
    initiator.receive_data(message)
    assert done(initiator).peer == BOB.peer_id
    initiator, message = answer_of(msgpack.packb({**good, "!later": 1}))
    refused(initiator, message, "critical field '!later'")


def test_h08_a_certificate_over_1_kib_is_refused_before_it_is_parsed() -> None:
    """PT-TRN-032, step 1."""
    good = msgpack.unpackb(RawPeer(RESPONDER).certificate())
    for room, fits in ((0, True), (1, False)):
        filled = {**good, "f": bytes(1_024 - len(msgpack.packb({**good, "f": b""})) - 1 + room)}
        payload = msgpack.packb(filled)
        assert len(payload) == 1_024 + room
        initiator, message = answer_of(payload)
        if fits:
            initiator.receive_data(message)
            assert done(initiator).peer == BOB.peer_id
        else:
            refused(initiator, message, "1025 bytes, limit 1024")


@pytest.mark.parametrize(
    "changes",
    [
        {"static": bytes(32)},
        {"network": b"other"},
        {"purpose": b"petalite record v1\x00"},
        {"purpose": b"noise-libp2p-static-key:"},
    ],
    ids=["static key", "network", "purpose", "libp2p"],
)
def test_h09_a_signature_over_something_else(changes: dict[str, Any]) -> None:
    """PT-TRN-032, step 5."""
    for build in (answer_of, last_of):
        handshake, message = build(RawPeer(RESPONDER).certificate(**changes))
        refused(handshake, message, "signature does not fit")


def test_h09_a_signature_by_another_peer() -> None:
    theirs = msgpack.unpackb(RawPeer(RESPONDER).certificate(identity=CAROL))
    initiator, message = answer_of(msgpack.packb({**theirs, "k": BOB.public_key}))
    refused(initiator, message, "signature does not fit")


@pytest.mark.parametrize("key", [bytes([1]) + bytes(31), b"\xee" + b"\xff" * 30 + b"\x7f", bytes(32)])
def test_h10_a_small_order_identity_that_would_sign_anything(key: bytes) -> None:
    forged = msgpack.packb({"k": key, "x": NOW + 60, "s": bytes([1]) + bytes(63)})
    for build in (answer_of, last_of):
        handshake, message = build(forged, expected=None)
        refused(handshake, message, "small order")


@pytest.mark.parametrize(
    ("offset", "verdict"),
    [
        (-1, "expired 1 s ago by our clock"),
        (-NOW, "clock"),
        (0, None),
        (DAY + 600, None),
        (DAY + 601, "87001 s ahead of our clock"),
        (2**64 - 1 - NOW, "clock"),
    ],
)
def test_h11_the_times_of_a_certificate(offset: int, verdict: str | None) -> None:
    """PT-TRN-032, step 4, and PT-TRN-043."""
    payload = RawPeer(RESPONDER).certificate(x=NOW + offset)
    for build in (answer_of, last_of):
        handshake, message = build(payload, expected=None)
        if verdict is None:
            handshake.receive_data(message)
            assert done(handshake)
        else:
            refused(handshake, message, verdict)


def test_h11_clocks_may_differ_by_half_a_day_either_way() -> None:
    for drift, works in ((11 * 3600, True), (-11 * 3600, True), (13 * 3600, False), (-13 * 3600, False)):
        initiator, responder = side(INITIATOR), side(RESPONDER, now=NOW + drift)
        if works:
            pump(initiator, responder)
            assert done(initiator).peer == BOB.peer_id
            assert done(responder).peer == ALICE.peer_id
        else:
            with pytest.raises(HandshakeError, match="clock"):
                pump(initiator, responder)


def test_h12_checks_go_from_cheap_to_costly_and_the_name_last() -> None:
    """A certificate with every fault shows the first of PT-TRN-032; each fault mended shows the next."""
    static = bytes(32)
    faults: list[tuple[bytes, str]] = [
        (b"\xc1" * 1025, "1025 bytes"),
        (b"\xc1", "msgpack"),
        (msgpack.packb({"k": bytes(32), "x": 0, "s": bytes(64)}), "small order"),
        (msgpack.packb({"k": CAROL.public_key, "x": 0, "s": bytes(64)}), "expired"),
        (msgpack.packb({"k": CAROL.public_key, "x": NOW, "s": bytes(64)}), "signature"),
        (certificate.issue(CAROL, static, b"n", NOW), "peer id mismatch"),
    ]
    for payload, match in faults:
        with pytest.raises(HandshakeError, match=match):
            certificate.verify(payload, static, b"n", NOW, BOB.peer_id)
    assert certificate.verify(faults[-1][0], static, b"n", NOW).peer == CAROL.peer_id


def test_h13_another_peer_than_the_dialled_one() -> None:
    """PT-TRN-032, step 6, and PT-TRN-034."""
    initiator, message = answer_of(RawPeer(RESPONDER).certificate(), expected=CAROL.peer_id)
    text = refused(initiator, message, "peer id mismatch")
    assert CAROL.peer_id.text in text
    assert BOB.peer_id.text in text


def test_h14_a_responder_may_expect_somebody_too() -> None:
    initiator, responder = side(INITIATOR), side(RESPONDER, expected=CAROL.peer_id)
    with pytest.raises(HandshakeError, match="peer id mismatch"):
        pump(initiator, responder)


@pytest.mark.parametrize("chunk", [1, 4096])
@pytest.mark.parametrize("key", [None, KEY], ids=["public", "private"])
def test_h15_message_1_twice(key: SwarmKey | None, chunk: int) -> None:
    opening = side(INITIATOR, key).data_to_send()
    responder = side(RESPONDER, key)
    with pytest.raises(HandshakeError, match="bytes where"):
        feed(responder, opening + opening[6:], chunk)
    assert responder.data_to_send() == b""  # the message 2 that had become due is held back


def test_h16_message_2_reflected_and_message_1_reflected() -> None:
    initiator = side(INITIATOR)
    opening = initiator.data_to_send()
    refused(initiator, opening[6:], "bytes where")
    responder = side(RESPONDER)
    responder.receive_data(opening)
    answer = responder.data_to_send()
    refused(responder, answer, "other network or other key")


@pytest.mark.parametrize("key", [None, KEY], ids=["public", "private"])
def test_h17_a_peer_that_closes_in_the_middle(key: SwarmKey | None) -> None:
    """The deadline belongs to the caller; an early end of the stream is judged here, wherever it comes."""
    initiator, responder = side(INITIATOR, key), side(RESPONDER, key)
    opening = initiator.data_to_send()
    responder.receive_data(opening)
    answer = responder.data_to_send()
    for size in range(len(opening)):
        refused(side(RESPONDER, key), opening[:size], "closed the connection")
    for size in range(len(answer)):
        initiator = side(INITIATOR, key)
        initiator.data_to_send()
        refused(initiator, answer[:size], "other network or other key")


def test_h18_an_old_message_3_does_not_fit_a_new_handshake() -> None:
    initiator, responder = side(INITIATOR), side(RESPONDER)
    opening = initiator.data_to_send()
    responder.receive_data(opening)
    initiator.receive_data(responder.data_to_send())
    recorded = initiator.data_to_send()
    again = side(RESPONDER, random=fixed(0x21, 0x23))
    again.receive_data(opening)
    again.data_to_send()
    refused(again, recorded, "other network or other key")


@pytest.mark.parametrize("key", [None, KEY], ids=["public", "private"])
def test_h19_early_payload_in_message_1(key: SwarmKey | None) -> None:
    """PT-TRN-024."""
    raw = RawPeer(INITIATOR, key)
    refused(side(RESPONDER, key), raw.preamble + raw.message(b"x"), "bytes where")


# --- any bytes -------------------------------------------------------------------------------------------------------

PIECES = st.lists(st.binary(min_size=1, max_size=300), max_size=6)
OPENINGS = st.sampled_from([b"", b"PTLT", b"PTLT\x01\x01\x00\x20", b"PTLT\x01\x02\x00\x30", b"\x00\xd0", b"\x04\xb0"])


@given(OPENINGS, PIECES, st.sampled_from([None, KEY]), st.sampled_from(list(Role)))
def test_any_bytes_end_in_a_handshake_error_or_a_wait(
    opening: bytes, pieces: list[bytes], key: SwarmKey | None, role: Role
) -> None:
    """No other exception, no result, bounded memory, and whole input agrees with byte by byte."""
    verdicts = []
    whole = opening + b"".join(pieces)
    for parts in ([opening, *pieces], [whole], [whole[i : i + 1] for i in range(len(whole))]):
        handshake = side(role, key)
        handshake.data_to_send()
        verdict = None
        try:
            for part in filter(None, parts):
                handshake.receive_data(part)
                assert len(handshake._input) <= limits.MAX_HANDSHAKE_MESSAGE + 2
        except HandshakeError as error:
            verdict = str(error)
        assert handshake.result is None
        verdicts.append(verdict)
    assert verdicts[0] == verdicts[1] == verdicts[2]


@given(st.binary(max_size=1_100))
def test_any_payload_is_refused_by_the_certificate(payload: bytes) -> None:
    with pytest.raises(HandshakeError):
        certificate.verify(payload, bytes(32), b"n", NOW)


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.sampled_from(["k", "x", "s", "f", "!"]), st.none() | st.integers(0, 2**64 - 1) | st.binary(max_size=64)
    )
)
def test_any_map_is_refused_by_the_certificate(fields: dict[str, Any]) -> None:
    with pytest.raises(HandshakeError):
        certificate.verify(msgpack.packb(fields), bytes(32), b"n", NOW)


def test_records_after_the_handshake_are_refused_when_tampered() -> None:
    initiator, responder = side(INITIATOR), side(RESPONDER)
    pump(initiator, responder)
    record = bytearray(done(initiator).encrypt.encrypt_with_ad(b"", b"\x92\x05\x01"))
    record[0] ^= 1
    with pytest.raises(RemoteProtocolError):
        done(responder).decrypt.decrypt_into(record, bytearray(3))


def test_texts_hold_no_secret() -> None:
    initiator, responder = side(INITIATOR, KEY), side(RESPONDER, KEY)
    pump(initiator, responder)
    for shown in (repr(initiator), repr(done(initiator))):
        assert KEY.psk.hex() not in shown
        assert repr(KEY.psk)[2:12] not in shown
    assert isinstance(done(initiator).peer, PeerId)
