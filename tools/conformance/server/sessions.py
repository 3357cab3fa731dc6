"""Opening sessions and what belongs to them: info, manifest, extend, status, close (spec/07)."""

from __future__ import annotations

import hashlib
from typing import Any

from tools.conformance import tensors
from tools.conformance.bench import Bench, Session
from tools.conformance.crypto import Identity
from tools.conformance.peer import expect_error
from tools.conformance.registry import case
from tools.conformance.verdicts import Skipped, require


@case("sessions/001", "PT-SES-003 PT-MDL-050 PT-MDL-057")
def manifest(bench: Bench) -> None:
    """The manifest's SHA-256 is the model id; another model's is ERR not_served"""
    peer = bench.peer()
    answer = peer.ask("manifest", {"model": bench.model["model"]})
    require(hashlib.sha256(answer.body).digest() == bench.model["model"], "the manifest has another hash")
    wanted = [{"n": "manifest", "d": "u8", "s": [len(answer.body)], "c": "raw"}]
    require((answer.head or {}).get("t") == wanted, f"expected: t {wanted}; observed: {answer}")
    peer.refused({"not_served"}, "manifest", {"model": bytes(32)})


@case("sessions/002", "PT-SES-005")
def info(bench: Bench) -> None:
    """info has the fields of its table"""
    found = bench.peer().ask("info").head or {}
    require(type(found.get("model")) is bytes and len(found["model"]) == 32, f"model: {found.get('model')!r}")
    start, end = found["blocks"]
    require(0 <= start < end <= found["layers"] <= 4_096, f"blocks {start}:{end} of {found['layers']}")
    for name, low, high in (
        ("hidden", 1, 2**24),
        ("max_len", 1, 2**20),
        ("max_batch", 1, 1_024),
        ("cache_left", 0, 2**63),
    ):
        require(type(found.get(name)) is int and low <= found[name] <= high, f"{name}: {found.get(name)!r}")
    require(found.get("dtype") in ("float32", "bfloat16", "float16"), f"dtype: {found.get('dtype')!r}")
    require(found.get("quant") in (None, "int8"), f"quant: {found.get('quant')!r}")
    require(found.get("state") in ("joining", "online", "draining", "offline"), f"state: {found.get('state')!r}")
    require({"raw", "i8b64"} <= set(found.get("codecs", [])), f"codecs: {found.get('codecs')!r}")
    require(all(type(found.get(name)) is str for name in ("name", "version")), "name or version is no str")


@case("sessions/003", "PT-SES-015 PT-SES-012")
def opened(bench: Bench) -> None:
    """open is answered with pos 0 and a ttl"""
    head = bench.session().opened.head or {}
    require(head.get("pos") == 0, f"expected: pos 0; observed: {head}")
    require(type(head.get("ttl")) is int and 0 <= head["ttl"] <= 604_800, f"ttl: {head.get('ttl')!r}")


@case("sessions/004", "PT-SES-013")
def opened_again(bench: Bench) -> None:
    """The same open again is answered like the first; with other fields, or after a step: ERR conflict"""
    session = bench.session(max_len=32)
    peer, head = session.peer, session.open_head
    require(peer.ask("open", head).head == session.opened.head, "the second answer differs from the first")
    for change in ({"max_len": 31}, {"batch": 2}, {"dtype": "f16"}, {"codec": "i8b64"}, {"from": bytes(32)}):
        expect_error(peer.call("open", head | change), {"conflict"})
    session.step(bench.hidden(2))
    expect_error(peer.call("open", head), {"conflict"})
    session.step(bench.hidden(1))


def _not_served(number: int, requirements: str, title: str, *changes: dict[str, Any]) -> None:
    def run(bench: Bench) -> None:
        peer = bench.peer()
        start, end = bench.model["blocks"]
        for change in changes:
            if change.get("blocks") == "beyond":
                change = {"blocks": [start, end + 1]}
            answer = peer.call("open", bench.open_head(bench.rng.randbytes(16)) | change)
            require(answer.code == "not_served", f"expected: ERR not_served for {change}; observed: {answer}")
            if requirements != "PT-SES-001":
                detail = (answer.detail.get("blocks"), answer.detail.get("model"))
                require(detail == ([start, end], bench.model["model"]), f"detail {answer.detail}")

    case(f"sessions/{number:03}", requirements, title=f"{title}: ERR not_served")(run)


