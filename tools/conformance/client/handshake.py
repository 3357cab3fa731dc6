"""Cases about a client's handshake (spec/01)."""

from __future__ import annotations

import time
from typing import Any

from tools.conformance.client.harness import Stage
from tools.conformance.client.responder import Conn, Server
from tools.conformance.codec import pack, unpack, wide
from tools.conformance.crypto import (
    LOW_ORDER_X,
    MAGIC,
    SMALL_ORDER,
    Identity,
    KeyPair,
    LowOrder,
    Noise,
    peer_id_of,
    signed_bytes,
)  # fmt: skip
from tools.conformance.link import framed
from tools.conformance.registry import case
from tools.conformance.verdicts import Closed, require

HALF_DAY = 43_200


def _now() -> int:
    return int(time.time())


@case(
    "client/001",
    "PT-TRN-010 PT-TRN-013 PT-TRN-020 PT-TRN-023 PT-TRN-024 PT-TRN-025 PT-TRN-030 PT-TRN-060",
    side="client",
)
def connects(stage: Stage) -> None:
    """The client shakes hands, says HELLO and PINGs"""
    stage.succeeded(stage.ping(Server(stage)))
    require(any(conn.hello is not None and conn.pings for conn in stage.conns), "expected: HELLO and PING")


def _drops(number: int, requirements: str, title: str, server: Any, *, quiet: bool = True, **options: Any) -> None:
    """The client must end the attempt at once, with an error, and send nothing more."""

    def run(stage: Stage) -> None:
        outcome = stage.ping(server(stage), **options)
        stage.failed(outcome)
        if quiet:
            stage.silent()

    case(f"client/{number:03}", requirements, side="client", title=title)(run)


class _Certificate(Server):
    """`make(server, noise)` gives the payload of message 2."""

    make: Any = None

    def certificate(self, noise: Noise) -> bytes:
        made: bytes = type(self).make(self, noise)
        return made


def _with_certificate(make: Any) -> type[Server]:
    return type("Certificate", (_Certificate,), {"make": staticmethod(make)})


def _fields(server: Server, noise: Noise, **changes: Any) -> dict[str, Any]:
    made = unpack(server.identity.certificate(noise.s.public, server.stage.network, _now() + HALF_DAY))
    return dict(made) | changes


def _at(offset: int) -> Any:
    return lambda server, noise: server.identity.certificate(noise.s.public, server.stage.network, _now() + offset)


_drops(2, "PT-TRN-032 PT-TRN-043", "A server whose certificate has expired is dropped", _with_certificate(_at(-60)))
_drops(3, "PT-TRN-032", "A certificate that ends 24 h 11 min ahead: dropped", _with_certificate(_at(86_400 + 660)))
_drops(4, "PT-TRN-032", "A certificate over another static key: dropped", _with_certificate(
    lambda server, noise: server.identity.certificate(
        KeyPair().public, server.stage.network, _now() + HALF_DAY)))  # fmt: skip
_drops(5, "PT-TRN-032", "A certificate for another network: dropped", _with_certificate(
    lambda server, noise: server.identity.certificate(noise.s.public, b"elsewhere", _now() + HALF_DAY)))  # fmt: skip
_drops(6, "PT-TRN-033", 'A certificate with a key that begins with "!": dropped', _with_certificate(
    lambda server, noise: pack(_fields(server, noise, **{"!x": 1}))))  # fmt: skip
_drops(7, "PT-TRN-032 PT-MSG-009", "A certificate with bytes after it: dropped", _with_certificate(
    lambda server, noise: pack(_fields(server, noise)) + b"\0"))  # fmt: skip
_drops(8, "PT-TRN-032", "No certificate: dropped", _with_certificate(lambda server, noise: b""))
_drops(9, "PT-IDN-006", "An identity key of small order with a forged signature: dropped", _with_certificate(
    lambda server, noise: pack({"k": SMALL_ORDER[1], "x": _now() + 3_600, "s": bytes([1]) + bytes(63)})),
    peer=peer_id_of(SMALL_ORDER[1]))  # fmt: skip
_drops(10, "PT-IDN-009", "A signature made for another purpose: dropped", _with_certificate(
    lambda server, noise: pack(_fields(server, noise, s=server.identity.key.sign(
        signed_bytes(noise.s.public, server.stage.network, _now() + HALF_DAY)[1:])))))  # fmt: skip


class _Accepted(_Certificate):
    @staticmethod
    def make(server: Server, noise: Noise) -> bytes:
        return wide(dict(reversed(_fields(server, noise, later=[1, {"a": b""}]).items())))


@case("client/011", "PT-TRN-033 PT-MSG-006 PT-MSG-012", side="client")
def odd_certificate(stage: Stage) -> None:
    """A certificate with unknown keys, in another order and in the longest forms is accepted"""
    stage.succeeded(stage.ping(_Accepted(stage)))


