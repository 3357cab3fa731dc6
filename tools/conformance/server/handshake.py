"""Preamble, handshake and certificates (spec/01, sections 3 to 5)."""

from __future__ import annotations

import time
from typing import Any

from tools.conformance.bench import Bench
from tools.conformance.codec import pack, unpack
from tools.conformance.constants import HELLO, LIMIT
from tools.conformance.crypto import (
    LOW_ORDER_X,
    MAGIC,
    CryptoError,
    Identity,
    LowOrder,
    Noise,
    prologue_of,
)  # fmt: skip
from tools.conformance.link import WAIT, Link, check_message_2, framed, read_message
from tools.conformance.peer import Peer, hello_frame
from tools.conformance.registry import case
from tools.conformance.verdicts import Closed, Failed, require

HALF_DAY = 43_200


def until_message_2(bench: Bench, **keys: Any) -> tuple[Link, Noise]:
    """A handshake that waits for its message 3."""
    link = bench.tcp()
    noise = bench.target.noise(**keys)
    link.send_raw(bench.target.preamble + framed(noise.write(b"")))
    check_message_2(bench.target, noise, read_message(link))
    return link, noise


def drops_payload(bench: Bench, payload: bytes) -> None:
    """Message 3 with this payload: dropped without a byte."""
    link, noise = until_message_2(bench)
    link.send_raw(framed(noise.write(payload)))
    link.expect_silent_close()


def takes_payload(bench: Bench, make: Any) -> None:
    """Message 3 with the payload that `make(noise)` gives: accepted, so HELLO comes."""
    link, noise = until_message_2(bench)
    message = noise.write(make(noise))
    link.send_cipher, link.recv_cipher = noise.split()
    link.send_raw(framed(message))
    link.send(hello_frame())
    try:
        frame = link.receive()
    except Closed as end:
        raise Failed(f"expected: the handshake accepted; observed: {end}") from None
    require(frame[0] == HELLO, f"expected: HELLO; observed: {str(frame)[:60]}")


def fields_of(bench: Bench, noise: Noise, identity: Identity | None = None, **changes: Any) -> dict[str, Any]:
    """A right certificate as a map, with changes."""
    made = unpack((identity or Identity()).certificate(noise.s.public, bench.target.network, now() + HALF_DAY))
    return dict(made) | changes


def now() -> int:
    return int(time.time())


@case("handshake/001", "PT-TRN-010 PT-TRN-013 PT-TRN-020 PT-TRN-023 PT-TRN-025 PT-IDN-001 PT-IDN-004 PT-TRN-060")
def accepts(bench: Bench) -> None:
    """A right handshake ends with HELLO both ways, under the dialled peer id"""
    bench.peer().ping()


@case("handshake/002", "PT-TRN-067 PT-TRN-027")
def byte_by_byte(bench: Bench) -> None:
    """The whole handshake and first records, one byte a segment"""
    link = bench.tcp()
    noise = bench.target.noise()
    for byte in bench.target.preamble + framed(noise.write(b"")):
        link.send_raw(bytes([byte]))
    check_message_2(bench.target, noise, read_message(link))
    message = noise.write(Identity().certificate(noise.s.public, bench.target.network, now() + HALF_DAY))
    link.send_cipher, link.recv_cipher = noise.split()
    for byte in framed(message) + link.seal(pack(hello_frame())):
        link.send_raw(bytes([byte]))
    peer = Peer(link)
    peer.pump(lambda: peer.hello is not None, WAIT, "HELLO")
    peer.ping()


@case("handshake/003", "PT-TRN-027 PT-TRN-067")
def early_record(bench: Bench) -> None:
    """The first record in the segment of message 3 is read as a record"""
    peer = Peer(bench.link(tail=pack(hello_frame())))
    peer.pump(lambda: peer.hello is not None, WAIT, "HELLO")
    peer.ping()


