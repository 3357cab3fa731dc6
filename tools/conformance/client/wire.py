"""Cases about what a client does with wrong records and frames (spec/01, spec/02, spec/03)."""

from __future__ import annotations

import time
from typing import Any

from tools.conformance.client.harness import Stage
from tools.conformance.client.responder import Conn, Server
from tools.conformance.codec import Pairs, Raw, pack
from tools.conformance.constants import DATA, END, ERR, GOAWAY, HELLO, PING, PROGRESS, REQ, RES
from tools.conformance.registry import case
from tools.conformance.verdicts import require


class _After(Server):
    """Sends something wrong as soon as the client has said HELLO, and answers no PING."""

    plain = b""

    def greeted(self, conn: Conn) -> None:
        self.hurt(conn)

    def hurt(self, conn: Conn) -> None:
        conn.link.send_plain(self.plain)

    def on_ping(self, conn: Conn, payload: bytes) -> None:
        pass


def _ends(number: int, requirements: str, codes: str, title: str, plain: Any) -> None:
    """The client ends the connection, with one of these codes in its GOAWAY, and says that it failed."""

    def run(stage: Stage) -> None:
        server = type("After", (_After,), {"plain": plain if isinstance(plain, bytes) else pack(plain)})
        stage.failed(stage.ping(server(stage)))
        stage.goodbye(*codes.split())

    case(f"client/{number:03}", requirements, side="client", title=f"{title}: the client ends the connection")(run)


_ends(30, "PT-FRM-021", "protocol", "HELLO twice", [HELLO, {"v": 0}])
_ends(31, "PT-FRM-011", "protocol", "An unknown type below 16", [11, 1])
_ends(32, "PT-FRM-011", "protocol", "A type from 32 on", [40])
_ends(33, "PT-MSG-030 PT-MSG-011", "frame", "A map key twice", pack([18, Pairs(("size", 0), ("size", 0))]))
_ends(34, "PT-MSG-030 PT-MSG-003", "frame", "A float", pack([18, Raw(b"\xca\x40\x40\0\0")]))
_ends(35, "PT-MSG-030 PT-MSG-021", "frame", "An array of 2^32 - 1 entries", b"\xdd\xff\xff\xff\xff")
_ends(36, "PT-MSG-030 PT-MSG-020", "frame", "Nesting 1,000 deep", pack([18, Raw(b"\x91" * 1_000 + b"\xc0")]))
_ends(37, "PT-MSG-030 PT-MSG-009", "frame", "Bytes after a frame", pack([18]) + b"\xc0")
_ends(38, "PT-TRN-061", "frame", "A record with nothing in it", b"")
_ends(39, "PT-STR-006", "protocol", "RES on a stream that was never requested", [RES, 1_001, END, {"size": 0}])
_ends(40, "PT-STR-006", "protocol", "ERR on a stream that was never requested", [ERR, 1_001, 15, "x", {}])
_ends(41, "PT-STR-006", "protocol", "DATA and PROGRESS on such a stream", [DATA, 1_001, END, b"x"])
_ends(42, "PT-STR-001 PT-STR-002", "protocol", "A REQ with an id of the client's half", [REQ, 1, END, "info", {}])
_ends(43, "PT-FRM-002 PT-FRM-003", "frame", "A PING of 7 bytes", [PING, bytes(7)])
_ends(44, "PT-FRM-006", "frame", "Reserved flags in RES", [RES, 1, 2, {"size": 0}])
_ends(45, "PT-FRM-002 PT-FRM-003", "frame", "A RES of a wrong arity", [RES, 1, END])


class _Flip(_After):
    def hurt(self, conn: Conn) -> None:
        record = bytearray(conn.link.seal(pack([17])))
        record[-1] ^= 1
        conn.link.send_raw(bytes(record))


class _Replay(_After):
    def hurt(self, conn: Conn) -> None:
        record = conn.link.seal(pack([17]))
        conn.link.send_raw(record + record)


class _Short(_After):
    def hurt(self, conn: Conn) -> None:
        conn.link.send_raw(b"\0\4abcd")


def _ends_by(number: int, requirements: str, codes: str, title: str, server: type[Server]) -> None:
    def run(stage: Stage) -> None:
        stage.failed(stage.ping(server(stage)))
        stage.goodbye(*codes.split())

    case(f"client/{number:03}", requirements, side="client", title=f"{title}: the client ends the connection")(run)


_ends_by(46, "PT-TRN-064", "decrypt", "A flipped bit in a record", _Flip)
_ends_by(47, "PT-TRN-062 PT-TRN-064", "decrypt", "A record twice", _Replay)
_ends_by(48, "PT-TRN-061", "frame", "A record of 4 bytes", _Short)


