"""Steps: numbers, positions, retries, rollback, reorder, padding (spec/07, spec/06)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tools.conformance import tensors
from tools.conformance.bench import Bench
from tools.conformance.constants import LIMIT
from tools.conformance.peer import expect_error
from tools.conformance.registry import case
from tools.conformance.verdicts import require

NUMBERS = "PT-MDL-010 PT-MDL-020 PT-MDL-021 PT-MDL-022 PT-MDL-023 PT-MDL-030"


@case("steps/001", f"{NUMBERS} PT-SES-027")
def formula_numbers(bench: Bench) -> None:
    """A prefill of 12 tokens gives the formula model's numbers"""
    hidden = bench.hidden(12)
    bench.close_to(bench.session().step(hidden)[0], bench.formula(hidden[0]), "12 tokens")


@case("steps/002", f"PT-MDL-031 PT-SES-035 {NUMBERS}")
def cut_into_steps(bench: Bench) -> None:
    """The same tokens in one step, one by one, and in uneven pieces: the same numbers"""
    peer = bench.peer()
    hidden = bench.hidden(20)
    whole = bench.session(peer).step(hidden)
    for cuts in (range(1, 20), (1, 2, 9, 16), (19,)):
        session = bench.session(peer)
        parts = [session.step(part) for part in np.split(hidden, list(cuts), axis=1)]
        bench.close_to(np.concatenate(parts, axis=1), whole, f"cut at {list(cuts)}")


@case("steps/003", "PT-SES-030 PT-SES-027")
def retried(bench: Bench) -> None:
    """The last step sent again: the same bytes, and the position moves once"""
    session = bench.session()
    session.step(bench.hidden(3))
    hidden = bench.hidden(2)
    first = session.call(hidden)
    for _ in range(3):
        again = session.call(hidden)
        require(not again.code and again.body == first.body, f"expected: the same reply; observed: {again}")
    session.accept(first, hidden)
    session.unchanged()
    session.step(bench.hidden(1))


@case("steps/004", "PT-SES-031")
def conflict(bench: Bench) -> None:
    """The number of the last step with other content: ERR conflict, nothing changes"""
    session = bench.session()
    hidden = bench.hidden(3)
    session.step(hidden)
    for changed, changes in (
        (bench.hidden(3), {}), (hidden[:, :2], {}), (hidden, {"pad": [1]}), (hidden, {"hypo": [0]}),
    ):  # fmt: skip
        session.refused({"conflict"}, changed, n=0, pos=0, **changes)
        session.unchanged()
    session.step(bench.hidden(1))


@case("steps/005", "PT-SES-022")
def out_of_order(bench: Bench) -> None:
    """A step ahead of the next, or before the last: ERR out_of_order with the number due, nothing changes"""
    session = bench.session()
    for _ in range(3):
        session.step(bench.hidden(1))
    for n in (session.n + 1, session.n + 2, session.n - 2, 0, 2**62):
        answer = session.refused({"out_of_order"}, bench.hidden(1), n=n)
        require(answer.detail.get("n") == session.n, f"expected: detail n {session.n}; observed: {answer}")
        session.unchanged()
    session.step(bench.hidden(1))


@case("steps/006", "PT-SES-023")
def beyond_position(bench: Bench) -> None:
    """A pos beyond the session's, or negative: ERR position, nothing changes"""
    session = bench.session()
    session.step(bench.hidden(4))
    answer = session.refused({"position"}, bench.hidden(1), pos=5)
    require(answer.detail.get("pos") == 4, f"expected: detail pos 4; observed: {answer}")
    for pos in (60, -1, 2**40):
        session.refused({"position"}, bench.hidden(1), pos=pos)
        session.unchanged()


@case("steps/007", "PT-SES-023 PT-MDL-032")
def rolled_back(bench: Bench) -> None:
    """A pos before the session's cuts the cache: numbers as if only the first tokens had been sent"""
    session = bench.session()
    hidden, other = bench.hidden(8), bench.hidden(4)
    session.step(hidden)
    for keep in (5, 3, 0):
        row = np.concatenate([hidden[:, :keep], other], axis=1)
        wanted = bench.session(session.peer).step(row)[:, keep:]
        bench.close_to(session.step(other, pos=keep), wanted, f"after a rollback to {keep}")
        if keep:
            session.step(hidden[:, keep:], pos=keep)


