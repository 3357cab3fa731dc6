"""Frames and what may come when (spec/02)."""

from __future__ import annotations

from typing import Any

from tools.conformance.bench import Bench
from tools.conformance.codec import pack, wide
from tools.conformance.constants import (
    CANCEL,
    DATA,
    END,
    ERR,
    GOAWAY,
    HELLO,
    LIMIT,
    PING,
    PONG,
    PROGRESS,
    REQ,
    RES,
)  # fmt: skip
from tools.conformance.link import WAIT
from tools.conformance.peer import Peer, expect_error, hello_frame
from tools.conformance.registry import case
from tools.conformance.verdicts import Closed, Failed, Skipped, require


def _breaks(number: int, requirements: str, codes: str, title: str, *frames: Any) -> None:
    """Any one of these frames, on a connection of its own after HELLO, ends the connection."""

    def run(bench: Bench) -> None:
        for frame in frames:
            bench.reacts(frame, set(codes.split()))

    case(f"frames/{number:03}", requirements, title=f"{title}: GOAWAY({codes})")(run)


def _lives(number: int, requirements: str, title: str, *frames: Any) -> None:
    """These frames after HELLO are passed over."""

    def run(bench: Bench) -> None:
        peer = bench.peer()
        for frame in frames:
            peer.link.send(frame)
            peer.alive()

    case(f"frames/{number:03}", requirements, title=f"{title}: ignored")(run)


@case("frames/001", "PT-FRM-020 PT-FRM-021 PT-FRM-001 PT-FRM-002")
def server_hello(bench: Bench) -> None:
    """The server's first frame is HELLO, with fields of the right types"""
    link = bench.link()
    frame = link.receive()
    require(frame[0] == HELLO, f"expected: HELLO; observed: {str(frame)[:60]}")
    Peer(link).take(frame)
    limits = frame[1].get("limits") or {}
    for name in ("body", "streams"):
        require(limits.get(name) is None or limits[name] >= 1, f"limits {limits}")
    require(len((frame[1].get("agent") or "").encode()) <= LIMIT["MAX_AGENT"], "agent of more than 128 bytes")
    bench.should(frame[1].get("agent"), "an agent in HELLO")


@case("frames/002", "PT-FRM-022")
def request_after_own_hello(bench: Bench) -> None:
    """Requests may follow one's own HELLO before the peer's has come"""
    link = bench.link()
    peer = Peer(link)
    link.send(hello_frame(), [REQ, 1, END, "info", {"max": 4096}])
    peer.next_stream = 3
    peer.wait(peer.expect(1))


def _before_hello(number: int, requirements: str, title: str, frame: Any, codes: str) -> None:
    def run(bench: Bench) -> None:
        link = bench.link()
        link.send(frame)
        seen = link.expect_close(set(codes.split()))
        bench.should(seen, f"GOAWAY({codes}) before the end")

    case(f"frames/{number:03}", requirements, title=f"{title} before HELLO: GOAWAY({codes})")(run)


_before_hello(3, "PT-FRM-020", "REQ", [REQ, 1, END, "info", {}], "protocol")
_before_hello(4, "PT-FRM-020", "PING", [PING, bytes(8)], "protocol")
_before_hello(5, "PT-FRM-023", "A frame of more than 4 KiB", [HELLO, {"v": 0, "x": bytes(4_200)}], "frame")


@case("frames/006", "PT-FRM-021")
def hello_twice(bench: Bench) -> None:
    """HELLO twice: GOAWAY(protocol)"""
    bench.reacts(hello_frame(), {"protocol"})


@case("frames/007", "PT-MSG-044 PT-FRM-012 PT-FRM-025")
def hello_unknown(bench: Bench) -> None:
    """Unknown capabilities and keys in HELLO are ignored"""
    link = bench.link()
    peer = Peer(link)
    link.send(hello_frame(caps={"teleport": {"v": 3}, "x": 1}, later=[1, 2], limits={"body": 1 << 40, "more": 1}))
    peer.pump(lambda: peer.hello is not None, WAIT, "HELLO")
    peer.ping()


