"""Requests, bodies, cancelling, deadlines (spec/03), and errors (spec/08)."""

from __future__ import annotations

import time
from typing import Any

from tools.conformance.bench import Bench, Session, settle
from tools.conformance.codec import pack
from tools.conformance.constants import CANCEL, DATA, END, GOAWAY, LIMIT, REQ, RES
from tools.conformance.crypto import Identity
from tools.conformance.link import WAIT
from tools.conformance.peer import Answer, Peer, expect_error
from tools.conformance.registry import case
from tools.conformance.verdicts import Closed, Failed, Skipped, require

MIB = 1 << 20


def _breaks(number: int, requirements: str, title: str, *frames: Any) -> None:
    def run(bench: Bench) -> None:
        for frame in frames:
            bench.reacts(frame, {"protocol"})

    case(f"streams/{number:03}", requirements, title=f"{title}: GOAWAY(protocol)")(run)


_breaks(1, "PT-STR-001 PT-STR-002", "A stream id of the responder's half", [REQ, 2, END, "info", {}])
_breaks(2, "PT-STR-006", "DATA on a stream that was never opened", [DATA, 1, END, b"x"], [DATA, 101, 0, b""])


@case("streams/003", "PT-STR-002")
def reused_id(bench: Bench) -> None:
    """A stream id that was used, or a lower one: GOAWAY(protocol)"""
    for number in (9, 7):
        peer = bench.peer()
        answer = peer.expect(9)
        peer.link.send([REQ, 9, END, "info", {"max": 4096}])
        peer.wait(answer)
        peer.link.send([REQ, number, END, "info", {"max": 4096}])
        peer.link.expect_close({"protocol"})


@case("streams/004", "PT-STR-002")
def gaps_in_ids(bench: Bench) -> None:
    """Stream ids may leave gaps"""
    peer = bench.peer()
    for stream in (3, 101, 65_537, 2**32 + 1, 2**53 - 1):
        answer = peer.expect(stream)
        peer.link.send([REQ, stream, END, "info", {"max": 4096}])
        peer.wait(answer)


@case("streams/005", "PT-STR-005")
def late_frames(bench: Bench) -> None:
    """DATA and CANCEL on a stream that has ended are ignored"""
    peer = bench.peer()
    answer = peer.call("info")
    peer.link.send([DATA, answer.stream, 0, b"late"], [DATA, answer.stream, END, b""], [CANCEL, answer.stream])
    peer.alive()
    peer.call("info")


@case("streams/006", "PT-STR-004 PT-STR-007")
def own_reply(bench: Bench) -> None:
    """RES by the requester on its own stream: GOAWAY(protocol)"""
    peer = bench.peer()
    peer.link.send([REQ, 1, 0, "step", {"size": 10, "max": 0}], [RES, 1, END, {"size": 0}])
    peer.expect(1)
    peer.link.expect_close({"protocol"})


@case("streams/007", "PT-STR-012 PT-ERR-011")
def unknown_method(bench: Bench) -> None:
    """An unknown method: ERR unsupported, with and without a body"""
    peer = bench.peer()
    peer.refused({"unsupported"}, "no such method")
    peer.refused({"unsupported"}, "", {"later": 1})
    peer.refused({"unsupported"}, "no such method", body=bytes(200_000))
    peer.alive()


@case("streams/008", "PT-STR-023 PT-STR-021 PT-TEN-022")
def body_too_long(bench: Bench) -> None:
    """More body than declared: ERR tensor; what still comes is discarded"""
    peer = bench.peer()
    answer = peer.expect(1)
    peer.link.send([REQ, 1, 0, "step", {"size": 100, "max": 0}], [DATA, 1, 0, bytes(101)])
    expect_error(peer.wait(answer), {"tensor"})
    peer.link.send(*[[DATA, 1, 0, bytes(5_000)] for _ in range(20)], [DATA, 1, END, bytes(10)])
    peer.alive()


@case("streams/009", "PT-STR-023 PT-TEN-022")
def body_too_short(bench: Bench) -> None:
    """END before all of the body, or all of it without END: ERR tensor"""
    peer = bench.peer()
    for flags, size in ((END, 49), (0, 50)):
        answer = peer.expect(peer.new_stream())
        head = [REQ, answer.stream, 0, "step", {"size": 100, "max": 0}]
        peer.link.send(head, [DATA, answer.stream, 0, bytes(50)], [DATA, answer.stream, flags, bytes(size)])
        expect_error(peer.wait(answer), {"tensor"})
    peer.alive()