_not_served(
    5, "PT-SES-011", "Blocks that are not wholly served, or another model", {"blocks": "beyond"}, {"model": bytes(32)}
)
_not_served(
    6,
    "PT-SES-001",
    "A range that is empty, reversed or beyond every model",
    *[{"blocks": b} for b in ([1, 1], [2, 1], [-1, 1], [0, 4_097], [0, 2**62])],
)


@case("sessions/007", "PT-SES-001 PT-MSG-041")
def blocks_of_wrong_form(bench: Bench) -> None:
    """blocks that is no array of two integers: ERR bad_request"""
    peer = bench.peer()
    wrong: list[Any] = [[0], [0, 1, 2], ["0", "1"], 1, "0:1", [0, True], {}, []]
    for blocks in wrong:
        peer.refused({"bad_request"}, "open", bench.open_head(bench.rng.randbytes(16), blocks=blocks))


@case("sessions/008", "PT-SES-012 PT-SES-001")
def too_large(bench: Bench) -> None:
    """More cache than there is, as length, batch or product: ERR resources before anything is reserved"""
    peer = bench.peer()
    left = (peer.ask("info").head or {})["cache_left"]
    for max_len, batch in ((2**20, 1_024), (left + 1, 1_024), (2**20, 512)):
        if max_len <= 2**20 and max_len * batch > left:
            answer = peer.refused(
                {"resources"}, "open", bench.open_head(bench.rng.randbytes(16), max_len=max_len, batch=batch)
            )
            bench.should(type(answer.detail.get("retry")) is bool, f"detail.retry: {answer.detail}")
            bench.should(type(answer.detail.get("cache_left")) is int, f"detail.cache_left: {answer.detail}")
    after = (peer.ask("info").head or {})["cache_left"]
    bench.should(after == left, f"cache_left {left} before and {after} after")


@case("sessions/009", "PT-SES-001 PT-MSG-042")
def session_id_lengths(bench: Bench) -> None:
    """A sid of 0, 15, 17 or 1,000 bytes: ERR bad_request from every method"""
    peer = bench.peer()
    for size in (0, 15, 17, 1_000):
        sid = bytes(size)
        peer.refused({"bad_request"}, "open", bench.open_head(sid))
        for method in ("status", "close", "extend"):
            peer.refused({"bad_request"}, method, {"sid": sid, "max_len": 10})
        hidden = bench.hidden(1)
        head = {"sid": sid, "n": 0, "pos": 0, "t": [tensors.descriptor(hidden)]}
        peer.refused({"bad_request"}, "step", head, tensors.encode(hidden))


@case("sessions/010", "PT-SES-017", level="should")
def sessions_of_one_peer(bench: Bench) -> None:
    """More than 64 sessions of one peer: ERR resources; closing one makes room"""
    peer = bench.peer()
    sessions = [bench.session(peer, max_len=1) for _ in range(64)]
    answer = peer.refused({"resources"}, "open", bench.open_head(bytes(16), max_len=1))
    bench.should(answer.detail.get("retry") is True, f"detail.retry: {answer.detail}")
    peer.ask("close", {"sid": sessions[0].sid})
    bench.session(peer, max_len=1)


@case("sessions/011", "PT-SES-020 PT-SES-010 PT-ERR-010")
def foreign_session(bench: Bench) -> None:
    """A session of another peer answers like one that never was, with the same text, to every method"""
    session = bench.session()
    hidden = bench.hidden(2)
    session.step(hidden)
    stranger = bench.peer()
    heads = [{"sid": sid, "n": session.n, "pos": session.pos, "t": [tensors.descriptor(hidden)], "max_len": 40}
             for sid in (session.sid, bench.rng.randbytes(16))]  # fmt: skip
    for method, body in (("step", session.body(hidden)), ("status", b""), ("extend", b"")):
        answers = [stranger.call(method, head, body) for head in heads]
        seen = [(answer.code, answer.text, answer.detail) for answer in answers]
        require(seen[0][0] == "no_session", f"expected: ERR no_session from {method}; observed: {answers[0]}")
        require(seen[0] == seen[1], f"{method} tells them apart: {seen[0]} and {seen[1]}")
    stranger.ask("close", {"sid": session.sid})
    session.unchanged()
    session.step(hidden)


