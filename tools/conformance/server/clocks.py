"""Idleness, progress, duplicate connections (spec/02, spec/03)."""

from __future__ import annotations

import time

from tools.conformance.bench import Bench, settle
from tools.conformance.constants import LIMIT
from tools.conformance.crypto import Identity
from tools.conformance.registry import case
from tools.conformance.verdicts import Closed, Failed, Hung, Skipped, require


@case("clocks/001", "PT-STR-063", slow=True)
def idle(bench: Bench) -> None:
    """A connection without requests gets GOAWAY(idle) after the idle time, and its end"""
    peer = bench.peer()
    started = time.monotonic()
    seen = peer.link.expect_close({"idle"}, LIMIT["IDLE_SECONDS"] * 3 + 10)
    took = time.monotonic() - started
    bench.should(seen == "idle", "GOAWAY(idle) before the end")
    require(took > LIMIT["IDLE_SECONDS"] / 2, f"closed after {took:.1f} s already")


@case("clocks/002", "PT-STR-063", slow=True)
def pings_are_not_requests(bench: Bench) -> None:
    """PINGs do not keep a connection from being idle"""
    peer = bench.peer()
    started = time.monotonic()
    try:
        while time.monotonic() - started < LIMIT["IDLE_SECONDS"] * 3:
            peer.ping(2)
            settle(0.5)
    except (Closed, Hung):
        return
    bench.should(False, "idle although pinged")


@case("clocks/003", "PT-SES-010 PT-SES-050", slow=True)
def session_outlives_connection(bench: Bench) -> None:
    """A session goes on over a new connection after the first has ended as idle"""
    identity = Identity()
    session = bench.session(bench.peer(identity))
    hidden = bench.hidden(4)
    session.step(hidden[:, :2])
    session.peer.link.expect_close({"idle"}, LIMIT["IDLE_SECONDS"] * 3 + 10)
    session.peer = bench.peer(identity)
    session.unchanged()
    whole = bench.session(session.peer).step(hidden)
    bench.close_to(session.step(hidden[:, 2:]), whole[:, 2:], "the step after the reconnection")


@case("clocks/004", "PT-STR-052 PT-FRM-030 PT-STR-063")
def progress(bench: Bench) -> None:
    """While requests are queued or run for long, PROGRESS comes each half second and PING is answered"""
    peers = [bench.peer() for _ in range(3)]  # a server may let one peer queue only so much
    count = max(4, min(40, bench.model["cache_left"] // 1_100))
    sessions = [bench.session(peers[i % len(peers)], max_len=1_024) for i in range(count)]
    hidden = bench.hidden(1_024)
    started = time.monotonic()
    answers = [session.send(hidden) for session in sessions]
    slowest = 0.0
    while not all(answer.ended for answer in answers):
        for peer in peers:
            asked = time.monotonic()
            require(asked - started < 120, "the steps took more than two minutes")
            peer.ping(5)
            slowest = max(slowest, time.monotonic() - asked)
            peer.drain(0.03)
    took = time.monotonic() - started
    bench.should(slowest < 1.0, f"PING answered within 1 s while computing, not {slowest:.1f} s")
    seen = sum(answer.progress for answer in answers)
    if took > 1.5:
        require(seen > 0, f"expected: PROGRESS while {len(answers)} steps took {took:.1f} s; observed: none")


@case("clocks/005", "PT-STR-061 PT-STR-060 PT-SES-010")
def newest_wins(bench: Bench) -> None:
    """Two connections dialled by one peer: the newer works, the older drains and gets GOAWAY(duplicate)"""
    identity = Identity()
    first = bench.peer(identity)
    session = bench.session(first)
    second = bench.peer(identity)
    second.ping()
    session.peer = second
    session.step(bench.hidden(2))
    seen = first.link.expect_close({"duplicate"}, 5)
    bench.should(seen == "duplicate", "GOAWAY(duplicate) on the older connection")


@case("clocks/006", "PT-STR-061 PT-FRM-041 PT-SES-010")
def duplicate_drains(bench: Bench) -> None:
    """A request open on the older of two connections is still answered"""
    identity = Identity()
    first = bench.peer(identity)
    session = bench.session(first, max_len=1_024)
    hidden = bench.hidden(700)
    answer = session.send(hidden)
    second = bench.peer(identity)
    second.ping()
    first.wait(answer, 20)
    session.accept(answer, hidden)
    session.peer = second
    session.unchanged()


@case("clocks/007", "PT-SES-015", slow=True)
def never_stepped(bench: Bench) -> None:
    """A session opened without a step lapses after 10 s"""
    identity = Identity()
    session = bench.session(bench.peer(identity))
    settle(LIMIT["SESSION_OPEN_SECONDS"] + 3)
    session.peer = bench.peer(identity)
    answer = session.call(bench.hidden(1))
    require(answer.code == "no_session", f"expected: ERR no_session; observed: {answer}")


@case("clocks/008", "PT-SES-015", slow=True)
def stepped_stays(bench: Bench) -> None:
    """A session with a step done is still there after those 10 s"""
    identity = Identity()
    session = bench.session(bench.peer(identity))
    if (session.opened.head or {}).get("ttl", 0) < 30:
        raise Skipped("the target keeps idle sessions for less than 30 s")
    session.step(bench.hidden(2))
    settle(LIMIT["SESSION_OPEN_SECONDS"] + 3)
    session.peer = bench.peer(identity)
    session.step(bench.hidden(1))


@case("clocks/009", "PT-STR-065")
def connections_by_one_host(bench: Bench) -> None:
    """40 authenticated connections of one host, each of another peer: all are served"""
    peers = []
    for _ in range(40):
        try:
            peers.append(bench.peer())
        except Failed as failure:
            raise Failed(f"connection {len(peers) + 1}: {failure}") from None
    for peer in peers:
        peer.ping()
        peer.close()


@case("clocks/010", "PT-STR-063 PT-FRM-020", slow=True)
def no_hello(bench: Bench) -> None:
    """A peer that shakes hands and says nothing more, not even HELLO, is sent away as idle"""
    link = bench.link()
    seen = link.expect_close({"idle", "protocol"}, LIMIT["IDLE_SECONDS"] * 3 + 10)
    bench.should(seen, "GOAWAY before the end")