@case("client/012", "PT-TRN-034 PT-IDN-032 PT-TRN-032", side="client")
def other_peer(stage: Stage) -> None:
    """Another peer than the dialled one: no message 3, no record"""
    server = Server(stage)
    outcome = stage.ping(server, peer=Identity().peer)
    stage.failed(outcome)
    stage.silent()


class _LowOrderEphemeral(Server):
    def keys(self) -> tuple[KeyPair | None, KeyPair | None]:
        return None, LowOrder(LOW_ORDER_X[2])


class _LowOrderStatic(Server):
    def keys(self) -> tuple[KeyPair | None, KeyPair | None]:
        return LowOrder(LOW_ORDER_X[0]), None


_drops(13, "PT-TRN-041", "A low-order ephemeral key: dropped", _LowOrderEphemeral)
_drops(14, "PT-TRN-041", "A low-order static key: dropped", _LowOrderStatic)


class _Flipped(Server):
    def handshake(self, conn: Conn) -> None:
        noise = self.read_message_1(conn)
        message = bytearray(noise.write(self.certificate(noise)))
        message[40] ^= 1
        conn.link.send_raw(framed(bytes(message)))
        self.no_answer(conn)

    def no_answer(self, conn: Conn) -> None:
        data = conn.link.read_to_end(10)
        if data:
            self.stage.fault(f"{len(data)} bytes came after a handshake that had failed")
        raise Closed("as it should be")


class _Raw(_Flipped):
    """Answers message 1 with these bytes."""

    data = b""

    def handshake(self, conn: Conn) -> None:
        self.read_message_1(conn)
        conn.link.send_raw(self.data)
        self.no_answer(conn)


def _raw(data: bytes) -> type[Server]:
    return type("Raw", (_Raw,), {"data": data})


_drops(15, "PT-TRN-040 PT-TRN-042", "A flipped bit in message 2: dropped", _Flipped)
_drops(16, "PT-TRN-021", "Message 2 announced with 65,535 bytes: dropped on the length", _raw(b"\xff\xff"))
_drops(17, "PT-TRN-021", "Message 2 of 20 bytes: dropped", _raw(framed(bytes(20))))
_drops(18, "PT-TRN-040", "Something that speaks another protocol: dropped", _raw(b"HTTP/1.1 400 Bad Request\r\n\r\n"))


class _Refusing(_Flipped):
    def handshake(self, conn: Conn) -> None:
        self.read_message_1(conn)
        conn.link.send_raw(MAGIC + b"\x00\xff")
        self.no_answer(conn)


@case("client/019", "PT-TRN-017", side="client")
def refused_version(stage: Stage) -> None:
    """A version refusal ends the attempt; no lower version is tried"""
    outcome = stage.ping(_Refusing(stage))
    stage.failed(outcome)
    require(len(stage.conns) <= 2, f"expected: no other version tried; observed: {len(stage.conns)} connections")


class _Closing(Server):
    def handshake(self, conn: Conn) -> None:
        self.read_message_1(conn)
        raise Closed("closing without an answer")


_drops(20, "PT-TRN-042", "A server that closes after message 1: a clean error", _Closing)


class _Mute(Server):
    def handshake(self, conn: Conn) -> None:
        self.read_message_1(conn)
        conn.link.read_to_end(30)
        raise Closed("it gave up")


@case("client/021", "PT-TRN-022", side="client", slow=True)
def mute(stage: Stage) -> None:
    """A server that never sends message 2: the client gives up after 10 s"""
    outcome = stage.ping(_Mute(stage), seconds=20)
    stage.failed(outcome, within=14)


class _OneSegment(Server):
    """Message 2 one byte at a time."""

    def handshake(self, conn: Conn) -> None:
        noise = self.read_message_1(conn)
        for byte in framed(noise.write(self.certificate(noise))):
            conn.link.send_raw(bytes([byte]))
        self.finish(conn, noise)


@case("client/022", "PT-TRN-067", side="client")
def byte_by_byte(stage: Stage) -> None:
    """Message 2 in segments of one byte"""
    stage.succeeded(stage.ping(_OneSegment(stage)))


@case("client/023", "PT-TRN-026 PT-IDN-002", side="client")
def fresh_keys(stage: Stage) -> None:
    """Two runs have different ephemeral and static keys, and should have different identities"""
    server = Server(stage)
    place = stage.listen(server)
    for _ in range(2):
        stage.succeeded(stage.run("ping", [place], 8))
    (e1, s1, p1), (e2, s2, p2) = stage.keys_seen[0], stage.keys_seen[-1]
    require(e1 != e2 and s1 != s2, "the same ephemeral or static key in two processes")
    stage.should(p1 != p2, "a fresh identity for each process that only dials")


class _LongCertificate(_Certificate):
    @staticmethod
    def make(server: Server, noise: Noise) -> bytes:
        return pack(_fields(server, noise, p=bytes(920)))


_drops(24, "PT-TRN-032", "A certificate of more than 1,024 bytes: dropped", _LongCertificate)