def _bad_head(number: int, requirements: str, codes: str, title: str, *heads: tuple[int, Any]) -> None:
    """(flags, head) of a REQ that is refused; the connection lives."""

    def run(bench: Bench) -> None:
        peer = bench.peer()
        for flags, head in heads:
            answer = peer.expect(peer.new_stream())
            peer.link.send([REQ, answer.stream, flags, "info", head])
            peer.wait(answer)
            require(answer.code in codes.split(), f"expected: ERR {codes} for {head}; observed: {answer}")
        peer.alive()

    case(f"streams/{number:03}", f"{requirements} PT-MSG-041 PT-MSG-042", title=f"{title}: ERR {codes}")(run)


_bad_head(
    10,
    "PT-STR-010 PT-STR-011",
    "bad_request",
    "END with a size, and no END without one",
    (END, {"size": 10}),
    (0, {"size": 0}),
    (0, {}),
)
_bad_head(
    11,
    "PT-STR-011",
    "bad_request",
    "A size that is no count",
    *[(0, {"size": s}) for s in (-1, "10", True, b"1", [1], 2**63)],
)
_bad_head(
    12,
    "PT-STR-011",
    "bad_request",
    "A size above 64 MiB",
    (0, {"size": 64 * MIB + 1}),
    (0, {"size": 2**40}),
    (0, {"size": 2**62}),
)
_bad_head(
    13,
    "PT-STR-011",
    "bad_request",
    "max and dl that are no counts",
    *[(END, {n: v}) for n in ("max", "dl") for v in (-1, "1", True, 2**64 - 1)],
)


@case("streams/014", "PT-STR-020 PT-STR-021 PT-STR-024")
def peer_quota(bench: Bench) -> None:
    """Bodies of 256 MiB reserved by one peer: the next is ERR resources with retry, and CANCEL gives room back"""
    peer = bench.peer()
    held = [_reserve(peer, 64 * MIB) for _ in range(4)]
    over = _reserve(peer, 64 * MIB)
    expect_error(peer.wait(over), {"resources"})
    bench.should(over.detail.get("retry") is True, f"detail.retry: {over.detail}")
    for answer in held:
        require(not answer.ended, f"expected: 64 MiB reserved; observed: {answer}")
        peer.cancel(answer)
    again = _reserve(peer, 64 * MIB)
    peer.alive()
    require(not again.ended, f"expected: room again after CANCEL; observed: {again}")


def _reserve(peer: Peer, size: int) -> Answer:
    """A request whose body does not come."""
    answer = peer.expect(peer.new_stream())
    peer.link.send([REQ, answer.stream, 0, "step", {"size": size, "max": 0}])
    return answer


@case("streams/015", "PT-STR-008")
def too_many_streams(bench: Bench) -> None:
    """More requests at once than allowed: ERR refused with retry; the connection and the others live"""
    peer = bench.peer()
    count = ((peer.hello or {}).get("limits") or {}).get("streams", LIMIT["MAX_STREAMS"])
    held = [_reserve(peer, 10) for _ in range(count)]
    over = _reserve(peer, 10)
    expect_error(peer.wait(over), {"refused"})
    bench.should(over.detail.get("retry") is True, f"detail.retry: {over.detail}")
    peer.alive()
    require(not any(answer.ended for answer in held), f"one of the first {count} requests has ended")
    for answer in held:
        peer.cancel(answer)
    peer.ask("info")


@case("streams/016", "PT-STR-026 PT-STR-024", slow=True)
def stalled_body(bench: Bench) -> None:
    """A body that makes no progress for 10 s: its stream ends, its reservation is free, the connection lives"""
    peer = bench.peer()
    answer = _reserve(peer, 64 * MIB)
    peer.link.send([DATA, answer.stream, 0, bytes(1_000)])
    started = time.monotonic()
    while not answer.ended and time.monotonic() - started < LIMIT["BODY_STALL_SECONDS"] + 6:
        peer.drain(0.5)
    took = time.monotonic() - started
    require(answer.ended, f"expected: ended after {LIMIT['BODY_STALL_SECONDS']} s; observed: open after {took:.0f} s")
    require(took > LIMIT["BODY_STALL_SECONDS"] - 3, f"expected: after 10 s; observed: {answer} after {took:.1f} s")
    bench.should(answer.code == "deadline", f"ERR deadline, not {answer.code}")
    peer.alive()


@case("streams/017", "PT-STR-025 PT-STR-010")
def reply_above_max(bench: Bench) -> None:
    """A reply larger than the request takes: ERR resources instead, and the step is done"""
    session = bench.session()
    hidden = bench.hidden(4)
    answer = session.peer.send_request("step", session.head(hidden), session.body(hidden), max_reply=100)
    expect_error(session.peer.wait(answer), {"resources"})
    session.peer.alive()


