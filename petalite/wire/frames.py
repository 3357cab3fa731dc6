"""Frames: one msgpack array a Noise transport message (spec 02). Bytes to frozen dataclasses and back."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Never

from petalite import limits
from petalite.errors import GoAwayCode, LocalProtocolError, RemoteProtocolError
from petalite.wire import packing

END = 1
Buffer = bytes | bytearray | memoryview
Head = Mapping[str, Any]


class FrameType(IntEnum):
    HELLO = 0
    REQ = 1
    RES = 2
    DATA = 3
    ERR = 4
    CANCEL = 5
    PING = 6
    PONG = 7
    GOAWAY = 8
    PROGRESS = 16


FIRST_IGNORABLE = 16
FIRST_INVALID = 32


@dataclass(frozen=True, slots=True)
class Hello:
    head: Head


@dataclass(frozen=True, slots=True)
class Req:
    """`body`: all of it, where it travels in the same frame (PT-FRM-014)."""

    stream: int
    end: bool
    method: str
    head: Head
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class Res:
    """`body`: as in Req."""

    stream: int
    end: bool
    head: Head
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class Data:
    """Body bytes; `body` points into the buffer that was decoded and is valid only until that is reused."""

    stream: int
    end: bool
    body: Buffer


@dataclass(frozen=True, slots=True)
class Err:
    stream: int
    code: int
    text: str
    detail: Head = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cancel:
    stream: int


@dataclass(frozen=True, slots=True)
class Ping:
    payload: bytes


@dataclass(frozen=True, slots=True)
class Pong:
    payload: bytes


@dataclass(frozen=True, slots=True)
class GoAway:
    code: int
    last_stream: int
    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    stream: int
    head: Head


@dataclass(frozen=True, slots=True)
class Ignorable:
    """A frame of a type from the ignorable range that this version does not know."""

    type: int


Frame = Hello | Req | Res | Data | Err | Cancel | Ping | Pong | GoAway | Progress | Ignorable


def encode(frame: Frame) -> bytes:
    """One frame as plaintext bytes. Raises LocalProtocolError if it breaks a limit of spec 02."""
    data = packing.encode(_FIELDS[type(frame)](frame))
    limit = limits.MAX_FRAME if isinstance(frame, Data) else limits.MAX_HEAD_FRAME + _body_size(frame)
    if len(data) > limit:
        raise LocalProtocolError(f"{type(frame).__name__} frame of {len(data)} bytes, limit {limit}")
    if isinstance(frame, Req):
        _check_method(frame.method)
    return data


def _body_size(frame: Frame) -> int:
    """Bytes of a body that travels with a head."""
    return len(frame.body) if isinstance(frame, Req | Res) and frame.body is not None else 0


LARGEST_STREAM = 2**53 - 1
_REQ_START = b"\x95\x01" + packing.encode_uint(LARGEST_STREAM)


def encode_req(end: bool, method: str, head: bytes) -> bytes:
    """A REQ with an encoded `head`. Its stream id is set later, by `with_stream`: ids are allotted in the order of
    writing (PT-STR-003).

    This and `encode_res` do what `encode` does, without the object in between: they stand in the way of each step.
    """
    data = _REQ_START + (b"\x01" if end else b"\x00") + _packed_method(method) + head
    return data if len(data) <= limits.MAX_HEAD_FRAME else _refuse(data)


@functools.lru_cache(maxsize=64)
def _packed_method(method: str) -> bytes:
    _check_method(method)
    return packing.encode(method)


def encode_res(stream: int, end: bool, head: bytes) -> bytes:
    data = b"\x94\x02" + packing.encode_uint(stream) + (b"\x01" if end else b"\x00") + head
    return data if len(data) <= limits.MAX_HEAD_FRAME else _refuse(data)


def _refuse(data: bytes) -> Never:
    raise LocalProtocolError(f"frame of {len(data)} bytes, limit {limits.MAX_HEAD_FRAME}")


def _check_method(method: str) -> None:
    if len(method) > limits.MAX_METHOD:
        raise LocalProtocolError(f"method name of {len(method)} characters, limit {limits.MAX_METHOD}")


def with_stream(encoded: bytes, stream: int) -> bytes:
    """What `encode_req` gave, with its real stream id."""
    return encoded[:2] + packing.encode_uint(stream) + encoded[11:]


def with_body(encoded: bytes, size: int) -> bytes:
    """An encoded REQ or RES as it stands before its own `size` body bytes: one element more, whose bytes follow."""
    return bytes((encoded[0] + 1,)) + encoded[1:] + b"\xc5" + size.to_bytes(2, "big")


# Plain integers: an IntEnum in the array would cost a slower way through the encoder.
_HELLO, _REQ, _RES, _DATA, _ERR, _CANCEL, _PING, _PONG, _GOAWAY, _PROGRESS = (int(kind) for kind in FrameType)

_FIELDS: dict[type, Callable[[Any], list[Any]]] = {
    Hello: lambda frame: [_HELLO, _map(frame.head)],
    Req: lambda frame: [_REQ, frame.stream, int(frame.end), frame.method, _map(frame.head), *_inline(frame)],
    Res: lambda frame: [_RES, frame.stream, int(frame.end), _map(frame.head), *_inline(frame)],
    Data: lambda frame: [_DATA, frame.stream, int(frame.end), bytes(frame.body)],
    Err: lambda frame: [_ERR, frame.stream, int(frame.code), frame.text, _map(frame.detail)],
    Cancel: lambda frame: [_CANCEL, frame.stream],
    Ping: lambda frame: [_PING, frame.payload],
    Pong: lambda frame: [_PONG, frame.payload],
    GoAway: lambda frame: [_GOAWAY, int(frame.code), frame.last_stream, frame.text],
    Progress: lambda frame: [_PROGRESS, frame.stream, _map(frame.head)],
    Ignorable: lambda frame: [frame.type],
}


def _inline(frame: Req | Res) -> list[bytes]:
    return [] if frame.body is None else [frame.body]


def _map(head: Head) -> dict[str, Any]:
    return head if type(head) is dict else dict(head)


def data_prefix(stream: int, end: bool, size: int) -> bytes:
    """Everything of a DATA frame that stands before its `size` body bytes, so that a body is never packed."""
    if stream < 0x1_0000:
        return _USUAL_DATA.pack(0x94, _DATA, 0xCD, stream, end, 0xC5, size)
    return b"\x94\x03" + packing.encode_uint(stream) + (b"\x01\xc5" if end else b"\x00\xc5") + size.to_bytes(2, "big")


def decode(data: memoryview) -> Frame:
    """Plaintext of one record to a frame.

    Raises RemoteProtocolError(FRAME) for anything malformed and RemoteProtocolError(PROTOCOL) for an unknown
    critical type. A `Data` frame's body is a view into `data`.
    """
    if len(data) > 1 and data[1] == _DATA and (fast := _decode_data(data)) is not None:
        return fast
    values = packing.decode(data, max_size=limits.MAX_FRAME, max_str=limits.MAX_FRAME)
    if type(values) is not list or not values or type(values[0]) is not int:
        raise _malformed("a frame is an array that begins with its type")
    kind = values[0]
    builder = _BUILDERS.get(kind)
    if builder is not None:
        frame = builder(values)
        if len(data) > limits.MAX_HEAD_FRAME and kind != _DATA and kind != _ERR:
            size = len(data) - _body_size(frame)
            if size > limits.MAX_HEAD_FRAME:
                raise _malformed(f"frame of {size} bytes, limit {limits.MAX_HEAD_FRAME}")
        return frame
    if FIRST_IGNORABLE <= kind < FIRST_INVALID:
        return Ignorable(kind)
    raise RemoteProtocolError(f"unknown frame type {kind}")


def _malformed(text: str) -> RemoteProtocolError:
    return RemoteProtocolError(text, GoAwayCode.FRAME)


# array of 4, DATA, uint16 stream, flags, bin16 length: what nearly all DATA frames look like.
_USUAL_DATA = struct.Struct(">BBBHBBH")


def _decode_data(data: memoryview) -> Data | None:
    """DATA in the usual encoding, sliced and not unpacked; None sends anything else down the general path."""
    size = len(data) - _USUAL_DATA.size
    if size < 0:
        return None
    array, kind, uint16, stream, flags, bin16, body = _USUAL_DATA.unpack_from(data)
    if array != 0x94 or kind != _DATA or uint16 != 0xCD or flags > 1 or bin16 != 0xC5 or body != size:
        return None
    check_stream(stream)
    if size > limits.MAX_DATA:
        raise _malformed(f"DATA of {size} bytes, limit {limits.MAX_DATA}")
    return Data(stream, flags == END, data[_USUAL_DATA.size :])


def check_stream(value: Any) -> int:
    """Raises RemoteProtocolError unless it is in 1..2^53-1 (PT-FRM-005)."""
    if type(value) is not int or not 0 < value <= LARGEST_STREAM:
        raise RemoteProtocolError(f"stream id must be an integer in 1..2^53-1, not {_show(value)}")
    return value


def _check_flags(value: Any) -> bool:
    if type(value) is not int or value not in (0, END):
        raise _malformed(f"flags must be 0 or 1, not {_show(value)}")
    return value == END


def _check_map(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise _malformed(f"a map is due, not {_show(value)}")
    return value


def _check_str(value: Any, name: str, limit: int) -> str:
    if type(value) is not str or len(value) > limit:
        raise _malformed(f"{name} must be a str of at most {limit} characters")
    return value


def _check_int(value: Any, name: str, high: int) -> int:
    if type(value) is not int or not 0 <= value <= high:
        raise _malformed(f"{name} must be an integer in 0..{high}, not {_show(value)}")
    return value


def _show(value: Any) -> str:
    return ascii(value)[:40]


def _arity(values: list[Any], count: int) -> list[Any]:
    if len(values) != count:
        raise _malformed(f"frame type {values[0]} has {count} elements, not {len(values)}")
    return values


def _hello(values: list[Any]) -> Hello:
    _, head = _arity(values, 2)
    return Hello(_check_map(head))


def _req(values: list[Any]) -> Req:
    body = _inline_body(values, 5)
    _, stream, flags, method, head = values
    _check_str(method, "method", limits.MAX_METHOD)
    return Req(check_stream(stream), _check_flags(flags), method, _check_map(head), body)


def _res(values: list[Any]) -> Res:
    body = _inline_body(values, 4)
    _, stream, flags, head = values
    return Res(check_stream(stream), _check_flags(flags), _check_map(head), body)


def _inline_body(values: list[Any], count: int) -> bytes | None:
    """Takes a body off the end of a frame that has one element more than `count`."""
    if len(values) == count:
        return None
    _arity(values, count + 1)
    body = values.pop()
    if type(body) is not bytes or not 0 < len(body) <= limits.MAX_INLINE_BODY:
        raise _malformed(f"a body in the frame of its head is a bin of 1..{limits.MAX_INLINE_BODY} bytes")
    return body


def _data(values: list[Any]) -> Data:
    _, stream, flags, body = _arity(values, 4)
    if type(body) is not bytes or len(body) > limits.MAX_DATA:
        raise _malformed(f"DATA carries a bin of at most {limits.MAX_DATA} bytes")
    return Data(check_stream(stream), _check_flags(flags), body)


def _err(values: list[Any]) -> Err:
    _, stream, code, text, detail = _arity(values, 5)
    _check_str(text, "error text", limits.MAX_FRAME)
    return Err(
        check_stream(stream),
        _check_int(code, "error code", 2**32 - 1),
        text[: limits.MAX_ERROR_TEXT],
        _check_map(detail),
    )


def _cancel(values: list[Any]) -> Cancel:
    _, stream = _arity(values, 2)
    return Cancel(check_stream(stream))


def _ping_payload(values: list[Any]) -> bytes:
    _, payload = _arity(values, 2)
    if type(payload) is not bytes or len(payload) != limits.PING_BYTES:
        raise _malformed(f"PING and PONG carry {limits.PING_BYTES} bytes")
    return payload


def _goaway(values: list[Any]) -> GoAway:
    _, code, last, text = _arity(values, 4)
    _check_str(text, "GOAWAY text", limits.MAX_STR)
    return GoAway(
        _check_int(code, "GOAWAY code", 2**32 - 1),
        _check_int(last, "last stream", LARGEST_STREAM),
        text[: limits.MAX_GOAWAY_TEXT],
    )


def _progress(values: list[Any]) -> Progress:
    _, stream, head = _arity(values, 3)
    return Progress(check_stream(stream), _check_map(head))


_BUILDERS: dict[int, Callable[[list[Any]], Frame]] = {
    FrameType.HELLO: _hello,
    FrameType.REQ: _req,
    FrameType.RES: _res,
    FrameType.DATA: _data,
    FrameType.ERR: _err,
    FrameType.CANCEL: _cancel,
    FrameType.PING: lambda values: Ping(_ping_payload(values)),
    FrameType.PONG: lambda values: Pong(_ping_payload(values)),
    FrameType.GOAWAY: _goaway,
    FrameType.PROGRESS: _progress,
}