@case("handshake/004", "PT-TRN-011")
def wrong_magic(bench: Bench) -> None:
    """Six bytes that do not begin with the magic: closed without a byte"""
    for start in (b"GET / ", b"PTLS\x01\x01", b"\x16\x03\x01\x02\x00\x01", bytes(6)):
        link = bench.tcp()
        link.send_raw(start + bytes(32))
        link.expect_silent_close()


@case("handshake/005", "PT-TRN-012", network="public")
def unknown_major(bench: Bench) -> None:
    """An unknown major version is refused in clear with the highest own one, whatever the pattern"""
    for major, pattern in ((2, 1), (255, 1), (0, 2), (9, 77)):
        link = bench.tcp()
        link.send_raw(MAGIC + bytes([major, pattern]))
        answer = link.read_to_end()
        expected = MAGIC + bytes([1, 255])
        require(answer == expected, f"expected: {expected.hex()} and the end; observed: {answer.hex()}")


@case("handshake/006", "PT-TRN-015", network="private")
def unknown_major_private(bench: Bench) -> None:
    """A private server answers an unknown major version with nothing"""
    for major, pattern in ((2, 2), (255, 1), (0, 2)):
        link = bench.tcp()
        link.send_raw(MAGIC + bytes([major, pattern]) + framed(bytes(48)))
        link.expect_silent_close()


@case("handshake/007", "PT-TRN-016 PT-TRN-023")
def other_pattern(bench: Bench) -> None:
    """Another pattern than the server's own: closed without a byte, no falling back"""
    for pattern in {0, 1, 2, 3, 255} - {bench.target.pattern}:
        link = bench.tcp()
        noise = Noise(True, 1, prologue_of(MAGIC + b"\1\1", bench.target.network), None)
        link.send_raw(MAGIC + bytes([1, pattern]) + framed(noise.write(b"")))
        link.expect_silent_close()


def _length_of_message_1(number: int, name: str, delta: int | None, announced: int | None = None) -> None:
    def run(bench: Bench) -> None:
        size = 48 if bench.target.swarm_key else 32
        count = size + delta if delta is not None else 0
        length = announced if announced is not None else count
        link = bench.tcp()
        message = (bench.target.noise().write(b"") + bytes(2_000))[:count]
        link.send_raw(bench.target.preamble + length.to_bytes(2, "big") + message)
        link.expect_silent_close()

    case(f"handshake/{number:03}", "PT-TRN-021 PT-TRN-024 PT-TRN-040", title=f"Message 1 {name}: dropped")(run)


_length_of_message_1(8, "one byte short", -1)
_length_of_message_1(9, "one byte long", 1)
_length_of_message_1(10, "of no byte", None)
_length_of_message_1(11, "announced with 1,201 bytes, by the length alone", None, 1_201)
_length_of_message_1(12, "announced with 65,535 bytes, by the length alone", None, 65_535)


@case("handshake/013", "PT-TRN-024")
def early_payload(bench: Bench) -> None:
    """A payload in message 1 is dropped, rightly encrypted or not"""
    link = bench.tcp()
    link.send_raw(bench.target.preamble + framed(bench.target.noise().write(b"early data")))
    link.expect_silent_close()


@case("handshake/014", "PT-TRN-040")
def message_1_twice(bench: Bench) -> None:
    """Message 1 twice: dropped after message 2"""
    link = bench.tcp()
    message = framed(bench.target.noise().write(b""))
    link.send_raw(bench.target.preamble + message)
    read_message(link)
    link.send_raw(message)
    link.expect_silent_close()


@case("handshake/015", "PT-TRN-041")
def low_order_ephemeral(bench: Bench) -> None:
    """Low-order points as ephemeral key: dropped, though every tag would fit"""
    for point in (*LOW_ORDER_X, *(bytes([*point[:31], point[31] | 0x80]) for point in LOW_ORDER_X)):
        link = bench.tcp()
        noise = bench.target.noise(ephemeral=LowOrder(point))
        link.send_raw(bench.target.preamble + framed(noise.write(b"")))
        link.expect_silent_close()