@case("streams/018", "PT-STR-027")
def interleaved_bodies(bench: Bench) -> None:
    """The bodies of two steps in alternating small pieces: each gets its own numbers"""
    first = bench.session()
    second = bench.session(first.peer)
    peer, hidden = first.peer, [bench.hidden(6), bench.hidden(6)]
    answers, frames = [], []
    for session, values in zip((first, second), hidden, strict=True):
        answer = peer.expect(peer.new_stream())
        head = session.head(values) | {"size": len(session.body(values)), "max": 1 << 20}
        frames.append([[REQ, answer.stream, 0, "step", head], *_pieces(answer.stream, session.body(values), 333)])
        answers.append(answer)
    peer.link.send(*[frame for pair in zip(*frames, strict=True) for frame in pair])
    outputs = [s.accept(peer.wait(a), v) for s, a, v in zip((first, second), answers, hidden, strict=True)]
    alone = bench.session(peer)
    bench.close_to(outputs[0], alone.step(hidden[0]), "the first of two interleaved steps")
    alone = bench.session(peer)
    bench.close_to(outputs[1], alone.step(hidden[1]), "the second of two interleaved steps")


def _pieces(stream: int, body: bytes, size: int) -> list[Any]:
    return [
        [DATA, stream, END if at + size >= len(body) else 0, body[at : at + size]] for at in range(0, len(body), size)
    ]


@case("streams/019", "PT-STR-022 PT-STR-027")
def odd_pieces(bench: Bench) -> None:
    """A body in pieces of 1, 7 and 4,097 bytes gives the same numbers"""
    session = bench.session()
    peer, hidden = session.peer, bench.hidden(3)
    first = session.step(hidden)
    body = session.body(hidden)
    for size in (1, 7, 4_097):
        answer = peer.expect(peer.new_stream())
        head = session.head(hidden, pos=0) | {"size": len(body), "max": 1 << 20}
        peer.link.send([REQ, answer.stream, 0, "step", head], *_pieces(answer.stream, body, size))
        bench.close_to(session.accept(peer.wait(answer), hidden, pos=0), first, f"a body in pieces of {size} bytes")


@case("streams/020", "PT-STR-043 PT-STR-042 PT-SES-052 PT-SES-028 PT-ERR-001")
def cancelled_before_start(bench: Bench) -> None:
    """CANCEL in the segment of the request: no reply comes, and the session is as before"""
    session = bench.session(max_len=1024)
    peer = session.peer
    session.step(bench.hidden(3))
    hidden = bench.hidden(512)
    answer = session.send(hidden)
    peer.cancel(answer)
    settle(1.0)
    peer.alive()
    require(answer.head is None, f"expected: no reply after CANCEL; observed: {answer}")
    require(answer.code in ("", "cancelled"), f"expected: nothing or ERR cancelled; observed: {answer}")
    _before_or_after(session, hidden)


def _before_or_after(session: Session, hidden: Any) -> None:
    """The position is that before the step or that after it, and the session can go on from there."""
    deadline = time.monotonic() + WAIT
    before, after = (session.n, session.pos), (session.n + 1, session.pos + hidden.shape[1])
    found = session.status()
    require(found in (before, after), f"expected: n, pos {before} or {after}; observed: {found}")
    session.n, session.pos = found
    while (answer := session.call(hidden[:, :1])).code == "out_of_order" and time.monotonic() < deadline:
        session.n, session.pos = session.status()  # the cancelled step was still in the model
    session.accept(answer, hidden[:, :1])


@case("streams/021", "PT-STR-043 PT-SES-028 PT-SES-052")
def cancelled_in_compute(bench: Bench) -> None:
    """CANCEL while the step computes: the position is before or after, and the session goes on"""
    session = bench.session(max_len=2_048)
    session.step(bench.hidden(2))
    hidden = bench.hidden(1_024)
    for pause in (0.01, 0.05):
        answer = session.send(hidden)
        settle(pause)
        session.peer.cancel(answer)
        session.peer.drain(0.2)
        _before_or_after(session, hidden)
        session.pos = min(session.pos, 3)


@case("streams/022", "PT-STR-009")
def rapid_reset(bench: Bench) -> None:
    """2,000 requests, each cancelled at once: the connection lives or ends with GOAWAY, and others are served"""
    peer = bench.peer()
    try:
        for _ in range(20):
            answers = [peer.expect(peer.new_stream()) for _ in range(100)]
            for answer in answers:
                answer.cancelled = True
                peer.link.send([REQ, answer.stream, END, "info", {"max": 4096}], [CANCEL, answer.stream])
            peer.ping()
    except Closed:
        require(peer.goaway is not None, "the connection ended without GOAWAY")