@case("steps/008", "PT-SES-024")
def past_the_length(bench: Bench) -> None:
    """A step past max_len: ERR length with both numbers; the session stays usable at its position"""
    session = bench.session(max_len=6)
    hidden = bench.hidden(8)
    session.step(hidden[:, :4])
    answer = session.refused({"length"}, hidden[:, 4:7])
    wanted = {"max_len": 6, "pos": 4}
    require(wanted.items() <= answer.detail.items(), f"expected: detail {wanted}; observed: {answer}")
    session.unchanged()
    session.step(hidden[:, 4:6])
    session.refused({"length"}, hidden[:, 6:7])
    session.step(hidden[:, 5:6], pos=5)


@case("steps/009", "PT-SES-025 PT-MDL-033")
def reordered(bench: Bench) -> None:
    """hypo: row i continues what row hypo[i] was; two rows may continue one"""
    session = bench.session(batch=3)
    rows, more = bench.hidden(4, 3), bench.hidden(2, 3)
    session.step(rows)
    for hypo in ([2, 0, 0], [1, 2, 0]):
        rows = rows[hypo]
        output = session.step(more, hypo=hypo)
        rows = np.concatenate([rows, more], axis=1)
        wanted = bench.session(session.peer, batch=3).step(rows)[:, -2:]
        bench.close_to(output, wanted, f"hypo {hypo}")


@case("steps/010", "PT-SES-001 PT-SES-025 PT-SES-026")
def wrong_rows(bench: Bench) -> None:
    """hypo and pad of another length, of wrong types or out of range: ERR bad_request, nothing changes"""
    session = bench.session(batch=2)
    hidden = bench.hidden(3, 2)
    session.step(hidden)
    wrong: tuple[dict[str, Any], ...] = (
        {"hypo": [0]}, {"hypo": [0, 1, 0]}, {"hypo": [0, 2]}, {"hypo": [-1, 0]}, {"hypo": [True, 0]}, {"hypo": 1},
        {"hypo": []}, {"pad": [0]}, {"pad": [0, -1]}, {"pad": [0, 2**21]}, {"pad": ["0", 0]}, {"pad": b"\0\0"},
    )  # fmt: skip
    for changes in wrong:
        session.refused({"bad_request"}, hidden, **changes)
        session.unchanged()


@case("steps/011", "PT-SES-026 PT-MDL-034 PT-MDL-035")
def padded(bench: Bench) -> None:
    """Left padding: a padded row gives the numbers of the row without it, in this step and in later ones"""
    session = bench.session(batch=2)
    hidden = bench.hidden(7, 2)
    first = session.step(hidden[:, :5], pad=[3, 0])
    second = session.step(hidden[:, 5:], pad=[3, 0])
    require(bool(np.isfinite(first).all()), "outputs at padded positions are not finite")
    alone = bench.session(session.peer).step(hidden[:1, 3:])[0]
    bench.close_to(np.concatenate([first[0, 3:], second[0]]), alone, "the padded row")
    alone = bench.session(session.peer).step(hidden[1:])[0]
    bench.close_to(np.concatenate([first[1], second[1]]), alone, "the row beside it")


@case("steps/012", "PT-MDL-036")
def rows_apart(bench: Bench) -> None:
    """The rows of a batch do not influence each other"""
    hidden = bench.hidden(6, 3)
    peer = bench.peer()
    together = bench.session(peer, batch=3).step(hidden)
    for row in range(3):
        alone = bench.session(peer).step(hidden[row : row + 1])
        bench.close_to(together[row], alone[0], f"row {row}")


@case("steps/013", "PT-MDL-036")
def sessions_apart(bench: Bench) -> None:
    """Steps of eight sessions at once do not influence each other"""
    peer = bench.peer()
    sessions = [bench.session(peer) for _ in range(8)]
    hidden = [bench.hidden(6) for _ in sessions]
    for session, values in zip(sessions, hidden, strict=True):
        session.step(values[:, :5])
    answers = [session.send(values[:, 5:]) for session, values in zip(sessions, hidden, strict=True)]
    for session, values, answer in zip(sessions, hidden, answers, strict=True):
        output = session.accept(peer.wait(answer), values[:, 5:])
        wanted = bench.session(peer).step(values)[:, 5:]
        bench.close_to(output, wanted, "one of eight steps at once")
        peer.ask("close", {"sid": bench.sessions.pop().sid})