@case("frames/008", "PT-FRM-024")
def hello_missing_fields(bench: Bench) -> None:
    """HELLO with nothing but v is enough"""
    link = bench.link()
    peer = Peer(link)
    link.send([HELLO, {"v": 0}])
    peer.pump(lambda: peer.hello is not None, WAIT, "HELLO")
    peer.ping()


def _bad_hello(number: int, requirements: str, title: str, *heads: Any, codes: str = "protocol frame") -> None:
    def run(bench: Bench) -> None:
        for head in heads:
            link = bench.link()
            link.send([HELLO, head])
            seen = link.expect_close(set(codes.split()))
            bench.should(seen, f"GOAWAY({codes}) before the end")

    case(f"frames/{number:03}", requirements, title=title)(run)


_bad_hello(
    9,
    "PT-FRM-024",
    "HELLO whose v is missing, a str, a bool or negative: GOAWAY",
    {},
    {"v": "0"},
    {"v": True},
    {"v": -1},
)
_bad_hello(
    10,
    "PT-FRM-024",
    "HELLO with other wrong types: GOAWAY",
    {"v": 0, "caps": []},
    {"v": 0, "limits": 1},
    {"v": 0, "agent": b"a"},
)
_bad_hello(11, "PT-FRM-012", 'HELLO with a key that begins with "!": GOAWAY', {"v": 0, "!strict": 1})

_breaks(12, "PT-FRM-011", "protocol", "An unknown type below 16", [9], [15, 1, {}])
_lives(13, "PT-FRM-010", "Unknown types from 17 to 31", [17], [31, 1, {"a": 1}], [24, b"x" * 9_000])
_breaks(14, "PT-FRM-011", "protocol", "A type from 32 on, or negative", [32], [100, 1], [2**40], [-1])
_breaks(15, "PT-FRM-002 PT-FRM-003", "frame", "A type that is no integer, or none", ["0"], [None], [True, 1], [])
_breaks(16, "PT-FRM-002 PT-FRM-003", "frame", "A frame that is no array", {"a": 1}, 7, "PING", pack(b"bin"), None)
_breaks(
    17,
    "PT-FRM-002 PT-FRM-003",
    "frame",
    "HELLO or REQ of a wrong arity",
    [HELLO],
    [REQ, 1, END, "info"],
    [REQ, 1, END, "info", {}, 1],
)
_breaks(
    18,
    "PT-FRM-002 PT-FRM-003",
    "frame",
    "RES or DATA of a wrong arity",
    [RES, 1, END],
    [DATA, 1, 0],
    [DATA, 1, 0, b"", 1],
)
_breaks(
    19, "PT-FRM-002 PT-FRM-003", "frame", "ERR or CANCEL of a wrong arity", [ERR, 1, 1, "a"], [CANCEL], [CANCEL, 1, 1]
)
_breaks(
    20,
    "PT-FRM-002 PT-FRM-003",
    "frame",
    "PING, PONG or GOAWAY of a wrong arity",
    [PING],
    [PONG, bytes(8), 0],
    [GOAWAY, 0, 0],
)
_breaks(21, "PT-FRM-002 PT-FRM-003", "frame", "PROGRESS of a wrong arity", [PROGRESS, 1], [PROGRESS, 1, {}, 1])
_breaks(
    22,
    "PT-FRM-006",
    "frame",
    "Reserved flag bits",
    *[[REQ, 1, flags, "info", {}] for flags in (2, 3, 128, -1, True, "1")],
)
_breaks(
    23, "PT-FRM-006", "frame", "Reserved flag bits in DATA", [DATA, 1, 2, b"a"], [DATA, 1, 3, b"a"], [DATA, 1, 64, b"a"]
)
_breaks(24, "PT-FRM-005", "protocol", "DATA on stream 0", [DATA, 0, 0, b"x"])
_breaks(
    25,
    "PT-FRM-005",
    "protocol frame",
    "Stream ids that are none",
    *[[REQ, s, END, "info", {}] for s in (0, -1, 2**53, "1", None, True)],
)
_breaks(
    26, "PT-FRM-008 PT-FRM-003", "frame", "A REQ of more than 16 KiB", [REQ, 1, END, "info", {"pad": bytes(16_400)}]
)
_breaks(27, "PT-FRM-007 PT-FRM-003", "frame", "DATA with more than 65,000 bytes", [DATA, 1, 0, bytes(65_001)])
_breaks(
    28,
    "PT-FRM-002 PT-FRM-003",
    "frame",
    "PING with another payload than 8 bytes",
    *[[PING, bytes(n)] for n in (0, 7, 9, 60_000)],
    [PING, "12345678"],
)
_breaks(
    29,
    "PT-FRM-009 PT-FRM-003",
    "frame",
    "A method of 65 characters, or no str",
    [REQ, 1, END, "m" * 65, {}],
    [REQ, 1, END, b"info", {}],
)
_breaks(
    30,
    "PT-FRM-002 PT-FRM-003",
    "frame",
    "DATA that is no bin",
    [DATA, 1, 0, "text"],
    [DATA, 1, 0, [1]],
    [DATA, 1, 0, None],
)
_breaks(
    31,
    "PT-FRM-002 PT-FRM-003",
    "frame",
    "A head that is no map",
    [REQ, 1, END, "info", []],
    [REQ, 1, END, "info", None],
    [RES, 2, END, 1],
)
_lives(32, "PT-FRM-032", "A PONG that nobody asked for", [PONG, bytes(8)], [PONG, b"\xff" * 8])
_breaks(
    33,
    "PT-STR-006",
    "protocol",
    "A reply on a stream that the server never opened",
    [RES, 2, END, {}],
    [ERR, 2, 1, "", {}],
)
_breaks(34, "PT-STR-006", "protocol", "DATA or PROGRESS on such a stream", [DATA, 2, END, b""], [PROGRESS, 2, {}])
_breaks(35, "PT-STR-006", "protocol", "CANCEL of a stream never opened", [CANCEL, 7], [CANCEL, 8])