@case("streams/023", "PT-STR-040")
def deadline_zero(bench: Bench) -> None:
    """dl 0: ERR deadline, nothing is done, the connection lives"""
    session = bench.session(max_len=1_024)
    hidden = bench.hidden(400)
    answer = session.call(hidden, dl=0)
    if answer.code:
        expect_error(answer, {"deadline"})
        session.peer.alive()
        settle(0.2)
        _before_or_after(session, hidden)
    else:
        raise Failed("expected: ERR deadline; observed: the step was done")


@case("streams/024", "PT-STR-040")
def deadline_huge(bench: Bench) -> None:
    """dl of a thousand years is clamped, not refused"""
    bench.peer().ask("info", {"dl": 2**62})


@case("streams/025", "PT-STR-027 PT-ERR-011 PT-ERR-001")
def many_at_once(bench: Bench) -> None:
    """200 requests in flight: all answered, the errors among them cost only themselves"""
    peer = bench.peer()
    answers = [peer.send_request("info" if number % 3 else "no such method") for number in range(200)]
    for number, answer in enumerate(answers):
        peer.wait(answer, 20)
        require(bool(answer.code) == (number % 3 == 0), f"request {number}: {answer}")


@case("streams/026", "PT-STR-024")
def lost_in_body(bench: Bench) -> None:
    """A connection that ends in mid-body frees what it reserved"""
    identity = Identity()
    for _ in range(3):
        peer = bench.peer(identity)
        held = [_reserve(peer, 64 * MIB) for _ in range(4)]
        peer.alive()
        require(not any(answer.ended for answer in held), "expected: 256 MiB may be reserved again after a reset")
        peer.link.close(reset=True)
        settle(0.2)


@case("streams/027", "PT-STR-025 PT-STR-028 PT-STR-029", slow=True)
def never_reads(bench: Bench) -> None:
    """A peer that reads no replies: its connection ends in time, and others are served meanwhile"""
    if bench.info is None:
        raise Skipped("the target serves no blocks")
    peer = bench.peer()
    head = {"model": bench.info["model"], "max": 1 << 20}
    started = time.monotonic()
    while not peer.link.ended and time.monotonic() - started < 20:
        for _ in range(100):
            peer.next_stream += 2
            peer.link.sock.settimeout(1.0)
            try:
                peer.link.sock.sendall(peer.link.seal(pack([REQ, peer.next_stream, END, "manifest", head])))
            except TimeoutError:  # it does not read us either any more, which is its right
                settle(1.0)
                break
            except OSError:
                return
        other = bench.peer()
        other.ping(3)
        other.close()


@case("streams/028", "PT-ERR-002 PT-ERR-001")
def error_form(bench: Bench) -> None:
    """ERR has a known code, a short text without the server's inside, and a map"""
    peer = bench.peer()
    for method in ("no such method", "x" * 64, "\x00\x1b[0m", "../../etc/passwd", "%s%n{0}"):
        answer = peer.call(method)
        require(answer.code == "unsupported", f"expected: ERR unsupported; observed: {answer}")
        retry, after = answer.detail.get("retry"), answer.detail.get("after")
        require(retry is None or type(retry) is bool, f"detail.retry is {retry!r}")
        require(after is None or type(after) is int, f"detail.after is {after!r}")


@case("streams/029", "PT-FRM-041 PT-FRM-045")
def open_request_at_goaway(bench: Bench) -> None:
    """A request that is open when we say GOAWAY is still answered; then the connection ends"""
    session = bench.session(max_len=2_048)
    hidden = bench.hidden(600)
    answer = session.send(hidden)
    session.peer.link.send([GOAWAY, 0, 0, "bye"])
    session.peer.wait(answer, 20)
    session.accept(answer, hidden)
    session.peer.link.expect_close({"normal", "shutting_down", "idle"}, 5)


@case("streams/030", "PT-STR-026", slow=True)
def dribbled_body(bench: Bench) -> None:
    """A body of a byte a second is no progress: its stream ends within the stall time and a little"""
    peer = bench.peer()
    answer = _reserve(peer, 8 * MIB)
    started = time.monotonic()
    while not answer.ended and time.monotonic() - started < LIMIT["BODY_STALL_SECONDS"] + 8:
        peer.link.send([DATA, answer.stream, 0, b"x"])
        peer.drain(0.8)
    bench.should(answer.ended, "a body that dribbles is ended")
