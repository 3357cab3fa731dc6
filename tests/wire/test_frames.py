"""Frames (spec 02): round trips, literal bytes, and the promise that any bytes are a frame or one kind of error."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite import limits
from petalite.errors import GoAwayCode, LocalProtocolError, RemoteProtocolError
from petalite.wire import frames, packing
from petalite.wire.frames import Cancel, Data, Err, GoAway, Hello, Ignorable, Ping, Pong, Progress, Req, Res

streams = st.integers(1, frames.LARGEST_STREAM)
words = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | words | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
heads = st.dictionaries(words, values, max_size=5)
some_frames = st.one_of(
    st.builds(Hello, heads),
    st.builds(Req, streams, st.booleans(), words, heads, st.none() | st.binary(min_size=1, max_size=300)),
    st.builds(Res, streams, st.booleans(), heads, st.none() | st.binary(min_size=1, max_size=300)),
    st.builds(Data, streams, st.booleans(), st.binary(max_size=300)),
    st.builds(Err, streams, st.integers(0, 2**32 - 1), words, heads),
    st.builds(Cancel, streams),
    st.builds(Ping, st.binary(min_size=8, max_size=8)),
    st.builds(Pong, st.binary(min_size=8, max_size=8)),
    st.builds(GoAway, st.integers(0, 2**32 - 1), st.integers(0, frames.LARGEST_STREAM), words),
    st.builds(Progress, streams, heads),
)


def decode(data: bytes) -> frames.Frame:
    return frames.decode(memoryview(data))


@given(some_frames)
def test_every_frame_survives_the_wire(frame: frames.Frame) -> None:
    assert decode(frames.encode(frame)) == frame


@given(st.binary(max_size=400) | values.map(msgpack.packb) | st.lists(values, max_size=6).map(msgpack.packb))
def test_any_bytes_are_a_frame_or_a_protocol_error(data: bytes) -> None:
    try:
        frame = decode(data)
    except RemoteProtocolError as error:
        assert error.code in (GoAwayCode.FRAME, GoAwayCode.PROTOCOL)
    else:
        assert isinstance(frame, frames.Frame)


@given(some_frames, st.data())
def test_a_frame_with_one_byte_changed_is_a_frame_or_a_protocol_error(frame: frames.Frame, data: st.DataObject) -> None:
    encoded = bytearray(frames.encode(frame))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(encoded))
    except RemoteProtocolError:
        pass


@pytest.mark.parametrize("stream", [1, 0x7F, 0x80, 0xFF, 0x100, 0xFFFF, 0x10000, 2**32 - 1, 2**32, 2**53 - 1])
def test_the_sliced_way_of_data_equals_the_general_one(stream: int) -> None:
    body = bytes(range(256)) * 2
    by_hand = frames.data_prefix(stream, True, len(body)) + body
    assert decode(by_hand) == decode(frames.encode(Data(stream, True, body))) == Data(stream, True, body)


@pytest.mark.parametrize("size", [0, 1, 0xFF, 0x100, limits.MAX_DATA])
def test_data_of_any_allowed_length(size: int) -> None:
    # msgpack packs short bins with a one-byte length; both forms are the same frame.
    for encoded in (frames.data_prefix(300, False, size) + bytes(size), frames.encode(Data(300, False, bytes(size)))):
        frame = decode(encoded)
        assert isinstance(frame, Data) and len(frame.body) == size


@pytest.mark.parametrize("stream", [1, 0x7F, 0x80, 0xFFFF, 0x10000, 2**32, 2**53 - 1])
def test_a_request_gets_its_stream_id_late(stream: int) -> None:
    late = frames.with_stream(frames.encode_req(False, "echo", packing.encode({"a": 1})), stream)
    assert decode(late) == Req(stream, False, "echo", {"a": 1})


@pytest.mark.parametrize("size", [1, 255, 256, limits.MAX_INLINE_BODY])
def test_a_body_that_travels_with_its_head(size: int) -> None:
    body = bytes(range(256)) * (size // 256 + 1)
    head = {"size": size, "x": bytes(limits.MAX_HEAD_FRAME - 100)}
    encoded = packing.encode(head)
    req = frames.with_body(frames.with_stream(frames.encode_req(True, "echo", encoded), 77), size) + body[:size]
    assert decode(req) == Req(77, True, "echo", head, body[:size])
    res = frames.with_body(frames.encode_res(77, True, encoded), size) + body[:size]
    assert decode(res) == Res(77, True, head, body[:size]) == decode(frames.encode(Res(77, True, head, body[:size])))


def test_literal_bytes() -> None:
    assert frames.encode(Cancel(5)) == bytes.fromhex("92 05 05")
    assert frames.encode(Req(1, True, "ping", {})) == bytes.fromhex("95 01 01 01 a4 70696e67 80")
    assert frames.encode(Res(1, True, {"size": 0})) == bytes.fromhex("94 02 01 01 81 a4 73697a65 00")
    assert frames.data_prefix(1, True, 3) + b"abc" == bytes.fromhex("94 03 cd0001 01 c5 0003 616263")
    assert frames.encode(Ping(bytes(8))) == bytes.fromhex("92 06 c4 08 0000000000000000")


MALFORMED = {
    "empty": b"",
    "map": msgpack.packb({}),
    "empty array": msgpack.packb([]),
    "type is text": msgpack.packb(["0", {}]),
    "type is a bool": msgpack.packb([True, 1, 0, "m", {}]),
    "HELLO of three": msgpack.packb([0, {}, 1]),
    "HELLO without a map": msgpack.packb([0, []]),
    "inline body too long": msgpack.packb([2, 1, 1, {}, bytes(limits.MAX_INLINE_BODY + 1)]),
    "inline body empty": msgpack.packb([2, 1, 1, {}, b""]),
    "inline body is text": msgpack.packb([2, 1, 1, {}, "x"]),
    "inline body and more": msgpack.packb([2, 1, 1, {}, b"x", b"y"]),
    "REQ of four": msgpack.packb([1, 1, 0, "m"]),
    "reserved flag bit": msgpack.packb([1, 1, 2, "m", {}]),
    "flags are a bool": msgpack.packb([1, 1, True, "m", {}]),
    "method is bin": msgpack.packb([1, 1, 1, b"m", {}]),
    "method too long": msgpack.packb([1, 1, 1, "m" * 65, {}]),
    "DATA with text": msgpack.packb([3, 1, 0, "body"]),
    "DATA too long": msgpack.packb([3, 1, 0, bytes(limits.MAX_DATA + 1)]),
    "DATA with reserved flags": msgpack.packb([3, 300, 4, bytes(10)]),
    "ERR code is negative": msgpack.packb([4, 1, -1, "", {}]),
    "PING of seven": msgpack.packb([6, bytes(7)]),
    "PING of a megabyte's beginning": msgpack.packb([6, bytes(60_000)]),
    "GOAWAY without text": msgpack.packb([8, 0, 0]),
    "head over its limit": msgpack.packb([2, 1, 1, {"x": bytes(limits.MAX_HEAD_FRAME)}]),
    "trailing byte": msgpack.packb([5, 1]) + b"\0",
    "duplicate key": bytes.fromhex("92 00 82 a1 61 01 a1 61 02"),
    "float": msgpack.packb([5, 1.0]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_frames_cost_the_connection(name: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(MALFORMED[name])
    assert caught.value.code is GoAwayCode.FRAME


@pytest.mark.parametrize("stream", [0, -1, 2**53])
def test_stream_ids_out_of_range_cost_the_connection(stream: int) -> None:
    for values_ in ([5, stream], [3, stream, 0, b"x"], [1, stream, 1, "m", {}]):
        with pytest.raises(RemoteProtocolError) as caught:
            decode(msgpack.packb(values_))
        assert caught.value.code is GoAwayCode.PROTOCOL


@pytest.mark.parametrize("kind", [9, 15, 32, 127, 2**32, -1])
def test_unknown_critical_types_cost_the_connection(kind: int) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(msgpack.packb([kind, 1, 2]))
    assert caught.value.code is GoAwayCode.PROTOCOL


@pytest.mark.parametrize("kind", [17, 31])
def test_unknown_ignorable_types_are_ignored(kind: int) -> None:
    assert decode(msgpack.packb([kind, "whatever", [1, {}]])) == Ignorable(kind)


def test_a_long_error_text_is_cut() -> None:
    frame = decode(frames.encode(Err(1, 15, "x" * 4000, {})))
    assert isinstance(frame, Err) and len(frame.text) == limits.MAX_ERROR_TEXT
    frame = decode(msgpack.packb([4, 1, 15, "y" * 60_000, {}]))
    assert isinstance(frame, Err) and len(frame.text) == limits.MAX_ERROR_TEXT


def test_what_would_break_a_limit_is_not_encoded() -> None:
    with pytest.raises(LocalProtocolError):
        frames.encode(Res(1, True, {"x": bytes(limits.MAX_HEAD_FRAME)}))
    with pytest.raises(LocalProtocolError):
        frames.encode(Req(1, True, "m" * 65, {}))
    with pytest.raises(LocalProtocolError):
        frames.encode_req(True, "m" * 65, packing.encode({}))
    with pytest.raises(LocalProtocolError):
        frames.encode_res(1, True, packing.encode({"x": bytes(limits.MAX_HEAD_FRAME)}))