@case("handshake/016", "PT-TRN-041")
def low_order_static(bench: Bench) -> None:
    """Low-order points as static key: dropped, though every tag would fit"""
    for point in LOW_ORDER_X:
        link, noise = until_message_2(bench, static=LowOrder(point))
        link.send_raw(framed(noise.write(Identity().certificate(point, bench.target.network, now() + HALF_DAY))))
        link.expect_silent_close()


@case("handshake/017", "PT-TRN-013 PT-TRN-014", network="public")
def other_network(bench: Bench) -> None:
    """The network id is part of the prologue: with another one, message 2 does not decrypt"""
    link = bench.tcp()
    noise = Noise(True, 1, prologue_of(bench.target.preamble, bench.target.network + b"x"), None)
    link.send_raw(bench.target.preamble + framed(noise.write(b"")))
    message = read_message(link)
    try:
        noise.read(message)
    except CryptoError:
        return
    raise Failed("expected: message 2 depends on the network id; observed: it decrypts under another one")


@case("handshake/018", "PT-TRN-013 PT-TRN-040 PT-TRN-042", network="private")
def other_network_private(bench: Bench) -> None:
    """A private server drops message 1 of another network and of another key"""
    key = bench.target.swarm_key
    psk = key.psk if key else b""
    for network, secret in ((bench.target.network + b"x", psk), (bench.target.network, bytes(32))):
        link = bench.tcp()
        noise = Noise(True, 2, prologue_of(bench.target.preamble, network), secret)
        link.send_raw(bench.target.preamble + framed(noise.write(b"")))
        link.expect_silent_close()


@case("handshake/019", "PT-TRN-040 PT-TRN-064")
def flipped_message_3(bench: Bench) -> None:
    """One bit of message 3 flipped, in the static key or in the certificate: dropped"""
    for at in (0, 40, 48, 70, -1):
        link, noise = until_message_2(bench)
        good = noise.write(Identity().certificate(noise.s.public, bench.target.network, now() + HALF_DAY))
        message = bytearray(good)
        message[at] ^= 0x10
        link.send_raw(framed(bytes(message)))
        link.expect_silent_close()


@case("handshake/034", "PT-TRN-021 PT-TRN-025")
def empty_message_3(bench: Bench) -> None:
    """Message 3 without room for a static key, or longer than 1,200 bytes: dropped on the length"""
    for length in (0, 16, 63, 1_201, 65_535):
        link, _ = until_message_2(bench)
        link.send_raw(length.to_bytes(2, "big") + bytes(min(length, 63)))
        link.expect_silent_close()


@case("handshake/045", "PT-TRN-064 PT-TRN-027")
def message_3_twice(bench: Bench) -> None:
    """Message 3 twice: the second is no record, so the connection ends"""
    link, noise = until_message_2(bench)
    message = framed(noise.write(Identity().certificate(noise.s.public, bench.target.network, now() + HALF_DAY)))
    link.send_cipher, link.recv_cipher = noise.split()
    link.send_raw(message * 2)
    link.expect_close({"decrypt", "frame"})


@case("handshake/035", "PT-TRN-031", level="should")
def half_day(bench: Bench) -> None:
    """The server's certificate ends about half a day from now"""
    link = bench.tcp()
    noise = bench.target.noise()
    link.send_raw(bench.target.preamble + framed(noise.write(b"")))
    ahead = unpack(noise.read(read_message(link)))["x"] - time.time()
    require(abs(ahead - HALF_DAY) <= 900, f"expected: about {HALF_DAY} s ahead; observed: {ahead:.0f} s")


@case("handshake/036", "PT-TRN-026")
def fresh_keys(bench: Bench) -> None:
    """Each handshake has a fresh ephemeral key, and should have a fresh static one"""
    first, second = until_message_2(bench)[1], until_message_2(bench)[1]
    require(first.re != second.re, "the same ephemeral key in two handshakes")
    bench.should(first.rs != second.rs, "a fresh static key for each handshake")
    require(first.rs != first.re, "the static key is the ephemeral one")