@case("steps/014", "PT-SES-032")
def joined(bench: Bench) -> None:
    """The same step twice at once: both get the one result, and the position moves once"""
    session = bench.session(max_len=1_024)
    hidden = bench.hidden(500)
    answers = [session.send(hidden) for _ in range(3)]
    for answer in answers:
        session.check(session.peer.wait(answer, 20), hidden)
    require(len({bytes(answer.body) for answer in answers}) == 1, "the replies differ")
    session.n, session.pos = 1, 500
    session.unchanged()


@case("steps/015", "PT-SES-031")
def conflict_while_running(bench: Bench) -> None:
    """The number of a running step with other content: ERR conflict, and the first is done"""
    session = bench.session(max_len=2_048)
    hidden, other = bench.hidden(1_200), bench.hidden(1_200)
    first, second = session.send(hidden), session.send(other)
    expect_error(session.peer.wait(second, 20), {"conflict"})
    session.accept(session.peer.wait(first, 20), hidden)
    session.unchanged()


@case("steps/016", "PT-SES-001 PT-SES-021")
def fields(bench: Bench) -> None:
    """n, pos and t that are missing or of wrong types: ERR bad_request, nothing changes"""
    session = bench.session()
    hidden = bench.hidden(2)
    session.step(hidden)
    for changes in (
        {"n": None},
        {"n": True},
        {"n": "1"},
        {"n": -1},
        {"n": 2**63},
        {"pos": None},
        {"pos": "0"},
        {"pos": True},
        {"t": None},
    ):
        session.refused({"bad_request"}, hidden, **changes)
        session.unchanged()


@case("steps/017", "PT-SES-034")
def too_many_bytes(bench: Bench) -> None:
    """A step larger than the server takes: ERR resources or length, and the session lives"""
    limit = LIMIT["MAX_STEP_BYTES"]
    tokens = limit // (4 * bench.width) + 1
    session = bench.session()
    session.step(bench.hidden(1))
    hidden = np.zeros((1, tokens, bench.width), np.float32)
    session.refused({"resources", "length"}, hidden)
    session.unchanged()


@case("steps/018", "PT-SES-021")
def other_batch(bench: Bench) -> None:
    """Another batch than the session's: ERR tensor, nothing changes"""
    session = bench.session(batch=2)
    session.step(bench.hidden(2, 2))
    for batch in (1, 3):
        session.refused({"tensor"}, bench.hidden(2, batch))
        session.unchanged()


@case("steps/019", "PT-SES-014")
def other_codec(bench: Bench) -> None:
    """A step in another type or codec than the session's: answered in the session's, or ERR tensor"""
    session = bench.session(dtype="f32", codec="raw")
    hidden = bench.hidden(3)
    tensor = tensors.descriptor(hidden, "f16", "i8b64")
    answer = session.peer.call("step", session.head(hidden, t=[tensor]), tensors.encode(hidden, "f16", "i8b64"))
    if answer.code:
        expect_error(answer, {"tensor"})
        session.unchanged()
    else:
        session.accept(answer, hidden)


@case("steps/020", "PT-SES-028")
def failed_changes_nothing(bench: Bench) -> None:
    """After a step that failed for NaN the numbers go on as if it had not been"""
    session = bench.session()
    hidden = bench.hidden(6)
    session.step(hidden[:, :3])
    bad = hidden[:, 3:].copy()
    bad[0, -1, -1] = np.nan
    session.refused({"tensor"}, bad)
    session.unchanged()
    wanted = bench.session(session.peer).step(hidden)[:, 3:]
    bench.close_to(session.step(hidden[:, 3:]), wanted, "after a step that failed")


@case("steps/021", "PT-MDL-031 PT-SES-034 PT-SES-035")
def long_prefill(bench: Bench) -> None:
    """A prefill of 600 tokens, which a server may cut, gives the numbers of three of 200"""
    peer = bench.peer()
    hidden = bench.hidden(600)
    whole = bench.session(peer, max_len=600).step(hidden)
    session = bench.session(peer, max_len=600)
    parts = [session.step(part) for part in np.split(hidden, 3, axis=1)]
    bench.close_to(whole, np.concatenate(parts, axis=1), "600 tokens at once", 1e-3)