@case("frames/036", "PT-FRM-030")
def ping(bench: Bench) -> None:
    """PINGs are answered in order, each with its own payload"""
    peer = bench.peer()
    payloads = [bench.rng.randbytes(8) for _ in range(20)]
    peer.link.send(*[[PING, payload] for payload in payloads])
    peer.pump(lambda: len(peer.pongs) == 20, WAIT, "20 PONGs")
    require(peer.pongs == payloads, "expected: the payloads in order; observed: others")


@case("frames/037", "PT-FRM-031")
def ping_flood(bench: Bench) -> None:
    """5,000 PINGs at once: GOAWAY(rate), or answered at most; others are served"""
    peer = bench.peer()
    peer.link.send(*[[PING, number.to_bytes(8, "big")] for number in range(5_000)])
    try:
        peer.pump(lambda: len(peer.pongs) == 5_000 or peer.goaway is not None, 10, "PONGs or GOAWAY(rate)")
    except Closed:
        return
    bench.should(peer.goaway, "a rate limit on PING")
    if peer.goaway is not None:
        require(peer.goaway[1] == 8, f"expected: GOAWAY(rate); observed: {peer.goaway_text}")


@case("frames/038", "PT-FRM-045")
def goaway_without_requests(bench: Bench) -> None:
    """After our GOAWAY and with no request open the server ends the connection"""
    peer = bench.peer()
    peer.link.send([GOAWAY, 0, 0, "bye"])
    peer.link.expect_close({"normal", "shutting_down", "idle"}, 5)


@case("frames/039", "PT-FRM-043 PT-FRM-013")
def goaway_unknown(bench: Bench) -> None:
    """A GOAWAY with an unknown code and a text of escapes is a goodbye like any other"""
    peer = bench.peer()
    peer.link.send([GOAWAY, 4_000, 0, "\x1b[2J\u202e\n" * 20])
    peer.link.expect_close(set(), 5)