@case("sessions/012", "PT-SES-010 PT-SES-020")
def same_sid_two_owners(bench: Bench) -> None:
    """Two peers may use the same sid: two sessions"""
    first = bench.session()
    hidden = bench.hidden(3)
    first.step(hidden)
    second = bench.session(bench.peer(), sid=first.sid)
    second.unchanged()
    second.step(hidden[:, :1])
    first.unchanged()


@case("sessions/013", "PT-SES-040")
def extended(bench: Bench) -> None:
    """extend raises max_len; steps then go further"""
    session = bench.session(max_len=4)
    hidden = bench.hidden(6)
    session.step(hidden[:, :4])
    session.refused({"length"}, hidden[:, 4:])
    reply = session.peer.ask("extend", {"sid": session.sid, "max_len": 10}).head or {}
    require(reply.get("max_len", 0) >= 10, f"expected: max_len 10; observed: {reply}")
    whole = bench.session(session.peer).step(hidden)
    bench.close_to(session.step(hidden[:, 4:]), whole[:, 4:], "the step after extend")


@case("sessions/014", "PT-SES-040")
def extended_too_far(bench: Bench) -> None:
    """extend beyond the cache: ERR resources, nothing changes; of no session: ERR no_session"""
    session = bench.session(max_len=4, batch=4)
    session.peer.refused({"resources"}, "extend", {"sid": session.sid, "max_len": 2**20})
    status = session.peer.ask("status", {"sid": session.sid}).head or {}
    require(status.get("max_len") == 4, f"expected: max_len 4 still; observed: {status}")
    session.peer.refused({"resources"}, "extend", {"sid": session.sid, "max_len": 2**21})
    session.peer.refused({"no_session"}, "extend", {"sid": bytes(16), "max_len": 8})


@case("sessions/015", "PT-SES-041")
def status(bench: Bench) -> None:
    """status tells n, pos and max_len"""
    session = bench.session(max_len=17)
    for count in (0, 3, 1):
        if count:
            session.step(bench.hidden(count))
        head = session.peer.ask("status", {"sid": session.sid}).head or {}
        found = (head.get("n"), head.get("pos"), head.get("max_len"))
        require(found == (session.n, session.pos, 17), f"expected: {(session.n, session.pos, 17)}; observed: {found}")


@case("sessions/016", "PT-SES-042 PT-SES-020")
def closed(bench: Bench) -> None:
    """close twice succeeds, of a session that never was too; then every method says no_session"""
    session = bench.session()
    session.step(bench.hidden(2))
    for _ in range(2):
        session.peer.ask("close", {"sid": session.sid})
    session.peer.ask("close", {"sid": bytes(16)})
    session.refused({"no_session"}, bench.hidden(1))
    session.peer.refused({"no_session"}, "status", {"sid": session.sid})