@case("steps/022", "PT-SES-063 PT-SES-001")
def routes(bench: Bench) -> None:
    """next with a peer twice, none, 16 entries or wrong fields: ERR bad_request"""
    session = bench.session()
    hidden = bench.hidden(1)
    hop = {"peer": bytes(32), "sid": bytes(16)}
    many = [{"peer": bytes([number]) * 32, "sid": bytes(16)} for number in range(16)]
    for route in ([], [hop, hop], many, [{"peer": bytes(31), "sid": bytes(16)}], [{"peer": bytes(32)}], hop, [7]):
        session.refused({"bad_request"}, hidden, next=route)
        session.unchanged()


@case("steps/023", "PT-SES-030")
def route_is_no_content(bench: Bench) -> None:
    """next is no part of a step's content: a retry with another route gets the same reply"""
    session = bench.session()
    hidden = bench.hidden(2)
    first = session.call(hidden)
    session.check(first, hidden)
    again = session.call(hidden, next=[{"peer": bytes(32), "sid": bytes(16)}])
    require(again.body == first.body, f"expected: the same reply; observed: {again}")


@case("steps/024", "PT-SES-023 PT-SES-028 PT-SES-030")
def rollback_then_retry(bench: Bench) -> None:
    """A step that rolled back, sent again, is answered from its kept reply and cuts nothing twice"""
    session = bench.session()
    hidden = bench.hidden(6)
    session.step(hidden)
    first = session.call(hidden[:, 2:3], pos=2)
    again = session.call(hidden[:, 2:3], pos=2)
    require(again.body == first.body, f"expected: the same reply; observed: {again}")
    session.accept(again, hidden[:, 2:3], pos=2)
    session.unchanged()


@case("steps/025", "PT-SES-037 PT-TEN-043")
def last_tokens(bench: Bench) -> None:
    """last: the reply holds the last tokens of each row, in every codec; all tokens are cached"""
    peer = bench.peer()
    hidden, more = bench.hidden(7, 2), bench.hidden(1, 2)
    pad = {"pad": [3, 0]}
    for codec in ("raw", "i8b64"):
        plain = bench.session(peer, batch=2, codec=codec)
        whole, behind = plain.step(hidden, **pad), plain.step(more, **pad)
        for last in (1, 3, 7):
            session = bench.session(peer, batch=2, codec=codec)
            output = session.step(hidden, last=last, **pad)
            tolerance = 0.1 if codec == "i8b64" else 0.0  # a number off by rounding may get another code
            bench.close_to(output, whole[:, -last:], f"the last {last} of 7 tokens, {codec}", tolerance)
            bench.close_to(session.step(more, last=1, **pad), behind, f"the token behind, {codec}", tolerance)
    session = bench.session(peer, batch=2)
    session.step(hidden, last=1, next=[{"peer": bytes(32), "sid": bytes(16)}])  # the route goes on: all are answered


@case("steps/026", "PT-SES-038 PT-SES-001")
def wrong_last(bench: Bench) -> None:
    """A last of 0, below, above the step's tokens or of another type: ERR bad_request, nothing changes"""
    session = bench.session()
    hidden = bench.hidden(3)
    session.step(hidden)
    for last in (0, -1, 4, 2**40, True, "1", [1], b"\x01"):
        session.refused({"bad_request"}, hidden, last=last)
        session.unchanged()
    session.step(hidden, last=3)


@case("steps/027", "PT-SES-039 PT-SES-030")
def last_of_a_retry(bench: Bench) -> None:
    """A retry gets as many tokens as were asked for first, and conflict if it asks for more"""
    session = bench.session()
    hidden = bench.hidden(4)
    first = session.call(hidden, last=2)
    session.check(first, hidden, last=2)
    for last in (2, 1):
        again = session.call(hidden, last=last)
        require(not again.code and again.body == first.body, f"expected: the same reply; observed: {again}")
    session.refused({"conflict"}, hidden)
    session.refused({"conflict"}, hidden, last=3)
    session.accept(first, hidden, last=2)
    session.unchanged()
    session.step(bench.hidden(1))
