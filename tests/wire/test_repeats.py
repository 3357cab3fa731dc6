"""Frames recognized by their like: nothing else is decoded, accepted or refused than by the strict decoder."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.errors import RemoteProtocolError, RequestError
from petalite.wire import frames, messages, packing
from petalite.wire.heads import RepeatedHead, encode_head
from petalite.wire.repeats import _MOST_PATTERNS, KnownHead, Repeats
from petalite.wire.tensors import Descriptor

INTEGERS = st.integers(0, 2**64 - 1) | st.integers(-(2**63), 2**64 - 1)
SCALARS = st.none() | st.booleans() | INTEGERS | st.binary(max_size=4) | st.text(max_size=3)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text("xyz", max_size=2), SCALARS, max_size=2)
HEADS = st.dictionaries(st.text("ab!", min_size=1, max_size=2), VALUES, max_size=18)
STREAMS = st.integers(1, frames.LARGEST_STREAM)
BODIES = st.binary(max_size=40)


def encoded(method: str, stream: int, head: dict[str, Any], body: bytes) -> bytes:
    """A REQ, or without a method a RES, as a connection writes it."""
    packed, end = packing.encode(head, within=1), True
    if method:
        made = frames.with_stream(_with(frames.encode_req(end, method, packed), body), stream)
    else:
        made = _with(frames.encode_res(stream, end, packed), body)
    return made + body


def _with(start: bytes, body: bytes) -> bytes:
    return frames.with_body(start, len(body)) if body else start


def outcome(decode: Any, data: bytes) -> object:
    try:
        return decode(memoryview(data))
    except RemoteProtocolError as error:
        return type(error), str(error), error.code


@given(st.sampled_from(["", "step"]), HEADS, st.lists(st.tuples(STREAMS, INTEGERS, BODIES), max_size=4), st.data())
def test_every_frame_is_what_the_decoder_makes_of_it(
    method: str, head: dict[str, Any], likes: list[tuple[int, int, bytes]], data: st.DataObject
) -> None:
    repeats = Repeats()
    for stream, integer, body in likes:
        for name in [name for name, value in head.items() if type(value) is int][:2]:
            head = head | {name: integer}
        frame = encoded(method, stream, head, body)
        assert outcome(repeats.decode, frame) == outcome(frames.decode, frame)
        at = data.draw(st.integers(0, len(frame) - 1))
        wrong = [frame[:at], frame + b"\x00", frame[:at] + bytes((data.draw(st.integers(0, 255)),)) + frame[at + 1 :]]
        for changed in wrong:
            assert outcome(repeats.decode, changed) == outcome(frames.decode, changed)


SID, TENSOR = bytes(range(16)), Descriptor("h", "f16", (1, 1, 8))
STEP = messages.Step(sid=SID, n=3, pos=9, tensors=(TENSOR,)).template("n", "pos")
REPLY = messages.StepReply(n=3, pos=9, tensors=(TENSOR,)).template("n", "pos")


def step_frame(stream: int, n: int, pos: int, added: dict[str, int] | None = None, body: bytes = bytes(16)) -> bytes:
    head = encode_head(RepeatedHead(STEP, n=n, pos=pos), {"size": 16, "max": 16, "dl": 60_000, **(added or {})})
    return frames.with_stream(frames.with_body(frames.encode_req(True, "step", head), len(body)), stream) + body


def reply_frame(stream: int, n: int, pos: int) -> bytes:
    head = encode_head(RepeatedHead(REPLY, n=n, pos=pos), {"size": 16})
    return frames.with_body(frames.encode_res(stream, True, head), 16) + bytes(range(16))


@pytest.mark.parametrize("n", [4, 127, 128, 255, 256, 65_535, 65_536, 2**32, 2**51])
@pytest.mark.parametrize("make", [step_frame, reply_frame])
def test_a_decoding_is_recognized_from_its_second_step_on(make: Any, n: int) -> None:
    repeats = Repeats()
    first = repeats.decode(memoryview(make(1, 3, 9)))
    later = repeats.decode(memoryview(make(2 * n + 1, n, n + 60)))
    assert (type(first.head), type(later.head)) == (dict, KnownHead)
    assert later == frames.decode(memoryview(make(2 * n + 1, n, n + 60)))
    assert (later.stream, later.head["n"], later.head["pos"]) == (2 * n + 1, n, n + 60)


@pytest.mark.parametrize("stream", [0, 2**53, 2**64 - 1])
def test_a_stream_that_cannot_be_is_refused(stream: int) -> None:
    repeats = Repeats()
    repeats.decode(memoryview(step_frame(1, 3, 9)))
    with pytest.raises(RemoteProtocolError, match="stream id"):
        repeats.decode(memoryview(step_frame(stream, 4, 10)))


@pytest.mark.parametrize(
    ("kind", "make"), [(messages.Step, step_frame), (messages.StepReply, reply_frame)], ids=["step", "reply"]
)
@given(n=INTEGERS.filter(lambda n: n >= 0), pos=INTEGERS.filter(lambda n: n >= 0))
def test_a_message_from_a_known_head_is_checked_as_any(kind: Any, make: Any, n: int, pos: int) -> None:
    repeats = Repeats()
    for stream in (1, 3):  # the first known head is checked whole, the next one by its integers
        repeats.decode(memoryview(make(stream, 3, 9)))
        kind.from_wire(repeats.decode(memoryview(make(stream + 4, 5, 10))).head)
    head = repeats.decode(memoryview(make(9, n, pos))).head
    assert type(head) is KnownHead
    found = []
    for given_head in (head, dict(head)):
        try:
            found.append(kind.from_wire(given_head))
        except RequestError as error:
            found.append((error.code, str(error)))
    assert found[0] == found[1]


def test_a_known_head_is_no_message_of_another_kind() -> None:
    repeats = Repeats()
    repeats.decode(memoryview(step_frame(1, 3, 9)))
    head = repeats.decode(memoryview(step_frame(3, 4, 10))).head
    assert messages.Step.from_wire(head).n == 4
    with pytest.raises(RequestError, match="owner"):
        messages.Push.from_wire(head)


def test_a_head_with_a_critical_field_is_never_known() -> None:
    """Known heads are not looked at for such."""
    repeats = Repeats()
    for stream in (1, 3, 5):
        head = repeats.decode(memoryview(step_frame(stream, 3, 9, {"!new": 1}))).head
        assert type(head) is dict and head["!new"] == 1


def test_a_known_head_is_read_as_any_other() -> None:
    repeats = Repeats()
    repeats.decode(memoryview(step_frame(1, 3, 9)))
    head = repeats.decode(memoryview(step_frame(3, 4, 10))).head
    assert type(head) is KnownHead
    assert dict(head) == frames.decode(memoryview(step_frame(3, 4, 10))).head
    assert len(head) == len(dict(head))
    assert (head["n"], head.get("n"), head.get("nothing"), head.get("nothing", 7)) == (4, 4, None, 7)
    with pytest.raises(KeyError):
        head["nothing"]


def test_what_a_peer_can_have_us_remember_is_bounded() -> None:
    """Empty maps are the largest objects that a byte can make."""
    repeats = Repeats()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for number in range(40 * _MOST_PATTERNS):
        sid = number.to_bytes(16, "big")
        repeats.decode(memoryview(encoded("step", 1, {"sid": sid, "n": 1, "m": [{}] * (number % 80)}, b"x")))
        repeats.decode(memoryview(encoded("step", 1, {"sid": sid, "long": bytes(number % 400), "n": 1}, b"x")))
        repeats.decode(memoryview(encoded("step", 1, {"sid": sid, "big": bytes(600)}, b"x")))
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 2**20
    assert len(repeats._patterns) == _MOST_PATTERNS
    assert len(repeats._lengths) <= 4


@pytest.mark.parametrize("head", [{f"{i:x}": i for i in range(1000)}, {"m": [{}] * 100}, {"b": bytes(600)}])
def test_no_pattern_is_made_of_what_is_too_much_for_one(head: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalite.wire.repeats.Pattern", None)
    frame = encoded("step", 1, head, b"x")
    assert Repeats().decode(memoryview(frame)) == frames.decode(memoryview(frame))


def test_more_sessions_than_there_are_patterns_do_not_drive_each_other_out() -> None:
    repeats = Repeats()
    known = []
    for round_ in range(3):
        for number in range(2 * _MOST_PATTERNS):
            head = {"sid": number.to_bytes(16, "big"), "n": round_}
            known.append(type(repeats.decode(memoryview(encoded("step", 1, head, b"x"))).head) is KnownHead)
    assert sum(known[2 * _MOST_PATTERNS :]) > _MOST_PATTERNS