class _BadHello(Server):
    hello: Any = None

    def greet(self, conn: Conn) -> None:
        conn.send([HELLO, self.hello])


def _bad_hello(number: int, requirements: str, title: str, hello: Any) -> None:
    _ends_by(number, requirements, "protocol frame", title, type("BadHello", (_BadHello,), {"hello": hello}))


_bad_hello(49, "PT-FRM-024", "HELLO without v", {"caps": {}})
_bad_hello(50, "PT-FRM-012", 'HELLO with a key that begins with "!"', {"v": 0, "!x": 1})


class _NoHello(Server):
    def greet(self, conn: Conn) -> None:
        conn.send([PING, bytes(8)])


_ends_by(51, "PT-FRM-020", "protocol", "Another frame before HELLO", _NoHello)


class _Rich(Server):
    """All that must be passed over or answered."""

    def hello_map(self, conn: Conn) -> dict[str, Any]:
        return super().hello_map(conn) | {"caps": {"teleport": 1}, "later": [1], "agent": "\x1b[31m\n\u202e", "v": 7}

    def greeted(self, conn: Conn) -> None:
        conn.send([17], [31, 1, "x"], [PING, b"12345678"], [REQ, 2, END, "no such method", {"max": 0}])
        conn.send([PROGRESS + 1, {"a": 1}], [7, b"unasked!"])


@case("client/052", "PT-MSG-044", side="client")
def rich(stage: Stage) -> None:
    """Unknown ignorable frames, capabilities and keys are passed over; PING and a request are answered"""
    stage.succeeded(stage.ping(_Rich(stage)))
    conn = stage.conns[-1]
    require(conn.pongs == [b"12345678"], f"expected: PONG with the payload; observed: {conn.pongs}")
    require(
        any(frame[1] == 2 and frame[2] == 2 for frame in conn.errors),
        f"expected: ERR unsupported; observed: {conn.errors}",
    )


class _Leaving(Server):
    """GOAWAY instead of an answer to the first request of the first server."""

    code, last = 9, 0

    def answer(self, conn: Conn, request: Any) -> None:
        if request.method == "step" and self.stage.is_first(self):
            conn.send([GOAWAY, self.code, self.last, "\x1b[1mleaving\x1b[0m"])
            time.sleep(0.1)
            conn.link.close()
            return
        super().answer(conn, request)


@case("client/053", "PT-FRM-040 PT-FRM-042 PT-ERR-008", side="client")
def goaway_then_elsewhere(stage: Stage) -> None:
    """GOAWAY in the place of a reply: the request goes to another server, the text is that of an undisturbed run"""
    stage.generated(stage.generate(_Leaving(stage), _Leaving(stage)))


class _Chatty(Server):
    """PROGRESS for a while, then the reply."""

    def do_step(self, conn: Conn, request: Any) -> None:
        if not self.steps:
            for _ in range(8):
                conn.send([PROGRESS, request.stream, {"s": "queued"}])
                time.sleep(0.5)
        super().do_step(conn, request)


@case("client/054", "PT-STR-053 PT-STR-052", side="client", slow=True)
def waits_with_progress(stage: Stage) -> None:
    """While PROGRESS comes the client waits, here for 4 s"""
    stage.generated(stage.generate(_Chatty(stage)))
    require(not any(conn.cancelled for conn in stage.conns), "the client cancelled a step that made progress")


class _Stopped(Server):
    """A process that has stopped: the connection is open and nothing comes."""

    def on_plain(self, conn: Conn, plain: bytes) -> None:
        if self.steps >= 1 and self.stage.is_first(self):
            return
        super().on_plain(conn, plain)


@case("client/055", "PT-STR-050 PT-STR-051 PT-STR-054", side="client", slow=True)
def dead_server(stage: Stage) -> None:
    """A server that falls silent in mid-generation is given up within seconds, and another one goes on"""
    outcome = stage.generate(_Stopped(stage), _Stopped(stage), seconds=20)
    stage.generated(outcome)
    require(outcome.seconds < 16, f"expected: replaced within seconds; observed: {outcome}")


class _Dribble(Server):
    """Every frame in segments of three bytes."""

    def reply_step(self, conn: Conn, request: Any, head: dict[str, Any], body: bytes) -> None:
        data = conn.link.seal(pack([RES, request.stream, 0, {"size": len(body), **head}]))
        data += conn.link.seal(pack([DATA, request.stream, 0, body[:7]]))
        data += conn.link.seal(pack([DATA, request.stream, END, body[7:]]))
        for at in range(0, len(data), 97):
            conn.link.send_raw(data[at : at + 97])


@case("client/056", "PT-TRN-067", side="client")
def dribbled_reply(stage: Stage) -> None:
    """A reply in odd pieces and segments"""
    stage.generated(stage.generate(_Dribble(stage)))