@case("handshake/037", "PT-TRN-013 PT-TRN-016 PT-TRN-012")
def tampered_preamble(bench: Bench) -> None:
    """The preamble is part of the prologue: message 2 does not decrypt under another one"""
    link = bench.tcp()
    psk = bench.target.swarm_key.psk if bench.target.swarm_key else None
    noise = Noise(True, bench.target.pattern, prologue_of(MAGIC + b"\2\1", bench.target.network), psk)
    link.send_raw(bench.target.preamble + framed(noise.write(b"")))
    if bench.target.swarm_key:
        link.expect_silent_close()
        return
    try:
        noise.read(read_message(link))
    except CryptoError:
        return
    raise Failed("message 2 does not depend on the preamble")


def _stops(number: int, title: str, make: Any) -> None:
    def run(bench: Bench) -> None:
        link = bench.tcp()
        started = time.monotonic()
        make(bench, link)
        link.buffer = b""
        limit = LIMIT["HANDSHAKE_SECONDS"]
        link.expect_silent_close(limit + 5)
        took = time.monotonic() - started
        require(took >= limit - 2, f"expected: closed at about {limit} s; observed: {took:.1f} s")

    case(f"handshake/{number:03}", "PT-TRN-022 PT-TRN-040", title=title, slow=True)(run)


def _send_message_1(bench: Bench, link: Link) -> None:
    link.send_raw(bench.target.preamble + framed(bench.target.noise().write(b"")))
    read_message(link)


_stops(38, "Nothing is sent after connecting: closed at 10 s", lambda bench, link: None)
_stops(39, "Nothing after half a preamble: closed at 10 s", lambda bench, link: link.send_raw(MAGIC[:3]))
_stops(40, "Nothing after the preamble: closed at 10 s", lambda bench, link: link.send_raw(bench.target.preamble))
_stops(41, "Nothing after message 1: closed at 10 s", _send_message_1)


@case("handshake/042", "PT-TRN-022", slow=True)
def dribble(bench: Bench) -> None:
    """A byte a second does not put off the deadline of the whole handshake"""
    link = bench.tcp()
    started = time.monotonic()
    data = bench.target.preamble + framed(bench.target.noise().write(b""))
    for byte in data[:14]:
        link.send_raw(bytes([byte]))
        if link.ended:
            break
        time.sleep(1)
    link.expect_silent_close(5)
    require(time.monotonic() - started < 17, "the handshake was still open after 17 s")


@case("handshake/043", "PT-TRN-022")
def many_connections(bench: Bench) -> None:
    """300 connections at once that say nothing, then close: others are served again"""
    links = []
    for _ in range(300):
        try:
            links.append(bench.tcp())
        except Failed:
            break
    for link in links:
        link.close(reset=True)
    deadline = time.monotonic() + 10
    while True:  # the closes are noticed in their own time
        try:
            bench.peer().ping()
            return
        except Failed:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@case("handshake/044", "PT-TRN-011 PT-TRN-012 PT-TRN-015 PT-TRN-040", network="private")
def private_silence(bench: Bench) -> None:
    """Whatever an outsider sends to a private server, no byte comes back"""
    public = Noise(True, 1, prologue_of(MAGIC + b"\1\1", b"petalite"), None).write(b"")
    for data in (
        MAGIC + b"\1\1" + framed(public), MAGIC + b"\1\2" + framed(public), MAGIC + b"\2\2", MAGIC + b"\1\xff",
        MAGIC + b"\1\2" + framed(bench.rng.randbytes(48)), b"GET / HTTP/1.1\r\n\r\n", bench.rng.randbytes(100),
    ):  # fmt: skip
        link = bench.tcp()
        link.send_raw(data)
        link.expect_silent_close()