@case("sessions/017", "PT-SES-042 PT-SES-012")
def closing_frees(bench: Bench) -> None:
    """close gives the cache back: half of it can be opened and closed ten times"""
    peer = bench.peer()
    left = (peer.ask("info").head or {})["cache_left"]
    size = min(left * 2 // 3, bench.model["max_len"], 2**20)
    if left // max(size, 1) > 8:
        raise Skipped("the cache is much larger than the longest session")
    for _ in range(10):
        session = bench.session(peer, max_len=size)
        peer.ask("close", {"sid": session.sid})


@case("sessions/018", "PT-SES-042 PT-SES-028")
def closed_while_running(bench: Bench) -> None:
    """close while a step runs ends the step, and the server goes on"""
    session = bench.session(max_len=2_048)
    answer = session.send(bench.hidden(1_500))
    session.peer.ask("close", {"sid": session.sid}, within=20)
    session.peer.wait(answer, 20)
    require(answer.code in ("", "no_session", "cancelled"), f"expected: done or ended; observed: {answer}")
    session.peer.refused({"no_session"}, "status", {"sid": session.sid})


@case("sessions/019", "PT-SES-010 PT-SES-050 PT-SES-030")
def resumed(bench: Bench) -> None:
    """After a reset the same peer goes on over a new connection: position, replay slot and numbers are there"""
    identity = Identity()
    session = bench.session(bench.peer(identity))
    hidden = bench.hidden(5)
    session.step(hidden[:, :4])
    last = session.call(hidden[:, 4:])
    output = session.check(last, hidden[:, 4:])
    session.peer.link.close(reset=True)
    session.peer = bench.peer(identity)
    again = session.call(hidden[:, 4:])
    require(bytes(again.body) == bytes(last.body), f"expected: the same reply; observed: {again}")
    session.accept(again, hidden[:, 4:])
    session.unchanged()
    bench.close_to(bench.session(session.peer).step(hidden)[:, 4:], output, "the step before the reset")


@case("sessions/020", "PT-SES-050 PT-SES-028")
def lost_in_step(bench: Bench) -> None:
    """A reset while a step computes: the position is before or after, and both go on rightly"""
    identity = Identity()
    session = bench.session(bench.peer(identity), max_len=2_048)
    session.step(bench.hidden(2))
    for pause in (0.0, 0.02):
        hidden = bench.hidden(900)
        session.send(hidden)
        if pause:
            session.peer.drain(pause)
        session.peer.link.close(reset=True)
        session.peer = bench.peer(identity)
        _retry_until_done(bench, session, hidden)
        session.pos = 2


def _retry_until_done(bench: Bench, session: Session, hidden: Any) -> None:
    found = session.status()
    states = ((session.n, session.pos), (session.n + 1, session.pos + hidden.shape[1]))
    require(found in states, f"expected: n, pos one of {states}; observed: {found}")
    session.accept(session.call(hidden), hidden)  # done before: the kept reply; not done: done now
    session.unchanged()


@case("sessions/021", "PT-SES-016 PT-SES-061 PT-SES-062")
def pushes_refused(bench: Bench) -> None:
    """push by a peer that open did not name: ERR forbidden; for a session that is not there: ERR no_session"""
    session = bench.session()
    hidden = bench.hidden(1)
    pusher = bench.peer()
    head = {"owner": session.peer.identity.peer, "n": 0, "pos": 0, "t": [tensors.descriptor(hidden)]}
    answer = pusher.call("push", head | {"sid": bytes(16)}, session.body(hidden))
    if answer.code == "unsupported":
        raise Skipped("the target offers no push")
    expect_error(answer, {"no_session", "forbidden"})
    expect_error(pusher.call("push", head | {"sid": session.sid}, session.body(hidden)), {"forbidden", "no_session"})
    session.unchanged()


@case("sessions/022", "PT-SES-060 PT-SES-016 PT-SES-061")
def pushed_and_awaited(bench: Bench) -> None:
    """A step pushed by the named peer answers the owner's await; the owner's own copy gets the same reply"""
    pusher = bench.peer()
    hidden = bench.hidden(2)
    named: dict[str, Any] = {"from": pusher.identity.peer}
    session = Session(bench, bench.peer(), **named)
    waiting = session.peer.send_request("await", {"sid": session.sid, "n": 0})
    head = {"owner": session.peer.identity.peer, **session.head(hidden)}
    answer = pusher.call("push", head, session.body(hidden))
    if answer.code == "unsupported":
        raise Skipped("the target offers no push")
    require(not answer.code, f"expected: push taken; observed: {answer}")
    session.peer.wait(waiting)
    session.check(waiting, hidden)
    copy = session.call(hidden)
    require(bytes(copy.body) == bytes(waiting.body), f"expected: the copy gets the same reply; observed: {copy}")
    session.accept(copy, hidden)
    session.unchanged()