@case("frames/040", "PT-FRM-042")
def request_after_goaway(bench: Bench) -> None:
    """REQ after one's own GOAWAY: the connection ends"""
    peer = bench.peer()
    peer.link.send([GOAWAY, 0, 0, ""], [REQ, 1, END, "info", {"max": 4096}])
    peer.expect(1)
    peer.link.expect_close({"protocol", "normal"}, 5)


@case("frames/041", "PT-FRM-004 PT-MSG-043 PT-MSG-006")
def wide_frames(bench: Bench) -> None:
    """Frame elements in msgpack's longest forms, DATA among them"""
    peer = bench.peer()
    answer = peer.expect(1)
    peer.next_stream = 3
    peer.link.send(wide([REQ, 1, END, "info", {"max": 4096, "size": None}]))
    peer.wait(answer)
    answer = peer.expect(3)
    peer.link.send(wide([REQ, 3, 0, "no such method", {"size": 5}]), wide([DATA, 3, END, b"12345"]))
    peer.wait(answer)
    require(answer.code == "unsupported", f"expected: ERR unsupported; observed: {answer}")


@case("frames/042", "PT-FRM-013 PT-STR-012")
def text_of_a_stranger(bench: Bench) -> None:
    """Escapes, NUL and right-to-left marks in agent and method: taken or refused, never fatal"""
    link = bench.link()
    peer = Peer(link)
    link.send(hello_frame(agent="\x1b]0;x\x07\n\0\u202eevil"))
    peer.pump(lambda: peer.hello is not None, WAIT, "HELLO")
    answer = peer.call("\x1b[31m\0\u202e")
    require(answer.code == "unsupported", f"expected: ERR unsupported; observed: {answer}")


@case("frames/043", "PT-FRM-024")
def long_agent(bench: Bench) -> None:
    """HELLO with an agent of more than 128 bytes: GOAWAY, or cut; the server lives"""
    link = bench.link()
    link.send(hello_frame(agent="a" * 3_000))
    try:
        peer = Peer(link)
        peer.pump(lambda: peer.hello is not None, WAIT, "HELLO")
        peer.ping()
    except Failed:
        pass


def _offering_inline(bench: Bench) -> Peer:
    """A connection where both sides take small bodies in the frame of the head. Raises Skipped."""
    peer = Peer(bench.link())
    peer.inline = True
    peer.link.send(hello_frame(caps={"inline": {}}))
    peer.pump(lambda: peer.hello is not None, WAIT, "HELLO")
    if "inline" not in ((peer.hello or {}).get("caps") or {}):
        raise Skipped("the target does not list the capability inline")
    return peer


@case("frames/044", "PT-FRM-014 PT-STR-010")
def inline_bodies(bench: Bench) -> None:
    """Where both sides list inline, a small body may travel in the frame of its head: the same numbers"""
    peer = _offering_inline(bench)
    session = bench.session(peer)
    hidden = bench.hidden(3)
    body = session.body(hidden)
    answer = peer.expect(peer.new_stream())
    head = session.head(hidden) | {"size": len(body), "max": 1 << 20}
    peer.link.send([REQ, answer.stream, END, "step", head, body])
    output = session.accept(peer.wait(answer), hidden)
    bench.close_to(output, bench.session(peer).step(hidden), "a step with its body inline")


@case("frames/045", "PT-FRM-014 PT-FRM-002")
def bad_inline_bodies(bench: Bench) -> None:
    """An inline body that is no bin, empty or too long: GOAWAY(frame); one without END: ERR bad_request or tensor"""
    for body in ("text", b"", bytes(32_769), None, 7, [b"x"]):
        peer = _offering_inline(bench)
        size = len(body) if isinstance(body, bytes) else 4
        peer.link.send([REQ, 1, END, "step", {"size": size, "max": 0}, body])
        peer.expect(1)
        peer.link.expect_close({"frame"})
    peer = _offering_inline(bench)
    answer = peer.expect(peer.new_stream())
    peer.link.send([REQ, answer.stream, 0, "step", {"size": 8, "max": 0}, bytes(8)])
    expect_error(peer.wait(answer), {"bad_request", "tensor"})
