"""Every error code has its consequence, and only a peer's own fault costs it its name."""

from __future__ import annotations

import pytest

from petalite.client.verdicts import AVOID_SECONDS, LONG_AVOID_SECONDS, MOST_AGAIN, Judge, Verdict, retry_after
from petalite.errors import ErrorCode, RequestError
from petalite.identity import PeerId

A, B = PeerId(b"a" * 32), PeerId(b"b" * 32)

# What the answer to a step leads to.
STEP = {
    ErrorCode.BAD_REQUEST: Verdict.ACCUSED,
    ErrorCode.UNSUPPORTED: Verdict.ACCUSED,
    ErrorCode.NO_SESSION: Verdict.REOPEN,
    ErrorCode.CONFLICT: Verdict.REOPEN,
    ErrorCode.OUT_OF_ORDER: Verdict.REOPEN,
    ErrorCode.LENGTH: Verdict.BAN,
    ErrorCode.POSITION: Verdict.REOPEN,
    ErrorCode.NOT_SERVED: Verdict.AVOID,
    ErrorCode.RESOURCES: Verdict.BAN,
    ErrorCode.BUSY: Verdict.AGAIN,
    ErrorCode.DEADLINE: Verdict.AVOID,
    ErrorCode.CANCELLED: Verdict.REOPEN,
    ErrorCode.FORBIDDEN: Verdict.AVOID,
    ErrorCode.RATE: Verdict.AGAIN,
    ErrorCode.INTERNAL: Verdict.BAN,
    ErrorCode.TENSOR: Verdict.ACCUSED,
    ErrorCode.UNAVAILABLE: Verdict.AVOID,
    ErrorCode.REFUSED: Verdict.AGAIN,
}


def test_the_table_names_every_code() -> None:
    assert set(STEP) == set(ErrorCode)


@pytest.mark.parametrize("code", ErrorCode)
def test_answer_to_a_step(code: ErrorCode) -> None:
    assert Judge().refused(A, "step", RequestError(code, "no"), 0.0) is STEP[code]


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (ErrorCode.RESOURCES, Verdict.AVOID),
        (ErrorCode.TENSOR, Verdict.BAN),
        (ErrorCode.OUT_OF_ORDER, Verdict.BAN),
        (ErrorCode.NOT_SERVED, Verdict.AVOID),
        (ErrorCode.INTERNAL, Verdict.BAN),
    ],
)
def test_answer_to_open(code: ErrorCode, verdict: Verdict) -> None:
    assert Judge().refused(A, "open", RequestError(code, "no"), 0.0) is verdict


@pytest.mark.parametrize("method", ["forward", "backward"])
@pytest.mark.parametrize(
    ("code", "detail", "verdict"),
    [
        (ErrorCode.TENSOR, {}, Verdict.ACCUSED),
        (ErrorCode.RESOURCES, {"retry": True}, Verdict.AVOID),
        (ErrorCode.RESOURCES, {"retry": False}, Verdict.ACCUSED),
        (ErrorCode.BUSY, {}, Verdict.AGAIN),
        (ErrorCode.CANCELLED, {}, Verdict.AGAIN),
        (ErrorCode.NOT_SERVED, {}, Verdict.AVOID),
        (ErrorCode.UNAVAILABLE, {}, Verdict.AVOID),
        (ErrorCode.NO_SESSION, {}, Verdict.BAN),
        (ErrorCode.INTERNAL, {}, Verdict.BAN),
    ],
)
def test_answer_to_a_training_request(method: str, code: ErrorCode, detail: dict[str, bool], verdict: Verdict) -> None:
    assert Judge().refused(A, method, RequestError(code, "no", detail), 0.0) is verdict


def test_a_full_server_is_avoided_as_long_as_it_says_within_our_bounds() -> None:
    judge = Judge()
    judge.refused(A, "open", RequestError(ErrorCode.RESOURCES, "full", {"retry": True, "after": 4000}), 10.0)
    judge.refused(B, "open", RequestError(ErrorCode.RESOURCES, "full", {"retry": True, "after": 10**9}), 10.0)
    assert judge.short_of_room
    assert judge.avoided(13.9) == {A, B}
    assert judge.avoided(14.0) == {B}
    assert judge.avoided(40.0) == frozenset()


def test_a_server_too_small_for_the_session_is_avoided_for_long() -> None:
    judge = Judge()
    judge.refused(A, "open", RequestError(ErrorCode.RESOURCES, "too small", {"retry": False}), 0.0)
    assert judge.avoided(LONG_AVOID_SECONDS - 1) == {A}


def test_a_server_that_forgets_again_and_again_is_banned_but_not_one_that_does_so_each_hour() -> None:
    judge, error = Judge(), RequestError(ErrorCode.NO_SESSION, "no such session")
    assert [judge.refused(A, "step", error, now) for now in (0.0, 1.0, 2.0)] == [
        Verdict.REOPEN,
        Verdict.REOPEN,
        Verdict.BAN,
    ]
    assert all(judge.refused(B, "step", error, 3600.0 * hour) is Verdict.REOPEN for hour in range(20))


def test_a_busy_server_is_asked_again_a_few_times_then_avoided() -> None:
    judge, error = Judge(), RequestError(ErrorCode.BUSY, "busy", {"retry": True, "after": 100})
    verdicts = [judge.refused(A, "step", error, 0.0) for _ in range(MOST_AGAIN + 1)]
    assert verdicts == [Verdict.AGAIN] * MOST_AGAIN + [Verdict.AVOID]
    judge.succeeded(A)
    assert judge.refused(A, "step", error, 0.0) is Verdict.AGAIN


def test_who_accuses_twice_is_believed_when_nobody_else_is_left() -> None:
    judge, error = Judge(), RequestError(ErrorCode.BAD_REQUEST, "wrong")
    assert not judge.retry_accusers()
    judge.refused(A, "step", error, 0.0)
    assert judge.retry_accusers()
    assert judge.avoided(0.0) == frozenset()
    judge.refused(A, "step", error, 0.0)
    with pytest.raises(RequestError, match="wrong"):
        judge.retry_accusers()


def test_an_accusation_is_forgotten_when_another_server_did_the_step() -> None:
    judge = Judge()
    judge.refused(A, "step", RequestError(ErrorCode.BAD_REQUEST, "wrong"), 0.0)
    assert judge.avoided(0.0) == {A}
    judge.step_done()
    assert judge.avoided(0.0) == frozenset()


@pytest.mark.parametrize("after", [None, -1, "1", 1.5, True])
def test_a_wrong_after_is_no_order(after: object) -> None:
    assert retry_after({"after": after}, AVOID_SECONDS) == AVOID_SECONDS


def test_causes_are_bounded() -> None:
    judge = Judge()
    for i in range(1000):
        judge.note(str(i))
    assert judge.causes == [str(i) for i in range(992, 1000)]
